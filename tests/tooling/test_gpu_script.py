"""bench/gpu.sh without a GPU: every step on the fake CUDA device, and the files that a killed stage leaves."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fake_cuda
import pytest
import torch

from bench import files, gpu
from bench.results import Run
from bench.stages import SIZES, STAGES, Facts, Step, something_to_build

ROOT = Path(__file__).resolve().parents[2]


def rows_of(summary: Path) -> dict[str, tuple[str, str]]:
    """Status and note of each step in summary.md."""
    table = [line.split("|") for line in summary.read_text().splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0][1:3]] == ["step", "status"]
    return {row[1].strip(): (row[2].strip(), row[4].strip()) for row in table[2:]}


def started(words: Sequence[str | Path], **settings: str) -> subprocess.Popen[str]:
    """Starts the program in its own process group, which can be killed."""
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_session(process: subprocess.Popen[str]) -> None:
    """Ends the processes that a killed stage leaves running: `timeout` creates a process group for each step, within
    the same session."""
    process.kill()
    process.wait()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
        except (OSError, IndexError):
            continue
        if session == process.pid:
            os.kill(int(folder.name), signal.SIGKILL)


def run(stage: str, results: Path, **settings: str) -> tuple[int, str]:
    process = started(["bash", "bench/gpu.sh", stage], RESULTS=str(results), **settings)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


# ---- both stages, complete


@pytest.mark.slow
def test_every_step_on_the_fake_device(tmp_path: Path) -> None:
    """Each step runs or is skipped with a reason, and writes its results to the few allowed files."""
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    settings = {"SIZE": "tiny", "RESULTS": str(tmp_path), "TOTAL": "600", **fake_cuda.environment()}
    stages = [started(["bash", "bench/gpu.sh", stage], **settings) for stage in STAGES]
    for (stage, (_, steps)), process in zip(STAGES.items(), stages):
        output, _ = process.communicate(timeout=600)
        log = (tmp_path / stage / "log.txt").read_text()
        rows = rows_of(tmp_path / stage / "summary.md")
        assert list(rows) == [step.name for step in steps]
        for step in steps:
            status, note = rows[step.name]
            if reason := step.needs(Facts(gpu="fake CUDA device", fake_cuda=True)):
                assert (status, note) == ("skipped", reason)
                continue
            assert status == "passed" and note, f"{step.name}: {status}: {note}\n{log[-4000:]}"
            assert f"===== {step.name}: " in log
        assert process.returncode == 0, output
        made = sorted(path.name for path in (tmp_path / stage).iterdir())
        assert len(made) <= 8 and all(re.fullmatch(r"[\w.-]+", name) for name in made), made
        benches = [step.name for step in steps if " -m bench " in step.program and rows[step.name][0] == "passed"]
        for name in benches:
            (file,) = (tmp_path / stage).glob(f"*-fake-cuda-device-{name}.json")
            loaded = Run.load(file)
            assert loaded.records and not loaded.failed
    check = json.loads((tmp_path / "first" / "check.json").read_text())
    assert check["passed"] and check["backends"][0]["device"] == "cuda"


def test_steps_that_need_a_gpu_are_skipped_with_the_reason(tmp_path: Path) -> None:
    steps = [step.name for step in STAGES["second"][1] if step.name != "build"]
    status, output = run("second", tmp_path, STEPS=" ".join(steps), CUDA_VISIBLE_DEVICES="")
    assert status == 0, output
    reason = "torch sees no GPU" if torch.version.cuda else "is built without CUDA"
    rows = rows_of(tmp_path / "second" / "summary.md")
    assert list(rows) == steps
    assert all(status == "skipped" and reason in note for status, note in rows.values())


def test_sizes_name_the_same_things() -> None:
    assert SIZES["full"].keys() == SIZES["tiny"].keys()


@pytest.mark.parametrize("settings", [{"SIZE": "huge"}, {"STEPS": "check bench"}, {"stage": "third"}], ids=str)
def test_unknown_settings_are_rejected(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "take_interrupts", lambda: None)
    monkeypatch.setenv("RESULTS", str(tmp_path))
    for name in ("SIZE", "STEPS"):
        monkeypatch.setenv(name, settings.get(name, ""))
    assert gpu.main([settings.get("stage", "first")]) == 2
    assert "usage: " in capsys.readouterr().err or "STEPS" in settings
    assert not list(tmp_path.iterdir())


# ---- the build


LIBRARY = Facts(gpu="NVIDIA H200", capability="9.0", archs="8.0;9.0+PTX", current=True)


def test_a_library_that_fits_is_used() -> None:
    reason = something_to_build(LIBRARY)
    assert reason is not None and "8.0;9.0+PTX" in reason


@pytest.mark.parametrize(
    "facts",
    [
        Facts(gpu="NVIDIA H200", capability="9.0", archs="8.0+PTX", current=True),  # it would run, but without clusters
        Facts(gpu="NVIDIA H200", capability="9.0", archs="9.0", current=False),
        Facts(gpu="NVIDIA H200", capability="9.0", archs="", current=True),
    ],
)
def test_another_library_is_built_again(facts: Facts) -> None:
    assert something_to_build(facts) is None


def test_a_library_is_known_by_its_bytes_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("setup.py", "build_support.py", "csrc/a.cu"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LIBRARY", tmp_path / "_C.so")
    marks = [gpu.build_mark()]
    for file in ("_C.so", "csrc/a.cu", "setup.py"):
        (tmp_path / file).write_text("2")
        marks.append(gpu.build_mark())
    assert gpu.build_mark() == marks[-1] and len(set(marks)) == 4


# ---- steps that fail, hang, or are too slow

STAGE = """
import os, sys
from pathlib import Path
from bench import gpu
from bench.stages import Facts, Step

