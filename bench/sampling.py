"""Interleaved samples: every round times every provider, so that drift (clocks, other processes) affects all alike.

A Timer runs n calls and returns their seconds. The CPU timer is here, the GPU timers are in cuda.py.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Timer = Callable[[int], float]


@dataclass(frozen=True)
class Effort:
    """How long to measure: as many rounds as fit the budget, within the two limits."""

    sample_s: float  # the least duration of one sample, which repeats the call
    budget_s: float  # for all providers of a case together
    min_rounds: int
    max_rounds: int


class Ring:
    """Indices into a ring of buffers, with one counter for all providers.

    A provider therefore never gets a buffer that the previous one has just brought into the cache.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._next = 0

    def take(self, count: int) -> list[int]:
        indices = [(self._next + offset) % self.length for offset in range(count)]
        self._next = (self._next + count) % self.length
        return indices


def cpu_timer(call: Callable[[int], object], ring: Ring) -> Timer:
    """A Timer of call(i), where i cycles through the ring. Results are freed before the next call, as in a program."""

    def run(count: int) -> float:
        indices = ring.take(count)
        start = time.perf_counter()
        for index in indices:
            call(index)
        return time.perf_counter() - start

    return run


def calls_per_sample(timer: Timer, sample_s: float) -> tuple[int, float]:
    """The number of calls that fill a sample, and the seconds of one call, after one call to warm up."""
    timer(1)
    count = 1
    while True:
        seconds = timer(count)
        if seconds >= sample_s / 4:
            each = seconds / count
            return max(1, math.ceil(sample_s / each)), each
        count *= 4


def interleave(timers: Mapping[str, Timer], effort: Effort) -> dict[str, list[float]]:
    """Seconds per call, one sample per round and provider. The provider that starts changes every round."""
    counts: dict[str, int] = {}
    round_s = 0.0
    for name, timer in timers.items():
        count, each = calls_per_sample(timer, effort.sample_s)
        counts[name] = count
        round_s += count * each
    rounds = min(effort.max_rounds, max(effort.min_rounds, int(effort.budget_s / round_s)))
    samples: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(timers[name](counts[name]) / counts[name])
    finally:
        if was_enabled:
            gc.enable()
    return samples
