"""The few statistics that the harness quotes: medians, percentiles, ratios and their geometric mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1), linear between the two nearest order statistics; ValueError without values."""
    if not values:
        raise ValueError("quantile of nothing")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q is a probability, not {q}")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)): the mean for ratios, where 2x and 1/2x cancel. ValueError without values or for one <= 0."""
    logs = []
    for value in values:
        if value <= 0.0:
            raise ValueError(f"geometric mean of {value}")
        logs.append(math.log(value))
    if not logs:
        raise ValueError("geometric mean of nothing")
    return math.exp(math.fsum(logs) / len(logs))


@dataclass(frozen=True)
class Spread:
    """The middle of a sample and how far it scatters."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(quantile(samples, 0.5), quantile(samples, 0.2), quantile(samples, 0.8))

    def overlaps(self, other: Spread) -> bool:
        return self.p20 <= other.p80 and other.p20 <= self.p80
