"""Two tools that bench/gpu.sh runs: one case of each kind of plan, and the micro-measurements."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
from plan_model import DEVICES

from bench.tools import device_code, kinds, micro, phases
from bnkernels import _ops as ops
from bnkernels.testing import Case

ROOT = Path(__file__).resolve().parents[2]


# ---- one case of each kind of plan


@pytest.mark.parametrize("device", ["h100", "h200", "a100", "t4"])
def test_a_case_of_every_kind(device: str) -> None:
    """Cases of all layouts and groups, forward and backward, few and small enough for the slowest tool."""
    limits = DEVICES[device].arguments()
    chosen = kinds.choose(limits)
    assert not kinds.missing(chosen, limits)
    assert len(chosen) <= 40
    seen = {kind for one in chosen for kind in one.kinds}
    groups = ["cta", "grid", *(["cluster"] if limits["max_cluster"] else [])]
    assert {(kind.layout, kind.group) for kind in seen if kind.group != "two_pass"} == {
        (layout, group) for layout in kinds.LAYOUTS for group in groups
    }
    assert {"two_shot", "part", "rounds"} <= {word for kind in seen for word in kind.more}
    assert {one.case.dtype for one in chosen} == {"float64", "float32", "float16", "bfloat16"}
    assert all(math.prod(one.case.shape) * 8 <= 8 * kinds.MOST_BYTES for one in chosen)


def test_kinds_of_the_two_pass_path() -> None:
    limits = DEVICES["h200"].arguments()
    chosen = kinds.choose(limits, two_pass=True)
    assert not kinds.missing(chosen, limits, two_pass=True)
    assert {str(kind) for one in chosen for kind in one.kinds} == {
        f"{direction} {layout} two_pass{splits}"
        for direction in ("forward", "backward")
        for layout in ("channels_first", "channels_last")
        for splits in ("", " splits")
    }


def test_a_kind_without_a_case_is_missing() -> None:
    limits = DEVICES["h200"].arguments()
    chosen = [one for one in kinds.choose(limits) if all(kind.group != "cluster" for kind in one.kinds)]
    assert "backward packed cluster" in kinds.missing(chosen, limits)
    assert not any(
        "cluster" in kind for kind in kinds.missing(chosen, {**limits, "max_cluster": 0}) if "virtual" not in kind
    )


@pytest.mark.cuda
def test_kinds_run_as_planned() -> None:
    chosen = kinds.choose(ops.device_limits(0), most_bytes=1 << 16)
    assert {kind.group for one in chosen for kind in one.kinds} >= {"cta", "cluster", "grid"}
    for one in chosen:
        assert not kinds.demoted(one, one.case.inputs("cuda")), one.case


def test_a_kind_that_did_not_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """If fewer CTAs fit under a tool than the plan expects, the tool checks other kernels."""
    kind = kinds.Kind("forward_train", "channels_first", "grid")
    two_pass = kinds.Kind("backward_train", "channels_first", "two_pass")
    one = kinds.Chosen(Case("normal", (2, 3, 4)), (kind, two_pass))
    for nodes, wrong in ((1, [two_pass]), (3, [kind])):
        monkeypatch.setattr(kinds, "nodes", lambda call, nodes=nodes: nodes)
        assert kinds.demoted(one, one.case.inputs()) == wrong


# ---- the micro-measurements


def nvcc() -> Path:
    try:
        return device_code.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_micro_compiles(tmp_path: Path) -> None:
    """Compiles to PTX (seconds): the barriers are those of the package, and the forward is its source."""
    words = [nvcc(), *device_code.TORCH_FLAGS, "-O0", "-Xcicc", "-O0", "-arch=compute_90", "-ptx"]
    done = subprocess.run(
        [*map(str, words), str(ROOT / "bench" / "tools" / "micro.cu"), "-o", str(tmp_path / "micro.ptx")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    text = (tmp_path / "micro.ptx").read_text()
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry|\Z)", text, re.DOTALL))
    of = {
        name: "".join(body for entry, body in entries.items() if name in entry)
        for name in ("group_barriers", "cluster_barriers")
    }
    assert "atom.add.acq_rel.gpu" in of["group_barriers"]
    assert "barrier.cluster.arrive.release" in of["cluster_barriers"]
    assert len([entry for entry in entries if "stamped_forward" in entry]) == 3
    # Per layout: begin, end, both ends of the exchange, end of the stores; and both ends of four barriers: two of an
    # exchange through memory, one of an exchange on chip, and the last one of a cluster.
    assert text.count("%globaltimer") == 3 * 2
    assert len(re.findall(r"^\tclock64,", text, re.MULTILINE)) == 3 * (5 + 8)


def test_points_are_those_of_the_kernel() -> None:
    text = (ROOT / "bench" / "tools" / "micro_stamps.cuh").read_text()
    names = re.search(r"enum Point : int \{ (.*?) \}", text)
    assert names is not None
    ours = [re.sub("(?<!^)([A-Z])", r"_\1", name.removeprefix("k")).upper() for name in names[1].split(", ")]
    assert [getattr(phases, name) for name in ours] == list(range(len(ours)))


def test_arguments_of_a_plan() -> None:
    """Plans of each kind of group yield as many arguments as micro.cu reads."""
    text = (ROOT / "bench" / "tools" / "micro.cu").read_text()
    last = max(int(number) for number in re.findall(r"number\((\d+)\)", text))
    limits = DEVICES["h100"].arguments()
    groups = set()
    for problem in micro.PROBLEMS:
        plan = ops.plan(*problem, "bfloat16", "forward_train", aligned=True, **limits)
        words = micro.words_of(plan, problem)
        assert len(words) == last + 1 and words[3] in kinds.LAYOUTS
        persistent = plan["persistent"]
        assert (
            persistent["partition"]["channel_tiles"] > persistent["groups"]
        )  # several rounds, so that CTAs can overlap
        groups.add((words[3], persistent["group"]))
    assert groups == {
        ("channels_first", "cta"),
        ("channels_first", "cluster"),
        ("channels_first", "grid"),
        ("packed", "cluster"),
        ("channels_last", "grid"),
    }


def block(multiprocessor: int, start: int, idle: int, moves: int, rounds: int = 10) -> phases.Block:
    """A CTA that from `start` on loads for `moves`, waits for `idle` and stores for `moves`; a clock of 2 GHz."""
    stamps = [(phases.BEGIN, start)]
    clock = start
    for _ in range(rounds):
        for point, length in (
            (phases.EXCHANGES, moves),
            (phases.WAITS, 0),
            (phases.HAS_WAITED, idle),
            (phases.HAS_EXCHANGED, 0),
            (phases.HAS_STORED, moves),
        ):
            clock += length
            stamps.append((point, clock))
    stamps.append((phases.END, clock))
    return phases.Block(multiprocessor, start // 2, clock // 2, stamps)


def test_ctas_in_step_do_not_overlap() -> None:
    result = phases.summary([block(0, 0, 2000, 1000), block(0, 0, 2000, 1000), block(1, 0, 2000, 1000)])
    assert result["phases_us"] == {"load": 0.5, "partials": 0, "barrier": 1.0, "combine": 0, "store": 0.5, "leave": 0}
    assert (result["multiprocessors_with_two"], result["block_idle"]) == (1, 0.5)
    assert (result["none_moves"], result["one_moves"], result["both_move"]) == (0.5, 0, 0.5)
    assert result["none_if_independent"] == 0.25


def test_alternating_ctas_overlap() -> None:
    result = phases.summary([block(0, 0, 2000, 1000), block(0, 2000, 2000, 1000)])
    # The first waits from 1000 to 3000, and the other moves from 2000 on.
    assert result["none_moves"] < 0.06 and result["one_moves"] > 0.9


def test_an_impossible_order_of_points_raises() -> None:
    wrong = phases.Block(0, 0, 1, [(phases.BEGIN, 0), (phases.HAS_STORED, 1)])
    with pytest.raises(KeyError):
        phases.summary([wrong])


PROGRAM = """#!/bin/sh
case $1 in
  barrier) echo '{"what": "barrier", "group_size": 2}'; echo '{"what": "barrier", "group_size": 4}' ;;
  cluster) echo 'no clusters here' >&2; exit 1 ;;
  launch) echo 'not JSON' ;;
  runs) sleep 5 ;;
