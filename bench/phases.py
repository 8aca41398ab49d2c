"""What the clocks of `micro phases` say: how long a block's phases take, and whether two blocks on a multiprocessor
fill each other's gaps. Standard library only.

While a block loads or stores it moves memory; from the start of its exchange to the end it does not. Two blocks on a
multiprocessor hide each other as far as the one moves while the other does not. If they knew nothing of each other, and
each stood still for a share w of its time, both would for w * w; in step they do for w.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

# Point of micro_stamps.cuh.
BEGIN, EXCHANGES, WAITS, HAS_WAITED, HAS_EXCHANGED, HAS_STORED, END = range(7)

# A phase is what lies between two points that follow each other.
PHASES: dict[tuple[int, int], str] = {
    (BEGIN, EXCHANGES): "load",  # and the block's own reduction
    (HAS_STORED, EXCHANGES): "load",
    (EXCHANGES, WAITS): "tell",
    (WAITS, HAS_WAITED): "barrier",
    (HAS_WAITED, WAITS): "join",  # between the two barriers of a divided exchange
    (HAS_WAITED, HAS_EXCHANGED): "join",
    (EXCHANGES, HAS_EXCHANGED): "join",  # of a block alone
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
        """Name, start and end by the clock. KeyError for points in an order that the kernel does not have."""
        for (point, start), (following, end) in pairwise(self.stamps):
            yield PHASES[point, following], start, end


def clocks_per_us(blocks: Iterable[Block]) -> float:
    """Of the multiprocessors' clock, by the device's."""
    clocks = nanoseconds = 0
    for block in blocks:
        clocks += block.stamps[-1][1] - block.stamps[0][1]
        nanoseconds += block.end_ns - block.begin_ns
    return clocks / nanoseconds * 1e3


def moving_shares(blocks: Sequence[Block]) -> tuple[float, float, float]:
    """Of the time from the first start to the last end of one multiprocessor's blocks: when none, one, several move."""
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
    """Medians of the phases in microseconds, of one round of a block; and the shares, over multiprocessors with two."""
    rate = clocks_per_us(blocks)
    times: dict[str, list[float]] = {}
    still = []
    for block in blocks:
        of_block: dict[str, float] = {}
        for name, start, end in block.phases():
            times.setdefault(name, []).append((end - start) / rate)
            of_block[name] = of_block.get(name, 0) + end - start
        still.append(1 - sum(of_block.get(name, 0) for name in MOVING) / sum(of_block.values()))
    by_place: dict[int, list[Block]] = {}
    for block in blocks:
        by_place.setdefault(block.multiprocessor, []).append(block)
    pairs = [moving_shares(pair) for pair in by_place.values() if len(pair) == 2]
    result: dict[str, Any] = {
        "phases_us": {name: round(median(values), 3) for name, values in times.items()},
        "one_block_stands_still": round(mean(still), 4),
        "multiprocessors_with_two": len(pairs),
    }
    if pairs:
        none, one, several = (mean(share) for share in zip(*pairs))
        result |= {"none_moves": round(none, 4), "one_moves": round(one, 4), "both_move": round(several, 4)}
        result["none_if_independent"] = round(mean(still) ** 2, 4)
    return result
