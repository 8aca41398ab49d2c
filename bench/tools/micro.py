"""Measures the constants of the plan: compiles bench/tools/micro.cu for the present GPU and runs it.

    python -m bench.tools.micro [--out FILE.json] [--only barrier,phases]

Results are written after each measurement; a failed one is recorded, and the next one runs. bench/results/README.md
explains what each figure decides. Exit code 0: measured; 1: some failed; 2: the program does not compile; 77: no nvcc.
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

from ..files import replace_text
from . import device_code, phases

SKIPPED = 77
LIMIT = 30  # seconds per measurement
NAMES = ("barrier", "cluster", "launch", "runs", "phases")

Line = dict[str, Any]
Problem = tuple[int, int, int]  # outer, channels, inner (csrc/core/problem.h)

# Problems of the phases measurement, in bfloat16. On an H100 their groups are: channels-first a CTA, a cluster and a
# grid group; packed a cluster; channels-last grid groups of 31 and of all CTAs. Each group processes several channel
# tiles.
PROBLEMS: tuple[Problem, ...] = (
    (256, 1024, 196),
    (256, 512, 784),
    (256, 64, 12544),
    (256, 2048, 49),
    (256 * 196, 1024, 1),
    (256 * 784, 512, 1),
)


def compile_micro(arch: str, program: Path, flags: Sequence[str] = ()) -> None:
    """RuntimeError without nvcc, or if it does not compile."""
    root = device_code.ROOT
    program.parent.mkdir(parents=True, exist_ok=True)
    target = f"arch=compute_{arch.removeprefix('sm_')},code={arch}"
    sources = [root / "bench" / "tools" / "micro.cu", *sorted((root / "csrc" / "plan").glob("*.cpp"))]
    command = [device_code.find_nvcc(), *device_code.CODE_FLAGS, *device_code.TORCH_FLAGS, f"-gencode={target}"]
    command += ["-lineinfo", "--split-compile=0", *flags, *sources, "-o", program]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"bench/tools/micro.cu does not compile for {arch}:\n{done.stdout}")


def run(program: Path, words: Sequence[str]) -> list[Line]:
    """The lines of one measurement. RuntimeError with its stderr if it fails."""
    try:
        done = subprocess.run([str(program), *words], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"timed out after {LIMIT} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip() or 'nothing on stderr'}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def words_of(plan: dict[str, Any], problem: Problem) -> list[str]:
    """A persistent plan (ops.plan) as arguments of `micro phases`."""
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
    """One line on how the CTAs of a plan spend their time on a problem."""
    from bnkernels import _ops as ops

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
    """Bytes that one CTA of a multiprocessor moves per microsecond: the unit of the plan's costs."""
    return copy_gb_per_s * 1e3 / (multiprocessors * blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(
        prog="python -m bench.tools.micro", description="Measures the constants of the plan."
    )
    parse.add_argument("--out", type=Path, metavar="FILE", help="write the lines to this file as JSON")
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
