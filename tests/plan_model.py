"""What a plan says, worked out again in Python: for the tests of csrc/plan_*.cpp.

Whole numbers of any size, and the walk of csrc/kernels/walkers.cuh thread by thread for problems small enough to count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bnkernels import ops
from bnkernels.explain.devices import NAMED, Limits

VECTOR_BYTES = 16
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
TENSORS_READ = {"forward_train": 1, "forward_eval": 1, "backward_train": 2, "backward_eval": 2}
TRAINING = ("forward_train", "backward_train")

# One of each kind: all compute capabilities, cards of many and of few multiprocessors, slices of both generations.
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
    """[outer][channels][inner] of a dtype; aligned: it starts on a vector boundary."""

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
        """Elements of a window."""
        return VECTOR_BYTES // BYTES[self.dtype]

    @property
    def windows(self) -> int:
        """Of a row, walked channels-first: wherever it starts, or, if all rows start on a boundary, from there."""
        starts = 1 if self.aligned and self.inner % self.vector == 0 else self.vector
        return max(ceil_div(start + self.inner, self.vector) for start in range(starts))

    def units(self, layout: str) -> int:
        """Of a slab, which chunks divide."""
        return self.outer * self.windows if layout == "channels_first" else self.outer

    def plan(self, pass_: str, limits: Limits, force_streaming: bool = False) -> dict[str, Any]:
        return ops.plan(
            self.outer,
            self.channels,
            self.inner,
            self.dtype,
            pass_,
            self.aligned,
            **limits.arguments(),
            force_streaming=force_streaming,
        )


def step(walk: dict[str, Any], block: int) -> int:
    """Units of a chunk that a block takes at a time."""
    return block if walk["layout"] == "channels_first" else block // int(walk["lanes"])


def chunk_sizes(problem: Problem, walk: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(how many, units) of the chunks of a slab: all but the last, and the last."""
    units = problem.units(walk["layout"])
    yield walk["chunks"] - 1, walk["chunk_size"]
    yield 1, units - (walk["chunks"] - 1) * walk["chunk_size"]


def units_not_kept(problem: Problem, resident: dict[str, Any]) -> int:
    """Of one slab."""
    room = resident["kept"] * step(resident["walk"], resident["block"])
    return sum(count * max(0, size - room) for count, size in chunk_sizes(problem, resident["walk"]))


def thread_windows(
    problem: Problem, walk: dict[str, Any], block: int, slab: int, chunk: int, thread: int, phase: int
) -> Iterator[tuple[int, int]]:
    """[first, last) elements of each window of a thread in a share, as Walker has them; phase: of element 0."""
    units = problem.units(walk["layout"])
    size = min(walk["chunk_size"], units - chunk * walk["chunk_size"])
    first = chunk * walk["chunk_size"]
    if walk["layout"] == "channels_first":
        for at in range(thread, size, block):
            row, window = divmod(first + at, walk["windows"])
            start = (row * problem.channels + slab) * problem.inner
            in_row = window * problem.vector - (phase + start) % problem.vector
            yield start + max(in_row, 0), start + min(in_row + problem.vector, problem.inner)
        return
    step_ = block // walk["lanes"]
    rank, lane = divmod(thread, walk["lanes"])
    columns = problem.channels * problem.inner
    column = (slab * walk["lanes"] + lane) * problem.vector
    if rank >= step_ or column >= columns:
        return
    for row in range(first + rank, first + size, step_):
        yield row * columns + column, row * columns + min(column + problem.vector, columns)


def owners(problem: Problem, walk: dict[str, Any], block: int, phase: int = 0) -> Counter[int]:
    """How many windows hold each element, over all shares and threads. A resident plan has one block to each share."""
    count: Counter[int] = Counter()
    for slab in range(walk["slabs"]):
        for chunk in range(walk["chunks"]):
            for thread in range(block):
                for first, last in thread_windows(problem, walk, block, slab, chunk, thread, phase):
                    count.update(range(first, last))
    return count


def slabs_of_groups(resident: dict[str, Any]) -> Counter[int]:
    """How often each slab is taken: group g takes g, g + groups, ..."""
    slabs = resident["walk"]["slabs"]
    return Counter(slab for group in range(resident["groups"]) for slab in range(group, slabs, resident["groups"]))
