"""The tolerance: how far an output may be from the float64 reference.

    |out - ref| <= K * u_acc * scale + 1.05 * u_out * |ref| + tiny(out dtype)

u_acc is the unit roundoff of the arithmetic (2^-53 for float64 data, else 2^-24), u_out that of the output's dtype. The
last two terms allow for rounding an exact result when it is stored (1.05: it may be rounded twice, first to u_acc).
`scale` is the quantity that the error of a backward-stable algorithm is proportional to. With n values per channel and

    I = (var + eps)^-1/2     xh = (x - mean) I     A = (|x| + mean|x| + tiny(u_acc)) I     k = rms(x) I

training:
    y             |w| (A + |xh| k) + |b|
    dbias         sum |g|
    dweight       sum(|g| A) + |dweight| k
    dx            |w| I [ (|g| + mean|g|) (1 + k) + |xh| scale(dweight)/n + (A + |xh| k) |dweight|/n ]
    mean          mean|x|                                   the error of a sum is u times the sum of absolute values
    invstd        I (1 + k)                                 the k of `y`; 1 for the root and the division
    running_mean  f mean|x| + (1 + f) |old|                 f = momentum, or 1/num_batches_tracked
    running_var   f n/(n-1) (2 var + std rms(x) + K u_acc mean|x|^2) + (1 + f) |old|

Reason: k = rms(x)/std is the condition number of the variance (Chan, Golub & LeVeque 1983). A relative perturbation u
of the data changes var by about u k, and a stable algorithm has the same error. The last term of running_var is of
second order: a mean with an error of its bound d = K u_acc mean|x| adds d^2 to the variance, which is the whole
variance of a constant channel. E[x^2] - E[x]^2 has an error of u k^2, which this tolerance is designed to detect.

tiny(u_acc) in A is the smallest normal number of the arithmetic. Below it the rounding error is absolute: u_acc times
this number, not u_acc times the value (the usual model of gradual underflow, Demmel 1984). This matters for subnormal
data only: their mean is rounded to a multiple of 2^-149, and dweight = sum g xh accumulates that error n times.

Inference uses given mean and var, so their conditioning does not matter (k becomes 1, mean|x| becomes |mean|):
    y             |w| (A + |xh|) + |b|                      A = (|x| + |mean| + tiny(u_acc)) I
    dweight       sum(|g| A) + |dweight|
    dx            |w| I |g|
    mean, invstd  |mean|, I

Non-finite values: where the reference is NaN or infinite, the output must be non-finite; everywhere else it must be
within the bound. An output of +-inf represents every value that its dtype rounds to it, so overflow of the output's
dtype is correct exactly where the reference overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference

K = 32.0
REPORT_FROM = 8.0
"""The check marks results that are within the tolerance but need a K of at least this value."""

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic done on data of `dtype`, and of the statistics saved for the backward."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulate_roundoff(dtype: torch.dtype) -> float:
    """u_acc: the unit roundoff of the arithmetic done on data of `dtype`."""
    return UNIT_ROUNDOFF[accumulate_dtype(dtype)]


@dataclass(frozen=True)
class Expectation:
    """The expected values of one output in float64, and the scale of the allowed accumulation error."""

    quantity: str
    value: Tensor
    scale: Tensor
    u_acc: float


@dataclass(frozen=True)
class ErrorReport:
    """The worst element of one output.

    `ratio` is the error in excess of the rounding of the output's dtype, divided by K * u_acc * scale. At most 1 is
    within the tolerance, and ratio * K is the K that the result needs. It is infinite for an unexpected NaN.
    """

    quantity: str
    ratio: float
    index: tuple[int, ...]
    got: float
    expected: float
    bound: float
    dtype: torch.dtype

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"{self.quantity}[{', '.join(map(str, self.index))}] = {self.got:.9g}, expected {self.expected:.9g}, "
            f"bound {self.bound:.3g}, {self.ratio:.3g} of the allowance ({str(self.dtype).removeprefix('torch.')})"
        )


def expect_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    ref: reference.Forward,
    training: bool,
    momentum: float | None = 0.1,
) -> dict[str, Expectation]:
    """Expectations for y, mean, invstd and the given running statistics, from the reference's forward."""
    u_acc = accumulate_roundoff(x.dtype)
    s = _Statistics.of(x, ref.mean, ref.invstd, training)
    scale = s.w_times(weight, s.a + s.xhat.abs() * s.k[:, None])
    if bias is not None:
        scale = scale + bias.double().abs()[:, None]
    invstd_scale = ref.invstd * (1 + s.k) if training else ref.invstd
    out = {
        "y": Expectation("y", ref.y, reference.from_channel_rows(scale, x.shape), u_acc),
        "mean": Expectation("mean", ref.mean, s.mean_abs, u_acc),
        "invstd": Expectation("invstd", ref.invstd, invstd_scale, u_acc),
    }
    n = x.numel() // x.shape[1]
    factor = 0.0
    if training:
        factor = momentum if momentum is not None else 1.0 / (ref.num_batches_tracked or 1)
    if running_mean is not None and ref.running_mean is not None:
        moved = factor * s.mean_abs if training else 0.0
        old = abs(factor) * running_mean.double().abs() + running_mean.double().abs()
        out["running_mean"] = Expectation("running_mean", ref.running_mean, moved + old, u_acc)
    if running_var is not None and ref.running_var is not None:
        var_scale = 2 * ref.var + ref.var.sqrt() * s.rms + K * u_acc * s.mean_abs.square()
        moved = factor * n / (n - 1) * var_scale if training else 0.0
        old = abs(factor) * running_var.double().abs() + running_var.double().abs()
        out["running_var"] = Expectation("running_var", ref.running_var, moved + old, u_acc)
    return out


