"""Adversarial values, by name: activations, gradients, weights.

A distribution is a function of a matrix z (C, n) of normal values, one row per channel, in float64. The result is then
rounded to the tensor's dtype, and the reference uses the rounded values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference


@dataclass(frozen=True)
class Distribution:
    """A distribution of activations. `smallest` and `largest` magnitudes determine the dtypes that can represent it."""

    name: str
    why: str
    values: Callable[[Tensor, torch.dtype], Tensor]
    largest: float = 1.0
    smallest: float = 1.0

    def fits(self, dtype: torch.dtype) -> bool:
        info = torch.finfo(dtype)
        return self.largest <= info.max and self.smallest >= info.smallest_normal * info.eps


def _index(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1], dtype=torch.float64, device=z.device)[None, :]


def _channel(z: Tensor) -> Tensor:
    return torch.arange(z.shape[0], dtype=torch.float64, device=z.device)[:, None]


def _with_element(values: Tensor, position: int, element: float, channel: int | None = None) -> Tensor:
    values = values.clone()
    values[slice(None) if channel is None else channel, position] = element
    return values


def _one_channel(z: Tensor, element: float) -> Tensor:
    # In the middle of a channel in the middle: neighbours on both sides must not change.
    return _with_element(z, z.shape[1] // 2, element, z.shape[0] // 2)


def _distributions() -> list[Distribution]:
    return [
        Distribution("normal", "typical of networks", lambda z, t: z),
        Distribution("offset_1e2", "mean >> std: E[x^2] - E[x]^2 loses 4 digits", lambda z, t: 1e2 + z, 1e2),
        Distribution("offset_1e4", "loses 8 digits, all of float32", lambda z, t: 1e4 + z, 1e4),
        Distribution("offset_1e6", "std of a few ulps of float32", lambda z, t: 1e6 + z, 1e6),
        Distribution("offset_neg300", "mean/std 3e5, negative", lambda z, t: -300 + 1e-3 * z, 300),
        Distribution("offset_1e4_signs", "two values around a large mean", lambda z, t: 1e4 + z.sign(), 1e4),
        Distribution("zeros", "zero variance: only eps remains", lambda z, t: torch.zeros_like(z)),
        Distribution(
            "constant_tenths",
            "not representable, so sums round: the variance must not become negative",
            lambda z, t: (0.1 * 2.0 ** (_channel(z) % 16)).expand_as(z),
            4e3,
        ),
        Distribution("constant_1e7", "a large odd constant", lambda z, t: torch.full_like(z, 1e7 + 3), 1e7),
        Distribution("first_1e5", "the worst first element to shift by", lambda z, t: _with_element(z, 0, 1e5), 1e5),
        Distribution("last_1e6", "an outlier in the last position", lambda z, t: _with_element(1e3 + z, -1, -1e6), 1e6),
        Distribution(
            "ramp_1e3", "sorted: partial means differ", lambda z, t: (1e3 * _index(z) / z.shape[1]).expand_as(z), 1e3
        ),
        Distribution("alternating_1e4", "sums cancel", lambda z, t: 1e4 * (1 - 2 * (_index(z) % 2)) + z, 1e4),
        Distribution(
            "halves_1e3",
            "two populations, combined last",
            lambda z, t: torch.where(_index(z) < z.shape[1] // 2, 1e3, -1e3) + z,
            1e3,
        ),
        Distribution("scale_1e-20", "the variance underflows in float32", lambda z, t: 1e-20 * z, smallest=1e-20),
        Distribution(
            "subnormal",
            "lost with flush-to-zero (1e-40 in float32)",
            lambda z, t: torch.finfo(t).smallest_normal * 1e-2 * z,
        ),
        Distribution("scale_1e18", "the variance fits float32, its sum over n does not", lambda z, t: 1e18 * z, 1e19),
        Distribution("scale_1e30", "the variance overflows float32, its root does not", lambda z, t: 1e30 * z, 1e31),
        Distribution(
            "cauchy",
            "heavy tails: few elements dominate the variance",
            lambda z, t: torch.tan(torch.pi * (torch.special.ndtr(z) - 0.5)).clamp(-1e4, 1e4),
            1e4,
        ),
        Distribution("lognormal", "skewed, spans several decades", lambda z, t: torch.exp(2 * z), 3e4),
        Distribution(
            "sparse_relu",
            "1% nonzero, as after a ReLU",
            lambda z, t: torch.where(z > 2.3263, z - 2.3263 + 0.1, 0.0),
        ),
        Distribution("float16_limits", "+-65504: squares overflow float16", lambda z, t: 65504 * z.sign(), 65504),
        Distribution("float16_top", "6e4 +- 32: sums overflow float16", lambda z, t: 6e4 + 32 * z.sign(), 60032),
        Distribution("one_nan", "must affect its channel only", lambda z, t: _one_channel(z, torch.nan)),
        Distribution("one_inf", "must affect its channel only", lambda z, t: _one_channel(z, torch.inf)),
    ]


FAMILIES: dict[str, Distribution] = {f.name: f for f in _distributions()}


def _xhat(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The reference's xhat of rows (C, n). Non-finite values are replaced by 0."""
    x = x.nan_to_num(0.0, 0.0, 0.0)
    return reference.forward(x.t(), eps=eps).y.t()


# Gradients: functions of normal values z (C, n) and of the activations x (C, n), already rounded to their dtype.
GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda z, x: z,
    "ones": lambda z, x: torch.ones_like(z),  # dx is 0 up to rounding
    "xhat": lambda z, x: _xhat(x),  # likewise: projected out entirely
    "near_one": lambda z, x: 1 + 1e-4 * z,  # dominated by the mean
    "one_plus_xhat": lambda z, x: 0.5 * (1 + _xhat(x)),  # both projections at once
    "one_hot": lambda z, x: _with_element(torch.zeros_like(z), z.shape[1] // 3, 1.0),
    "float16_max": lambda z, x: torch.full_like(z, 65504.0),  # sums overflow float16
    "expanded": lambda z, x: torch.full_like(z, 0.5),  # y.sum().backward(): one element, strides 0
    "pooled": lambda z, x: z,  # y.mean(spatial).backward(): (N, C, 1, 1) expanded; see cases.py
}


def _mixed(z: Tensor) -> Tensor:
    values = torch.tensor([0.0, -1.0, 1e-20, 1e4, 1.0], dtype=torch.float64)
    return values[torch.arange(z.shape[0]) % 5] * torch.where(torch.arange(z.shape[0]) % 5 == 4, z, 1.0)


# Weight and bias: functions of two normal vectors (C,). With a bias of 0, its scale cannot hide errors of y.
WEIGHTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]] = {
    "normal": lambda z, b: (1 + 0.5 * z, b),
    "none": lambda z, b: (None, None),
    "weight_only": lambda z, b: (z, None),
    "bias_only": lambda z, b: (None, b),
    "zero": lambda z, b: (torch.zeros_like(z), b),
    "minus_one": lambda z, b: (-torch.ones_like(z), torch.zeros_like(b)),
    "w_1e-20": lambda z, b: (torch.full_like(z, 1e-20), torch.zeros_like(b)),
    "w_1e4": lambda z, b: (torch.full_like(z, 1e4), b),
    "mixed": lambda z, b: (_mixed(z), 1e-3 * b),
}
