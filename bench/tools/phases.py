"""Evaluates the clocks of `micro phases`: the duration of the phases of a CTA, and whether two CTAs on a multiprocessor
overlap loads and stores with each other's exchanges. Standard library only.

A CTA moves memory while it loads or stores, and is idle during the exchange. If two CTAs on a multiprocessor are each
idle for a fraction w of the time, both are idle at once for w * w if independent, and for w if they run in step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

# enum Point of micro_stamps.cuh.
BEGIN, EXCHANGES, WAITS, HAS_WAITED, HAS_EXCHANGED, HAS_STORED, END = range(7)

# A phase is the time between two consecutive points.
PHASES: dict[tuple[int, int], str] = {
    (BEGIN, EXCHANGES): "load",  # and the reduction within the CTA
    (HAS_STORED, EXCHANGES): "load",
    (EXCHANGES, WAITS): "partials",
    (WAITS, HAS_WAITED): "barrier",
    (HAS_WAITED, WAITS): "combine",  # between the two barriers of a two-shot exchange
    (HAS_WAITED, HAS_EXCHANGED): "combine",
    (EXCHANGES, HAS_EXCHANGED): "combine",  # without a barrier: one CTA
    (HAS_EXCHANGED, HAS_STORED): "store",
    (HAS_STORED, WAITS): "leave",  # the last barrier of a cluster
    (HAS_WAITED, END): "leave",
    (HAS_STORED, END): "leave",
}
MOVING = ("load", "store")


@dataclass(frozen=True)
class Block:
    multiprocessor: int
    begin_ns: int
    end_ns: int
    stamps: Sequence[tuple[int, int]]  # point, clock

    @classmethod
    def of(cls, line: dict[str, Any]) -> Block:
        return cls(line["sm"], line["begin_ns"], line["end_ns"], [(point, clock) for point, clock in line["stamps"]])

    def phases(self) -> Iterator[tuple[str, int, int]]:
        """Name, start clock and end clock. KeyError for an order of points that the kernel does not have."""
        for (point, start), (following, end) in pairwise(self.stamps):
            yield PHASES[point, following], start, end


def clocks_per_us(blocks: Iterable[Block]) -> float:
    """Rate of the multiprocessors' clock, by the device's nanoseconds."""
    clocks = nanoseconds = 0
    for block in blocks:
        clocks += block.stamps[-1][1] - block.stamps[0][1]
        nanoseconds += block.end_ns - block.begin_ns
    return clocks / nanoseconds * 1e3


def moving_fractions(blocks: Sequence[Block]) -> tuple[float, float, float]:
    """Fractions of the time from first start to last end in which no, one, several CTAs move memory."""
    changes = []
    for block in blocks:
        changes.append((block.stamps[0][1], 0))
        changes.append((block.stamps[-1][1], 0))
        for name, start, end in block.phases():
            if name in MOVING:
                changes += [(start, 1), (end, -1)]
    changes.sort()
    spent = [0, 0, 0]
    moving = 0
    for (start, change), (end, _) in pairwise(changes):
        moving += change
        spent[min(moving, 2)] += end - start
    none, one, several = (time / max(1, sum(spent)) for time in spent)
    return none, one, several


def summary(blocks: Sequence[Block]) -> dict[str, Any]:
    """Median microseconds of each phase per round; moving_fractions, averaged over multiprocessors with two CTAs."""
    rate = clocks_per_us(blocks)
    times: dict[str, list[float]] = {}
    idle = []
    for block in blocks:
        of_block: dict[str, float] = {}
        for name, start, end in block.phases():
            times.setdefault(name, []).append((end - start) / rate)
            of_block[name] = of_block.get(name, 0) + end - start
        idle.append(1 - sum(of_block.get(name, 0) for name in MOVING) / sum(of_block.values()))
    by_place: dict[int, list[Block]] = {}
    for block in blocks:
        by_place.setdefault(block.multiprocessor, []).append(block)
    pairs = [moving_fractions(pair) for pair in by_place.values() if len(pair) == 2]
    result: dict[str, Any] = {
        "phases_us": {name: round(median(values), 3) for name, values in times.items()},
        "block_idle": round(mean(idle), 4),
        "multiprocessors_with_two": len(pairs),
    }
    if pairs:
        none, one, several = (mean(share) for share in zip(*pairs))
        result |= {"none_moves": round(none, 4), "one_moves": round(one, 4), "both_move": round(several, 4)}
        result["none_if_independent"] = round(mean(idle) ** 2, 4)
    return result
