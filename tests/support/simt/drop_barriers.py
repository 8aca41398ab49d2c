"""Drops each synchronisation of the kernels and checks that the tests fail: `python
tests/support/simt/drop_barriers.py`.

A barrier whose removal goes unnoticed is either untested or unnecessary. Each call of a synchronising primitive found
in the source is skipped in every launch, in the plain build and under ThreadSanitizer, in runs like those of
tests/cuda/test_simt.py and test_simt_persistent.py: seeds that must not change a bit, the tolerance (poisoned memory
gives NaN), and the race detector. Prints a table; exits with 1 if a dropped call goes unnoticed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from bnkernels.testing import Case, judge_call  # noqa: E402
from simt.persistent_cases import CLUSTER, ONE_SHOT, SINGLE_CTA, TWO_SHOT  # noqa: E402
from simt.plans import Persistent  # noqa: E402
from simt.server import Failure, How, Server  # noqa: E402

# Any primitive with such a name: block_barrier and similar.
SYNCHRONISATION = re.compile(r"\b\w*(barrier|wait)\w*(<[^;(]*>)?\([^;{]*\);")

FIRST = "offset_1e2/2x69x301/float32/contiguous/normal/normal/train"
LAST = "offset_1e2/2x69x301/bfloat16+float32/channels_last/normal/normal/train"
PACKED = "offset_1e2/9x24x7x7/bfloat16+float32/contiguous/normal/normal/train"
# Every block has several work tiles, channel tiles or groups of channels, and work for each of its warps.
HOW = How(block=64, finalize_block=64, grid=2)
CASES = [(FIRST, replace(HOW, splits=2), False), (LAST, replace(HOW, splits=5), True)]
for name, layout, threads_c, last in (
    (FIRST, "channels_first", 1, False),
    (LAST, "channels_last", 4, True),
    (PACKED, "packed", 49, False),
):
    for group_size, way in ((1, SINGLE_CTA), (3, CLUSTER), (3, ONE_SHOT), (3, TWO_SHOT)):
        CASES.append((name, How(persistent=Persistent(layout, 64, group_size, 1, 4, threads_c, **way)), last))
# Whether a missing barrier changes a bit depends on the seed, so many seeds; the race detector needs only one.
SEEDS = {"plain": range(20), "tsan": range(1)}
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
    """Every call in the kernels. The primitives' own files, which declare them, are skipped."""
    for path in sorted(kernels.glob("*.cuh")):
        if path.name.startswith("primitives"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = SYNCHRONISATION.search(line.partition("//")[0])
            if found:
                yield Call(path.name, number, found[0])


def seen_by(name: str, call: Call | None) -> str:
    """How the tests, with run_kernels in this build, notice the dropped call; empty if they do not."""
    server = Server(name)
    try:
        for case, how, channels_last in CASES:
            inputs = Case.parse(case).inputs()
            how = replace(how, seeds=SEEDS[name], without=None if call is None else (None, str(call)))
            run = server.call(inputs, how, channels_last=channels_last)
            beyond = [error_report.quantity for error_report in judge_call(inputs, run.outputs) if not error_report.ok]
            if beyond:
                return f"{', '.join(beyond)} beyond the tolerance"
    except Failure as failure:
        return summary(str(failure))
    finally:
        server.kill()
    return ""


def summary(failure: str) -> str:
    """One line of a failure: its first line, or ThreadSanitizer's line with the kernel."""
    if "data race" not in failure:
        kind, _, rest = failure.partition(" ")
        seed, *what = rest.split()
        return f"{kind} with seed {seed} in {what[0]}" if kind == "differs" else failure.splitlines()[0]
    place = re.search(r"(?:device|kernels)/(\w+\.cuh:\d+)", failure)
    return f"data race at {place[1] if place else '?'}"


def table() -> list[tuple[Call | None, dict[str, str]]]:
    """How each build reports the unmodified kernels (None) and each dropped call."""
    every = [None, *calls(ROOT / "csrc" / "cuda")]
    return [(call, {name: seen_by(name, call) for name in BUILDS}) for call in every]


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
