"""What the tests of the kernels on the host share: variants, shapes, servers, and how a run is judged."""

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
# A sanitizer sees what is wrong in almost any order of the threads.
SEEDS = {"plain": range(20), "asan": range(3), "tsan": range(3)}
LAYOUTS = ("channels_first", "channels_last")
# What is said of accesses that nothing orders, under ThreadSanitizer: by itself, or by the engine, of the shared memory
# of another block of a cluster.
UNORDERED = "data race|shared memory of a block that (may not have started|ends)"
PAIRS = [pytest.param(pair, id="+".join(dict.fromkeys(pair))) for pair in DTYPE_PAIRS]
# What takes long is run, but for the slow tests, with two: vectors of few elements and of many.
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
    """Bytes that one pass asks of a tensor like x that lies `own` elements past a boundary, x lying `lead` past one.

    Channels-last, and rows of whole vectors: each byte once. A row that starts or ends inside a vector takes that
    vector whole, where it lies inside the tensor, and so does its neighbour: the same memory sector, asked for twice.
    """
    size = inputs.x.element_size()
    total = inputs.x.numel()
    if last or own != lead:
        return total * size
    vector = 16 // size
    inner = math.prod(inputs.x.shape[2:])
    asked = 0
    for start in range(0, total, inner):
        window = start - (lead + start) % vector
        while window < start + inner:
            whole = window >= 0 and window + vector <= total
            asked += vector if whole else min(window + vector, start + inner) - max(window, start)
            window += vector
    return asked * size


# Rows that start anywhere, with heads and tails, in blocks that hold several of them; and rows of whole vectors.
FIRST = ((3, 5, 37), (2, 3, 8, 8))
# Rows of so many vectors that their number's reciprocal, rounded to double, is too small: quotient() has to correct.
INEXACT_ROWS = (49, 98, 103, 107)
# Channels that are no whole vectors, over more than one channel tile of lanes; and whole vectors.
LAST = ((5, 69, 3), (37, 16))
