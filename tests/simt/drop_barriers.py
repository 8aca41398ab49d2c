"""Removes each synchronisation of the kernels in turn, and sees the tests fail: `python tests/simt/drop_barriers.py`.

A barrier that can go unseen is one that the tests do not test, or one that the kernels do not need. For each call of a
primitive that synchronises, a copy of the kernels without that call is built plain and under ThreadSanitizer, and runs
what tests/test_simt.py runs: seeds that must not change a bit, the gate (poisoned shared memory gives NaN), and the
race detector. Prints a table; exits with 1 if a dropped call goes unseen.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bnkernels.testing import Case, judge_call  # noqa: E402
from simt import build  # noqa: E402
from simt.server import Failure, How, Server  # noqa: E402

# Any primitive named like one: block_barrier, and what later issues may add.
SYNCHRONISATION = re.compile(r"\b\w*(barrier|wait)\w*(<[^;(]*>)?\([^;{]*\);")

# Every block has several shares, or groups of channels, one after the other, and work for each of its warps.
HOW = How(block=64, finish_block=64, grid=2)
CASES = (
    ("offset_1e2/2x69x301/float32/contiguous/normal/normal/train", replace(HOW, chunks=2), False),
    ("offset_1e2/2x69x301/bfloat16+float32/channels_last/normal/normal/train", replace(HOW, chunks=5), True),
)
# Which bits a missing barrier changes is a matter of luck, so many seeds; the race detector needs none.
SEEDS = {"plain": range(40), "tsan": range(1)}
BUILDS = tuple(SEEDS)


@dataclass(frozen=True)
class Call:
    """One call of a synchronising primitive."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def calls(kernels: Path) -> Iterator[Call]:
    """Every call in the kernels, but not in the primitives, which declare them."""
    for path in sorted(kernels.glob("*.cuh")):
        if path.name.startswith("primitives"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = SYNCHRONISATION.search(line.partition("//")[0])
            if found:
                yield Call(path.name, number, found[0])


def copy_without(call: Call | None, target: Path) -> None:
    """What the programs are compiled from, less one call; lines keep their numbers."""
    for folder in ("csrc", "tests/simt"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "cpu", "cuda"))
    if call is None:
        return
    path = target / "csrc" / "kernels" / call.file
    lines = path.read_text().splitlines(keepends=True)
    assert call.text in lines[call.line - 1]
    lines[call.line - 1] = lines[call.line - 1].replace(call.text, ";", 1)
    path.write_text("".join(lines))


def seen_by(name: str, program: Path) -> str:
    """How the tests, with run_kernels in this build, see that something is wrong; empty: they do not."""
    server = Server(program)
    try:
        for case, how, channels_last in CASES:
            inputs = Case.parse(case).inputs()
            run = server.call(inputs, replace(how, seeds=SEEDS[name]), channels_last=channels_last)
            beyond = [verdict.quantity for verdict in judge_call(inputs, run.outputs) if not verdict.ok]
            if beyond:
                return f"{', '.join(beyond)} beyond the gate"
    except Failure as failure:
        return summary(str(failure))
    finally:
        server.kill()
    return ""


def summary(failure: str) -> str:
    """One line of a failure: its own, or ThreadSanitizer's with the kernel's line."""
    if "data race" not in failure:
        kind, _, rest = failure.partition(" ")
        seed, *what = rest.split()
        return f"{kind} with seed {seed} in {what[0]}" if kind == "differs" else failure.splitlines()[0]
    place = re.search(r"csrc/kernels/(\w+\.cuh:\d+)", failure)
    return f"data race at {place[1] if place else '?'}"


def table(root: Path = ROOT) -> list[tuple[Call | None, dict[str, str]]]:
    """For the kernels as they are (None) and for each call dropped: how each build sees it."""
    rows: list[tuple[Call | None, dict[str, str]]] = []
    for call in (None, *calls(root / "csrc" / "kernels")):
        with tempfile.TemporaryDirectory() as folder:
            copy_without(call, Path(folder))
            programs = build.programs((("run_kernels", name) for name in BUILDS), Path(folder))
            rows.append((call, {name: seen_by(name, programs["run_kernels", name]) for name in BUILDS}))
    return rows


def main() -> int:
    print(f"| dropped | {' | '.join(BUILDS)} |\n|---|{'---|' * len(BUILDS)}")
    good = True
    for call, seen in table():
        print(f"| {call or '(nothing)'} | {' | '.join(seen[name] or '-' for name in BUILDS)} |", flush=True)
        good &= any(seen.values()) if call else not any(seen.values())
    print(
        "every dropped call is seen" if good else "FAILED: a dropped call went unseen, or the kernels fail as they are"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