gpu.GRACE = 1
results = Path(sys.argv[1])
steps = [
    Step(f"step{i}", 20, f"bash -c 'sleep {0.02 * i}; echo {i} >> {results}/done; echo said {i}'", lambda facts: None)
    for i in range(10)
]
gpu.take_interrupts()
summary = gpu.Summary(results / "summary.md", "# A stage")
sys.exit(gpu.run_stage(steps, 100, Facts(), {}, dict(os.environ), summary))
"""


def step(program: str, **more: str) -> Step:
    return Step("step", 20, program, lambda facts: None, **more)


def stage(steps: Sequence[Step], results: Path, total: int = 100) -> tuple[int, dict[str, tuple[str, str]]]:
    summary = gpu.Summary(results / "summary.md", "# A stage")
    status = gpu.run_stage(steps, total, Facts(why="none here"), {}, dict(os.environ), summary)
    return status, rows_of(results / "summary.md")


def test_a_step_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    steps = [
        Step("wrong", 20, "bash -c 'echo 3 of 4 | cat; echo bye; exit 3'", lambda facts: None, r"\d of \d"),
        Step("missing", 20, "bash -c 'echo no such tool; exit 77'", lambda facts: None),
        Step("right", 20, "echo fine", lambda facts: None),
        Step("skipped", 20, "false"),
    ]
    status, rows = stage(steps, tmp_path)
    assert status == 1
    assert rows == {
        "wrong": ("FAILED", "exit status 3; 3 of 4"),
        "missing": ("skipped", "no such tool"),
        "right": ("passed", "fine"),
        "skipped": ("skipped", "none here"),
    }


def test_no_time_left_is_a_failure(tmp_path: Path) -> None:
    """A step that did not run counts as failed."""
    assert stage([step("true")], tmp_path, total=gpu.GRACE + 4) == (1, {"step": ("FAILED", "no time left")})


def test_a_step_is_interrupted_then_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted program can write its results; one that ignores the interrupt is killed."""
    monkeypatch.setattr(gpu, "GRACE", 1)
    log = tmp_path / "log.txt"
    listens = "bash -c 'trap \"echo saved; exit 0\" INT; echo begun; while true; do sleep 0.05; done'"
    deaf = "bash -c 'trap \"\" INT; echo begun; while true; do sleep 0.05; done'"
    for program, last in ((listens, "saved"), (deaf, "begun")):
        begin = time.monotonic()
        words = ["bash", "-c", program.removeprefix("bash -c ")[1:-1]]
        status, _, note = gpu.run_step(step(program), words, 1, log, dict(os.environ))
        assert (status, note) == ("FAILED", f"cut off after 1 s; {last}")
        assert time.monotonic() - begin < 10


