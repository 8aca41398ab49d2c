"""Small measurements that the plan's constants rest on: compiles bench/micro.cu for the GPU at hand and runs it.

    python -m bench.micro [--out FILE.json] [--only barrier,phases]

Results are written after each measurement; one that fails is recorded, and the next one run. What each figure decides:
bench/results/README.md. Exit code: 0 measured; 1 some were not; 2 it does not compile; 77 there is no nvcc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import device_code, phases
from .files import replace_text

SKIPPED = 77
LIMIT = 30  # seconds of a measurement
NAMES = ("barrier", "cluster", "launch", "runs", "phases")

Line = dict[str, Any]
Problem = tuple[int, int, int]  # outer, channels, inner (csrc/core/problem.h)

# Whose phases are measured, in bfloat16. On an H100 these are channels-first of a block alone, of a cluster and of a
# virtual one, packed of a cluster, channels-last of virtual ones of 31 members and of all blocks; each in rounds.
PROBLEMS: tuple[Problem, ...] = (
    (256, 1024, 196),
    (256, 512, 784),
    (256, 64, 12544),
    (256, 2048, 49),
    (256 * 196, 1024, 1),
    (256 * 784, 512, 1),
)


def compile_micro(arch: str, program: Path, flags: Sequence[str] = ()) -> None:
    """RuntimeError where there is no nvcc, or it does not compile."""
    root = device_code.ROOT
    program.parent.mkdir(parents=True, exist_ok=True)
    target = f"arch=compute_{arch.removeprefix('sm_')},code={arch}"
    sources = [root / "bench" / "micro.cu", *sorted((root / "csrc" / "plan").glob("*.cpp"))]
    command = [device_code.find_nvcc(), *device_code.CODE_FLAGS, *device_code.TORCH_FLAGS, f"-gencode={target}"]
    command += ["-lineinfo", "--split-compile=0", *flags, *sources, "-o", program]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"bench/micro.cu does not compile for {arch}:\n{done.stdout}")


def run(program: Path, words: Sequence[str]) -> list[Line]:
    """The lines that a measurement prints. RuntimeError where it fails, with what it said."""
    try:
        done = subprocess.run([str(program), *words], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end within {LIMIT} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip() or 'nothing on stderr'}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def words_of(plan: dict[str, Any], problem: Problem) -> list[str]:
    """A persistent plan (ops.plan) as `micro phases` takes it."""
    persistent = plan["persistent"]
    partition = persistent["partition"]
    numbers = [
        partition["threads_c"],
        persistent["block"],
        persistent["group_size"],
        persistent["groups"],
        persistent["cached_vectors"],
    ]
    numbers += [int(persistent["two_shot"]), int(persistent["group"] == "cluster")]
    return [*map(str, problem), partition["layout"], *map(str, numbers)]


def measure_phases(program: Path, problem: Problem) -> list[Line]:
    """How a plan's blocks spend their time on a problem, in one line."""
    from bnkernels import ops

    plan = ops.plan(*problem, "bfloat16", "forward_train", aligned=True, **ops.device_limits(0))
    persistent = plan["persistent"]
    if persistent is None:
        return [{"what": "phases", "problem": list(problem), "group": "none: the two-pass path"}]
    whole, *blocks = run(program, ["phases", *words_of(plan, problem)])
    chosen = {
        name: persistent[name] for name in ("group", "group_size", "groups", "cached_vectors", "block", "two_shot")
    }
    return [
        {"what": "phases", "problem": list(problem), "layout": persistent["partition"]["layout"], **chosen}
        | {name: whole[name] for name in ("us", "rounds")}
        | phases.summary([phases.Block.of(line) for line in blocks])
    ]


def block_bytes_per_us(copy_gb_per_s: float, multiprocessors: int, blocks: int = 2) -> float:
    """What one of the blocks of a multiprocessor moves in a microsecond: the unit of the plan's costs."""
    return copy_gb_per_s * 1e3 / (multiprocessors * blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m bench.micro", description="What the plan's constants rest on.")
    parse.add_argument("--out", type=Path, metavar="FILE", help="write the lines there as JSON")
    parse.add_argument("--only", default=",".join(NAMES), metavar="M,..", help=f"of {', '.join(NAMES)}")
    options = parse.parse_args(arguments)
    try:
        device_code.find_nvcc()
    except RuntimeError as error:
        print(error)
        return SKIPPED
    import torch

    properties = torch.cuda.get_device_properties(0)
    program = device_code.ROOT / "build" / "gpu" / "micro"
    try:
        compile_micro(f"sm_{properties.major}{properties.minor}", program)
    except RuntimeError as error:
        print(error)
        return 2

    lines: list[Line] = [
        {"what": "device", "name": properties.name, "multiprocessors": properties.multi_processor_count}
    ]
    wanted = options.only.split(",")
    steps: list[tuple[str, Callable[[], list[Line]]]] = [(name, partial(run, program, [name])) for name in NAMES[:-1]]
    steps += [("phases", partial(measure_phases, program, problem)) for problem in PROBLEMS]
    failed = False
    for name, step in steps:
        if name not in wanted:
            continue
        try:
            made = step()
        except (RuntimeError, ValueError, KeyError) as error:
            failed = True
            made = [{"what": name, "failed": f"{type(error).__name__}: {error}"}]
        lines += made
        for line in made:
            print(json.dumps(line), flush=True)
        if options.out is not None:
            replace_text(options.out, "[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
