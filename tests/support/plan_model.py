"""A second implementation of plans in Python, for the tests of csrc/plan.

Integers of any size, and the partition of csrc/cuda/device/tile_iterator.cuh thread by thread, for problems small
enough to enumerate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bnkernels import _ops as ops
from bnkernels.explain.devices import NAMED, Limits

VECTOR_BYTES = 16
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
TENSORS_READ = {"forward_train": 1, "forward_eval": 1, "backward_train": 2, "backward_eval": 2}
TRAINING = ("forward_train", "backward_train")

# One of each kind: all compute capabilities, cards with many and few multiprocessors, MIG slices of both generations.
DEVICES = {
    name: NAMED[name].limits
    for name in (
        "t4",
        "a10",
        "a100",
        "a100-3g.20gb",
        "l4",
        "h100",
        "h100-1g.10gb",
        "h200",
        "b200",
        "rtx4090",
        "rtx5090",
    )
}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Problem:
    """A tensor [outer][channels][inner] of a dtype. aligned: it starts on a vector boundary."""

    outer: int
    channels: int
    inner: int
    dtype: str
    aligned: bool = True

    @property
    def bytes(self) -> int:
        return self.outer * self.channels * self.inner * BYTES[self.dtype]

    @property
    def vector(self) -> int:
        """Elements per vector."""
        return VECTOR_BYTES // BYTES[self.dtype]

    @property
    def row_vectors(self) -> int:
        """Vectors per row in the channels-first layout: for the worst start of a row, or, if all rows start on a vector
        boundary, for that start."""
        starts = 1 if self.aligned and self.inner % self.vector == 0 else self.vector
        return max(ceil_div(start + self.inner, self.vector) for start in range(starts))

    def units(self, layout: str) -> int:
        """Units of a channel tile, which the splits divide."""
        return self.outer * self.row_vectors if layout == "channels_first" else self.outer

    def plan(self, pass_: str, limits: Limits, force_two_pass: bool = False) -> dict[str, Any]:
        return ops.plan(
            self.outer,
            self.channels,
            self.inner,
            self.dtype,
            pass_,
            self.aligned,
            **limits.arguments(),
            force_two_pass=force_two_pass,
        )


def step(partition: dict[str, Any], block: int) -> int:
    """Units of a split that a CTA processes per iteration."""
    return block if partition["layout"] == "channels_first" else block // int(partition["threads_c"])


def split_sizes(problem: Problem, partition: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(count, units) of the splits of a channel tile: all but the last, and the last."""
    units = problem.units(partition["layout"])
    yield partition["splits"] - 1, partition["split_size"]
    yield 1, units - (partition["splits"] - 1) * partition["split_size"]


def units_not_cached(problem: Problem, persistent: dict[str, Any]) -> int:
    """Units of one channel tile that are not cached."""
    room = persistent["cached_vectors"] * step(persistent["partition"], persistent["block"])
    return sum(count * max(0, size - room) for count, size in split_sizes(problem, persistent["partition"]))


def thread_vectors(
    problem: Problem, partition: dict[str, Any], block: int, channel_tile: int, split: int, thread: int, phase: int
) -> Iterator[tuple[int, int]]:
    """[first, last) elements of each vector of a thread in a work tile, as in TileIterator. phase: of element 0."""
    units = problem.units(partition["layout"])
    size = min(partition["split_size"], units - split * partition["split_size"])
    first = split * partition["split_size"]
    if partition["layout"] == "channels_first":
        for at in range(thread, size, block):
            row, vector = divmod(first + at, partition["row_vectors"])
            start = (row * problem.channels + channel_tile) * problem.inner
            in_row = vector * problem.vector - (phase + start) % problem.vector
            yield start + max(in_row, 0), start + min(in_row + problem.vector, problem.inner)
        return
    step_ = block // partition["threads_c"]
    rank, thread_c = divmod(thread, partition["threads_c"])
    columns = problem.channels * problem.inner
    column = (channel_tile * partition["threads_c"] + thread_c) * problem.vector
    if rank >= step_ or column >= columns:
        return
    for row in range(first + rank, first + size, step_):
        yield row * columns + column, row * columns + min(column + problem.vector, columns)


def owners(problem: Problem, partition: dict[str, Any], block: int, phase: int = 0) -> Counter[int]:
    """How many vectors hold each element, over all work tiles and threads. Persistent plans: one CTA per work tile."""
    count: Counter[int] = Counter()
    for channel_tile in range(partition["channel_tiles"]):
        for split in range(partition["splits"]):
            for thread in range(block):
                for first, last in thread_vectors(problem, partition, block, channel_tile, split, thread, phase):
                    count.update(range(first, last))
    return count


def channel_tiles_of_groups(persistent: dict[str, Any]) -> Counter[int]:
    """How often each channel tile is processed: group g takes tiles g, g + groups, ..."""
    channel_tiles = persistent["partition"]["channel_tiles"]
    return Counter(
        channel_tile
        for group in range(persistent["groups"])
        for channel_tile in range(group, channel_tiles, persistent["groups"])
    )
