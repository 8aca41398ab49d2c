"""The benchmark harness as a program: the command line, whole runs of a second, and the GPU's timers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hardware import INDUCTOR
from torch import nn

from bench import cli, cuda, report
from bench.cases import EPILOGUE_TITLES, Case
from bench.providers import BUILDERS, COMPILED, COPY, EAGER, OURS
from bench.results import Run
from bench.sampling import Ring


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restores the process-wide setting that --threads changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def wrong_eps(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
    layer.eps = 1e-2
    return layer


# One thread: on a machine with other load, two threads would wait for each other.
TINY_RUN = ["--device", "cpu", "--threads", "1", "--shapes", "3x5x5", "--batch", "4", "--budget", "0.01"]
TINY_RUN += ["--providers", "ours,eager"]


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [*TINY_RUN, "--quick", "--dtypes", "bf16", "--out", str(tmp_path), "--name", "smoke"]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    assert "## Losses" in printed and str(tmp_path) in printed
    stem = next(tmp_path.glob("*-smoke.json"))
    drawn = [".png"] if find_spec("matplotlib") else []
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", *drawn]
    run = Run.load(stem)
    assert [record.direction for record in run.records[:3]] == ["forward", "eval", "step"]
    assert len(run.records) == 2 * 3  # layouts, directions
    assert len(run.tolerance) == 2 * 2 * 2  # layouts, training and evaluation, providers
    for record in run.records:
        assert set(record.seconds) == {OURS, EAGER, COPY}
        assert all(len(samples) >= 5 and min(samples) > 0 for samples in record.seconds.values())
    assert str(tmp_path) not in run.machine["command"] and "--quick" in run.machine["command"]
    text = stem.with_suffix(".md").read_text()
    assert text == report.render(run, stem.with_suffix(".png").name if drawn else None)
    assert cli.main(["--render", str(stem), "--no-plot"]) == 0


@pytest.mark.parametrize("epilogue", ["relu", "add+relu"])
def test_a_run_with_an_epilogue(epilogue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The run's name, its floor, and the providers in its report."""
    options = [*TINY_RUN, "--quick", "--dtypes", "fp32", "--epilogue", epilogue, "--no-plot", "--out", str(tmp_path)]
    assert cli.main(options) == 0
    stem = next(tmp_path.glob(f"*-quick-{epilogue.replace('+', '-')}.json"))
    run = Run.load(stem)
    assert run.epilogue == epilogue and all(record.epilogue == epilogue for record in run.records)
    step = next(record for record in run.records if record.direction == "step")
    assert step.floor_bytes == (5 if epilogue == "relu" else 7) * step.tensor_bytes
    text = stem.with_suffix(".md").read_text()
    assert text.startswith(f"# {EPILOGUE_TITLES[epilogue]} on ")
    assert "torch's in-place operations" in text
    capsys.readouterr()


def test_settings_that_affect_figures_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("BNKERNELS_CPU_CACHE_MB", "7")
    monkeypatch.setenv("NOT_OURS", "7")
    options = [*TINY_RUN, "--dtypes", "fp32", "--layouts", "nchw", "--directions", "eval", "--no-plot"]
    assert cli.main([*options, "--out", str(tmp_path)]) == 0
    setting = next(line for line in next(tmp_path.glob("*.md")).read_text().splitlines() if line.startswith("- set: "))
    assert "`BNKERNELS_CPU_CACHE_MB=7`" in setting and "NOT_OURS" not in setting
    capsys.readouterr()