# ---- killed at a random moment


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_a_killed_stage(seed: int, tmp_path: Path) -> None:
    """Every step that ended before has its row and its output."""
    number = signal.SIGINT if seed % 2 else signal.SIGKILL
    process = started([sys.executable, "-c", STAGE, tmp_path])
    try:
        done = tmp_path / "done"
        deadline = time.monotonic() + 60
        while not (tmp_path / "summary.md").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 1.2))
        ended = done.read_text().split() if done.exists() else []
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=20)
    finally:
        end_session(process)
    rows = rows_of(tmp_path / "summary.md")
    log = (tmp_path / "log.txt").read_text()
    passed = [name for name, (status, _) in rows.items() if status == "passed"]
    printed = re.findall(r"passed after .* said (\d+)", output)
    assert passed == [f"step{i}" for i in range(len(passed))]
    # The step that ended last may not have been recorded yet.
    assert len(passed) >= max(len(printed), len(ended) - 1)
    assert all(rows[name][1] == f"said {name.removeprefix('step')}" for name in passed)
    assert all(f"said {name.removeprefix('step')}\n" in log for name in passed)
    if number == signal.SIGINT and len(passed) < 10:
        assert process.returncode == gpu.INTERRUPTED
        assert list(rows.values())[len(passed)] == ("FAILED", "interrupted; the following steps did not run")


def test_an_interrupt_reaches_the_step(tmp_path: Path) -> None:
    """The step can write its results; the stage does not wait for its regular end."""
    program = 'trap \\"echo saved; exit 0\\" INT; echo begun; for i in {{1..400}}; do sleep 0.05; done'
    step = f"""steps = [Step("long", 20, "bash -c '{program}'", lambda facts: None)]"""
    process = started(
        [sys.executable, "-c", STAGE.replace("gpu.take_interrupts()", f"{step}\ngpu.take_interrupts()"), tmp_path]
    )
    try:
        log = tmp_path / "log.txt"
        deadline = time.monotonic() + 60
        while not (log.exists() and "\nbegun\n" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        begin = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
        assert time.monotonic() - begin < 10 and process.returncode == gpu.INTERRUPTED
    finally:
        end_session(process)
    assert "saved" in log.read_text()
    assert rows_of(tmp_path / "summary.md") == {"long": ("FAILED", "interrupted; the following steps did not run")}


BENCH = ["-m", "bench", "--device", "cpu", "--threads", "1", "--quick", "--providers", "ours,eager", "--no-plot"]
BENCH += ["--batch", "2,3,4,5,6,7,8,9", "--shapes", "3x5x5,4x4x4,5x3x3", "--budget", "0.01", "--max-ring", "2"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_cases_of_a_killed_bench(seed: int, tmp_path: Path) -> None:
    """Every case that was printed is complete in the JSON; an interrupted run writes its report too."""
    number = signal.SIGINT if seed == 2 else signal.SIGKILL
    process = started([sys.executable, *BENCH, "--out", tmp_path, "--name", "killed"])
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 1))
        os.killpg(process.pid, number)
        printed = [
            line
            for line in [first, *process.communicate(timeout=240)[0].splitlines()]
            if re.match(r"\d+x\d+x\S+ n", line)
        ]
    finally:
        end_session(process)
    (file,) = tmp_path.glob("*-killed.json")
    run = Run.load(file)
    cases = list(dict.fromkeys(f"{r.batch}x{r.shape} {r.layout} {r.dtype}" for r in run.records))
    assert 1 <= len(printed) < 8 * 3 * 4
    assert [line.split(":")[0] for line in printed] == cases[: len(printed)]
    assert all(
        len([r for r in run.records if f"{r.batch}x{r.shape} {r.layout} {r.dtype}" == case]) == 3
        for case in cases[: len(printed)]
    )
    if number == signal.SIGINT:
        assert process.returncode == 130
        report = next(tmp_path.glob("*-killed.md")).read_text()
        assert "interrupted: not all cases were measured" in report and "## All cases" in report


def test_a_stage_killed_on_the_fake_device(tmp_path: Path) -> None:
    """The real script, with everything that it starts."""
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    settings = {
        "SIZE": "tiny",
        "RESULTS": str(tmp_path),
        "STEPS": "check n256-bf16 nhwc-eval",
        **fake_cuda.environment(),
    }
    process = started(["bash", "bench/gpu.sh", "first"], **settings)
    printed = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if line.startswith("== n256-bf16"):
                break
        time.sleep(random.Random(7).uniform(0, 6))
        os.killpg(process.pid, signal.SIGKILL)
        printed += process.communicate(timeout=60)[0].splitlines()
    finally:
        end_session(process)
    rows = rows_of(tmp_path / "first" / "summary.md")
    assert rows["check"][0] == "passed" and json.loads((tmp_path / "first" / "check.json").read_text())["passed"]
    assert len(rows) >= len([line for line in printed if "passed after" in line])
    for file in (tmp_path / "first").glob("*n256-bf16.json"):
        assert Run.load(file).records


def test_a_file_is_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.md"
    files.replace_text(file, "old")

    def killed(part: Path, target: Path) -> None:
        assert Path(part).read_text() == "new"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.replace_text(file, "new")
    assert file.read_text() == "old"