esac
"""


def test_a_measurement_that_fails_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other measurements run and are written."""

    def compile_fake(arch: str, program: Path) -> None:
        program.write_text(PROGRAM)
        program.chmod(0o755)

    class Properties:
        name, major, minor, multi_processor_count = "fake", 9, 0, 132

    monkeypatch.setattr(micro, "compile_micro", compile_fake)
    monkeypatch.setattr(micro, "LIMIT", 0.2)
    monkeypatch.setattr(micro.device_code, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(micro.device_code, "ROOT", tmp_path)
    (tmp_path / "build" / "gpu").mkdir(parents=True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    out = tmp_path / "micro.json"
    assert micro.main(["--out", str(out), "--only", "barrier,cluster,launch,runs"]) == 1
    device, *lines = json.loads(out.read_text())
    assert device["multiprocessors"] == 132
    assert [(line["what"], "failed" in line) for line in lines] == [
        ("barrier", False),
        ("barrier", False),
        ("cluster", True),
        ("launch", True),
        ("runs", True),
    ]
    assert "no clusters here" in lines[2]["failed"] and "timed out after" in lines[4]["failed"]


def test_results_page_matches_the_sources() -> None:
    """bench/results/README.md names every step and measurement, and only constants that exist."""
    from bench.stages import STAGES

    page = (ROOT / "bench" / "results" / "README.md").read_text()
    for stage, (seconds, steps) in STAGES.items():
        assert f"## {stage}: {seconds} s" in page
        assert all(re.search(rf"`(\*-)?{step.name}(\.\w+)?`", page) for step in steps), stage
    assert all(f"| `{name}` |" in page for name in micro.NAMES)
    source = (ROOT / "csrc" / "plan" / "persistent.cpp").read_text() + (ROOT / "csrc" / "plan" / "plan.h").read_text()
    assert all(name in source for name in re.findall(r"`(k[A-Z]\w+)`", page))
