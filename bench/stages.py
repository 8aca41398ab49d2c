"""The steps of the two stages of bench/gpu.py, the most valuable first, and their problems in two sizes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """The environment of the steps."""

    gpu: str = ""  # its name; empty: no GPU, for the reason in `why`
    capability: str = ""  # "9.0"
    why: str = ""
    archs: str = ""  # of the built library, "8.0;9.0+PTX"; empty: no library that loads
    current: bool = False  # the library was built from these sources
    fake_cuda: bool = False  # tests/support/fake_cuda emulates the GPU

    @property
    def arch(self) -> str:
        return f"sm_{self.capability.replace('.', '')}" if self.gpu else "sm_90"


# The reason to skip a step, or None.
Need = Callable[[Facts], "str | None"]


def a_gpu(facts: Facts) -> str | None:
    return None if facts.gpu else facts.why


def hardware(facts: Facts) -> str | None:
    emulated = (
        "tests/support/fake_cuda emulates the GPU and runs only the kernels of bnkernels" if facts.fake_cuda else None
    )
    return a_gpu(facts) or emulated


def a_sanitizer(facts: Facts) -> str | None:
    return hardware(facts) or (None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH")


def something_to_build(facts: Facts) -> str | None:
    if facts.fake_cuda:
        return "tests/support/fake_cuda runs the present library"
    fits = facts.archs and (not facts.gpu or facts.capability in re.findall(r"\d+\.\d+", facts.archs))
    if facts.current and fits:
        return f"up to date: the library is of these sources, loads with this torch, and has code for {facts.archs}"
    return None


@dataclass(frozen=True)
class Step:
    """A program with a time limit. gpu.py and SIZES define the {names} in it."""

    name: str
    limit: int  # seconds
    program: str
    needs: Need = a_gpu
    shown: str = r"\S"  # the last line of its output that matches goes into the summary


PYTEST = "{python} -m pytest -v -m 'cuda and not huge' -p no:cacheprovider --tb=short {pytest} "
BENCH = "{python} -m bench --device cuda --quick --json-only --out {results} "
COLD = BENCH + "--providers ours,eager --modes cold --directions forward,backward "
AGAINST = r"^- against"


def _bench(name: str, limit: int, words: str, needs: Need = a_gpu) -> Step:
    return Step(name, limit, f"{words} --name {name}", needs, AGAINST)


def _checked(name: str, tool: str, limit: int, setting: str = "") -> Step:
    program = f"env {setting} compute-sanitizer --tool {tool} {{sanitizer}} {{python}} -m bench.tools.sanitize --kinds"
    return Step(name, limit, program, a_sanitizer, r"calls, forward|ERROR SUMMARY|RACECHECK SUMMARY")


BUILD = Step(
    "build",
    170,
    "env BNKERNELS_LINEINFO=1 {python} setup.py -q build_ext --inplace",
    something_to_build,
    "^bnkernels: building",
)

# Seconds and steps of each stage. A stage writes at most 8 files: JSON, and summary.md, log.txt and ncu.md.
STAGES: dict[str, tuple[int, tuple[Step, ...]]] = {
    "first": (
        240,
        (
            BUILD,
            Step(
                "check",
                40,
                "{python} -m bnkernels.check --device cuda {check} --json {results}/check.json",
                shown=" cases ",
            ),
            Step("kinds", 60, PYTEST + "{workers4} {kinds}"),
            Step("sequences", 45, PYTEST + "{sequences}"),
            _bench("n256-bf16", 70, COLD + "--dtypes bf16 {n256}"),
            Step(
                "ncu",
                40,
                "{python} -m bench.tools.ncu --shapes 64x112x112,1024x14x14 --out {results}/ncu.md",
                hardware,
            ),
            Step("micro", 60, "{python} -m bench.tools.micro --out {results}/micro.json", hardware),
            _bench(
                "nhwc-eval",
                15,
                BENCH
                + "--providers ours,eager --modes cold,warm --directions eval --dtypes bf16 --layouts nhwc {nhwc}",
            ),
        ),
    ),
    "second": (
        400,
        (
            BUILD,
            Step("planted", 40, "bash bench/tools/planted.sh {arch} {build} {sanitizer}", a_sanitizer),
            _checked("memcheck", "memcheck", 60),
            _checked("memcheck-two-pass", "memcheck", 30, "BNKERNELS_PLAN=two_pass"),
            Step("tests", 150, PYTEST + "{workers8} {others}"),
            _bench("n32", 60, COLD + "--dtypes bf16,fp32 {n32}"),
            _bench("n256-fp32", 60, COLD + "--dtypes fp32 {n256}"),
            _checked("synccheck", "synccheck", 40),
            _checked("racecheck", "racecheck", 60),
            _bench(
                "tiny",
                30,
                BENCH
                + "--shapes tiny --batch 2 --providers ours,eager --modes user --directions forward,eval,step {tiny}",
            ),
            _bench("relu", 30, COLD + "--epilogue relu --dtypes bf16 {few}"),
            _bench("add-relu", 30, COLD + "--epilogue add+relu --dtypes bf16 {few}"),
            _bench(
                "compiled",
                120,
                BENCH + "--providers ours,compiled --modes cold --directions step --dtypes bf16 --batch 256",
                hardware,
            ),
        ),
    ),
}

_KINDS = "tests/plan/test_plan_kinds.py tests/cuda/test_cuda_graphs.py tests/cuda/test_cuda_streams.py"
_SEQUENCES = "tests/cuda/test_cuda_sequences.py"
_TOY = "--batch 2 --budget 0.01 --copy-mib 1 --max-ring 2"
SIZES: dict[str, dict[str, str]] = {
    "full": {
        "check": "--quick",
        "kinds": _KINDS,
        "sequences": _SEQUENCES,
        "others": " ".join(["tests", *(f"--ignore={file}" for file in (*_KINDS.split(), _SEQUENCES))]),
        "workers4": "-n 4",
        "workers8": "-n 8",
        "n256": "--shapes resnet50 --batch 256",
        "n32": "--shapes resnet50 --batch 32",
        "nhwc": "--shapes 512x28x28 --batch 32",
        "few": "--batch 256",
        "tiny": "--dtypes fp32,bf16",
    },
    # Smoke test of every step: the smallest problems, and a few tests.
    "tiny": {
        "check": "--case normal/4x3x5x5/bfloat16+float32/contiguous/normal/normal/train",
        "kinds": f"{_KINDS} -k 'current_stream or capture_runs_nothing or 2x3x7x7'",
        "sequences": f"'{_SEQUENCES}::test_sequences[0]'",
        "others": "tests/plan/test_plan.py",
        "workers4": "-n 0",
        "workers8": "-n 0",
        "n256": f"--shapes 3x4x4 {_TOY}",
        "n32": f"--shapes 3x4x4 --layouts nchw {_TOY}",
        "nhwc": f"--shapes 8x3x3 {_TOY}",
        "few": f"--shapes 3x4x4 --layouts nchw {_TOY}",
        "tiny": f"--dtypes fp32 --layouts nchw {_TOY}",
    },
}
