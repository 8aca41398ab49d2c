"""Shared by the tests of the kernels on the host: variants, shapes, servers, and the checks of a run."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from bnkernels.testing import DTYPE_PAIRS, Case, Inputs, assert_within, judge_call, same_bits

from .server import Run, Server

# The engine itself checks every access of global and shared memory; AddressSanitizer adds the rest.
ASAN = pytest.param("asan", marks=pytest.mark.slow)
BUILDS = ["plain", ASAN, "tsan"]
SANITIZERS = [ASAN, "tsan"]
# A sanitizer sees a fault in almost any order of the threads.
SEEDS = {"plain": range(20), "asan": range(3), "tsan": range(3)}
LAYOUTS = ("channels_first", "channels_last")
# Reports of unordered accesses under ThreadSanitizer: its own, or the engine's for the shared memory of another block
# of a cluster.
UNORDERED = "data race|shared memory of a block that (may not have started|ends)"
PAIRS = [pytest.param(pair, id="+".join(dict.fromkeys(pair))) for pair in DTYPE_PAIRS]
# Long tests use these two pairs by default, vectors of few elements and of many, and the others only as slow tests.
FEW = (("float32", "float32"), ("bfloat16", "float32"))
PAIRS_BUT_FEW_SLOW = [
    pair if pair.values[0] in FEW else pytest.param(pair.values[0], id=pair.id, marks=pytest.mark.slow)
    for pair in PAIRS
]
BUILDS_AND_PAIRS = [
    pytest.param(name, pair.values[0], id=f"{name}-{pair.id}", marks=pytest.mark.slow if name == "asan" else pair.marks)
    for name, pairs in (("plain", PAIRS), ("asan", PAIRS), ("tsan", PAIRS_BUT_FEW_SLOW))
    for pair in pairs
]
BARRIER_BUILDS = ["plain", pytest.param("tsan", marks=pytest.mark.slow)]


class Servers:
    """A server for each build."""

    def __init__(self) -> None:
        self._running: dict[str, Server] = {}

    def __call__(self, name: str) -> Server:
        return self._running.setdefault(name, Server(name))

    def close(self) -> None:
        for server in self._running.values():
            server.close()


def make(shape: tuple[int, ...], pair: tuple[str, str], training: bool = True, weight: str = "normal") -> Inputs:
    return Case("offset_1e2", shape, *pair, weight=weight, training=training).inputs()


def judge(inputs: Inputs, run: Run, context: object) -> None:
    assert_within(judge_call(inputs, run.outputs), str(context))


def assert_same(run: Run, other: Run, context: object, but: tuple[str, ...] = ()) -> None:
    different = [
        field.name
        for field in fields(run.outputs)
        if field.name not in but and not same_bits(getattr(run.outputs, field.name), getattr(other.outputs, field.name))
    ]
    assert not different, (different, context)


def requested(inputs: Inputs, last: bool, lead: int, own: int) -> int:
    """Bytes that one pass requests of a tensor like x that starts `own` elements past a vector boundary, where x starts
    `lead` elements past one.

    Channels-last, and rows of full vectors: each byte once. A row that starts or ends inside a vector reads that vector
    whole where it lies inside the tensor, and so does the adjacent row: the same memory sector, requested twice.
    """
    size = inputs.x.element_size()
    total = inputs.x.numel()
    if last or own != lead:
        return total * size
    vector = 16 // size
    inner = math.prod(inputs.x.shape[2:])
    asked = 0
    for start in range(0, total, inner):
        first = start - (lead + start) % vector  # of the vector
        while first < start + inner:
            full = first >= 0 and first + vector <= total
            asked += vector if full else min(first + vector, start + inner) - max(first, start)
            first += vector
    return asked * size


# Rows of any alignment, with heads and tails, several per block; and rows of full vectors.
FIRST = ((3, 5, 37), (2, 3, 8, 8))
# Rows whose number of vectors has a reciprocal that rounds to a double which is too small, so quotient() has to
# correct.
INEXACT_ROWS = (49, 98, 103, 107)
# Channels that are not full vectors, over more than one channel tile; and full vectors.
LAST = ((5, 69, 3), (37, 16))