def expect_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    ref: reference.Backward,
    training: bool,
) -> dict[str, Expectation]:
    """Expectations for dx, dweight and dbias. mean and invstd are those used to compute `ref`."""
    u_acc = accumulate_roundoff(x.dtype)
    g = reference.channel_rows(grad).abs()
    s = _Statistics.of(x, mean.double(), invstd.double(), training)
    n = x.numel() // x.shape[1]
    dbias_scale = g.sum(dim=1)
    dweight_scale = (g * s.a).sum(dim=1) + ref.dweight.abs() * s.k
    dx_scale = g
    if training:
        xhat = s.xhat.abs()
        dx_scale = (
            (g + dbias_scale[:, None] / n) * (1 + s.k)[:, None]
            + xhat * (dweight_scale / n)[:, None]
            + (s.a + xhat * s.k[:, None]) * (ref.dweight.abs() / n)[:, None]
        )
    dx_scale = s.w_times(weight, dx_scale * invstd.double()[:, None])
    return {
        "dx": Expectation("dx", ref.dx, reference.from_channel_rows(dx_scale, x.shape), u_acc),
        "dweight": Expectation("dweight", ref.dweight, dweight_scale, u_acc),
        "dbias": Expectation("dbias", ref.dbias, dbias_scale, u_acc),
    }


@dataclass(frozen=True)
class _Statistics:
    """The symbols of the module's formulas. In inference, mean_abs = |mean| and k = 1."""

    mean_abs: Tensor
    rms: Tensor
    k: Tensor
    a: Tensor
    xhat: Tensor

    @staticmethod
    def of(x: Tensor, mean: Tensor, invstd: Tensor, training: bool) -> _Statistics:
        rows = reference.channel_rows(x)
        tiny = torch.finfo(accumulate_dtype(x.dtype)).smallest_normal
        mean_abs = rows.abs().mean(dim=1) if training else mean.abs()
        rms = rows.square().mean(dim=1).sqrt()
        k = rms * invstd if training else torch.ones_like(invstd)
        a = (rows.abs() + mean_abs[:, None] + tiny) * invstd[:, None]
        return _Statistics(mean_abs, rms, k, a, (rows - mean[:, None]) * invstd[:, None])

    @staticmethod
    def w_times(weight: Tensor | None, rows: Tensor) -> Tensor:
        return rows if weight is None else weight.double().abs()[:, None] * rows


def judge(out: Tensor, expectation: Expectation) -> ErrorReport:
    """Compares one output with its expectation. Raises AssertionError if the shape differs."""
    ref = expectation.value
    if out.shape != ref.shape:
        raise AssertionError(f"{expectation.quantity}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
    info = torch.finfo(out.dtype)
    u_out = UNIT_ROUNDOFF[out.dtype]
    got = out.detach().to(ref.device, torch.float64)

    # An infinite output represents all values beyond the overflow threshold.
    threshold = info.max * (1 + u_out / 2)
    error = torch.where(got.isinf(), (threshold - got.sign() * ref).clamp_min(0), (got - ref).abs())
    rounding = 1.05 * u_out * ref.abs() + info.tiny
    allowance = K * expectation.u_acc * expectation.scale
    excess = (error - rounding).clamp_min(0)
    ratio = torch.where(excess == 0, 0.0, excess / allowance)  # infinite for an allowance of 0, as intended
    ratio = torch.where(got.isnan(), math.inf, ratio)
    ratio = torch.where(ref.isfinite(), ratio, torch.where(got.isfinite(), math.inf, 0.0))
    if ratio.isnan().any():
        raise AssertionError(f"{expectation.quantity}: the tolerance is not finite: its scale overflows float64")
    if ratio.numel() == 0:
        return ErrorReport(expectation.quantity, 0.0, (), math.nan, math.nan, math.nan, out.dtype)

    # The worst element. If all ratios are 0, the one with the largest error, which is more informative than index 0.
    worst = int(ratio.reshape(-1).argmax())
    if ratio.reshape(-1)[worst] == 0:
        worst = int(error.nan_to_num(0.0, 0.0).reshape(-1).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ref.shape))
    bound = (allowance + rounding).expand_as(ref)
    return ErrorReport(
        expectation.quantity,
        float(ratio[index]),
        index,
        float(got[index]),
        float(ref[index]),
        float(bound[index]),
        out.dtype,
    )


def assert_within(error_reports: list[ErrorReport], context: str) -> None:
    """Raises AssertionError with every output beyond the tolerance. `context` identifies the case."""
    bad = [v for v in error_reports if not v.ok]
    if bad:
        lines = "\n  ".join(str(v) for v in bad)
        raise AssertionError(f"{context}: {len(bad)} of {len(error_reports)} outputs beyond the tolerance\n  {lines}")
