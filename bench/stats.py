"""Statistics of samples: quantiles, spread, geometric mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1), linear between the two nearest order statistics. ValueError if empty."""
    if not values:
        raise ValueError("quantile of an empty sequence")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"expected 0 <= q <= 1, got {q}")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)): the mean for ratios, in which 2x and 1/2x cancel. ValueError if empty or if a value is <= 0."""
    logs = []
    for value in values:
        if value <= 0.0:
            raise ValueError(f"geometric mean: expected positive values, got {value}")
        logs.append(math.log(value))
    if not logs:
        raise ValueError("geometric mean of an empty sequence")
    return math.exp(math.fsum(logs) / len(logs))


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentile of a sample."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(quantile(samples, 0.5), quantile(samples, 0.2), quantile(samples, 0.8))

    def overlaps(self, other: Spread) -> bool:
        return self.p20 <= other.p80 and other.p20 <= self.p80