def test_our_wrong_result_is_not_timed(tmp_path: Path, monkeypatch, capsys):
    """The case has no time, the run continues, and the report and the exit code show the failure."""

    def wrong_in_bf16(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
        return wrong_eps(layer, case) if case.dtype == "bf16" else layer

    monkeypatch.setitem(BUILDERS, OURS, wrong_in_bf16)
    options = [*TINY_RUN, "--dtypes", "bf16,fp32", "--layouts", "nchw", "--no-plot", "--out", str(tmp_path)]
    assert cli.main(options) == 1
    assert "bnkernels is outside the bound" in capsys.readouterr().err
    run = Run.load(next(tmp_path.glob("*.json")))
    assert {record.dtype for record in run.records} == {"fp32"}
    assert len(run.failed) == 1 and run.failed[0].startswith("4x3x5x5 nchw bf16: bnkernels is outside the bound")
    assert [row.passed for row in run.tolerance if row.provider == OURS and "bf16" in row.case] == [False]
    assert f"- **failed**: {run.failed[0]}" in next(tmp_path.glob("*.md")).read_text()


def test_a_case_that_raises_is_passed_over(tmp_path: Path, monkeypatch, capsys):
    def raises_in_nchw(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
        if case.layout == "nchw":
            raise RuntimeError("CUDA error: an illegal memory access\nmore of it")
        return layer

    monkeypatch.setitem(BUILDERS, EAGER, raises_in_nchw)
    assert cli.main([*TINY_RUN, "--dtypes", "fp32", "--json-only", "--out", str(tmp_path)]) == 1
    (file,) = tmp_path.iterdir()
    run = Run.load(file)
    assert run.failed == ["4x3x5x5 nchw fp32: RuntimeError: CUDA error: an illegal memory access"]
    assert {record.layout for record in run.records} == {"nhwc"}
    printed = capsys.readouterr().out
    assert "4x3x5x5 nchw fp32: no time\n" in printed and "4x3x5x5 nhwc fp32: forward cpu" in printed


def test_an_interrupted_run_is_written(tmp_path: Path, monkeypatch, capsys):
    """Finished measurements are in the JSON, the report and the plot."""

    def interrupted_in_bf16(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
        if case.dtype == "bf16":
            raise KeyboardInterrupt
        return layer

    monkeypatch.setitem(BUILDERS, EAGER, interrupted_in_bf16)
    assert cli.main([*TINY_RUN, "--dtypes", "fp32,bf16", "--no-plot", "--out", str(tmp_path)]) == cli.INTERRUPTED
    run = Run.load(next(tmp_path.glob("*.json")))
    assert {record.dtype for record in run.records} == {"fp32"} and "interrupted" in run.notes[-1]
    assert "interrupted" in next(tmp_path.glob("*.md")).read_text()
    capsys.readouterr()


def test_a_wrong_result_of_another_provider_is_reported(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(BUILDERS, EAGER, wrong_eps)
    options = [*TINY_RUN, "--dtypes", "fp32", "--layouts", "nchw", "--directions", "eval", "--no-plot"]
    assert cli.main([*options, "--out", str(tmp_path)]) == 0
    assert "outside: nn.BatchNorm2d, 4x3x5x5 nchw fp32, eval" in next(tmp_path.glob("*.md")).read_text()


def test_a_compiler_that_does_not_work_is_noted(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "why_no_compiler", lambda device: "InvalidCxxCompiler: none found")
    options = [*TINY_RUN, "--providers", "ours,compiled", "--dtypes", "fp32", "--layouts", "nchw", "--no-plot"]
    assert cli.main([*options, "--out", str(tmp_path)]) == 0
    report_text = next(tmp_path.glob("*.md")).read_text()
    assert "note: no figures of torch.compile" in report_text and "InvalidCxxCompiler" in report_text
    assert "no figures of torch.compile" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--dtypes", "fp8"],
        ["--layouts", ""],
        ["--shapes", "3x4"],
        ["--shapes", "0x4x4"],
        ["--batch", "0"],
        ["--batch", "x"],
        ["--epilogue", "gelu"],
    ],
)
def test_bad_options_are_refused(options: list[str]):
    with pytest.raises(SystemExit) as refusal:
        cli.parser().parse_args(options)
    assert refusal.value.code == 2


def test_the_compiled_layer_runs_the_step_only_unless_full():
    plan = cli.make_plan(cli.parser().parse_args(["--device", "cpu"]))
    assert plan.takes_part(COMPILED, "step") and not plan.takes_part(COMPILED, "forward")
    full = cli.make_plan(cli.parser().parse_args(["--device", "cpu", "--full"]))
    assert full.takes_part(COMPILED, "backward")
    assert len(plan.cases) == 12 * 2 * 2 * 2
    assert plan.takes_part(OURS, "forward") and plan.takes_part(EAGER, "eval")


@pytest.mark.cuda
@INDUCTOR
def test_a_whole_run_on_the_gpu(tmp_path: Path):
    options = ["--device", "cuda", "--quick", "--shapes", "16x9x9", "--batch", "4", "--budget", "0.01", "--no-plot"]
    assert cli.main([*options, "--out", str(tmp_path), "--modes", "cold,warm,user", "--dtypes", "bf16"]) == 0
    run = Run.load(next(tmp_path.glob("*.json")))
    assert {record.mode for record in run.records} == {"cold", "warm", "user"}
    methods = {(record.mode, method) for record in run.records for method in record.method.values()}
    assert methods == {("cold", "graph"), ("warm", "graph"), ("user", "wall")}
    assert len(run.device_copy) >= 20 and min(run.device_copy) > 1e10
    assert not run.notes


# ---- the GPU's timers, on a simulated GPU


class FakeGpu:
    """A stand-in for the parts of torch.cuda that cuda.py uses: a clock that each call advances by 1 ms, and graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> None:
        self.now = 0.0
        self.refuses = refuses
        self.called: list[int] = []
        self.capturing: list[int] | None = None
        gpu = self

        class Graph:
            def replay(self) -> None:
                gpu.now += 1e-3 * len(self.captured)

        class Capture:
            def __init__(self, graph: Graph, stream: object) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                gpu.capturing = self.graph.captured = []

            def __exit__(self, *error: object) -> None:
                gpu.capturing = None
                if gpu.refuses:
                    raise RuntimeError(gpu.refuses)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                self.at = gpu.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        played = {"CUDAGraph": Graph, "graph": Capture, "Event": Event, "Stream": Stream}
        for name, stand_in in played.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self, index: int) -> object:
        if self.capturing is not None:
            self.capturing.append(index)
        else:
            self.now += 1e-3
        self.called.append(index)
        return object()


@pytest.mark.parametrize(("mode", "captured"), [("cold", [0, 1, 2, 3, 4]), ("warm", [0] * cuda.WARM_CALLS)])
def test_graphs_hold_the_ring_or_one_buffer(monkeypatch: pytest.MonkeyPatch, mode: str, captured: list[int]):
    gpu = FakeGpu(monkeypatch)
    timed = cuda.graph_timer(lambda: gpu.call, Ring(5), mode)
    assert (timed.method, timed.why) == ("graph", "")
    assert gpu.called == [0] * cuda.WARMUP_CALLS + captured
    # Replays run whole graphs; the result is scaled to the requested number of calls.
    for count in (1, 5, 8, 23, 400):
        assert timed.timer(count) == pytest.approx(count * 1e-3)
    assert len(gpu.called) == cuda.WARMUP_CALLS + len(captured)


def test_calls_that_cannot_be_captured_are_timed_by_events(monkeypatch: pytest.MonkeyPatch):
    gpu = FakeGpu(monkeypatch, refuses="operation not permitted\nwhen stream is capturing")
    timed = cuda.graph_timer(lambda: gpu.call, Ring(3), "cold")
    assert (timed.method, timed.why) == ("events", "operation not permitted")
    gpu.called.clear()
    assert timed.timer(6) == pytest.approx(6e-3)
    assert gpu.called == [0, 1, 2, 0, 1, 2]
