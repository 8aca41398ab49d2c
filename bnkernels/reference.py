"""The float64 reference: the truth that every backend is held to.

Plain formulas of Ioffe & Szegedy, "Batch Normalization" (2015, arXiv 1502.03167): Algorithm 1 (training), Algorithm 2
(inference) and the gradients that the paper derives after Algorithm 1. Inputs may have any floating dtype and any
strides; each is upcast to float64 as it is, so the reference sees the same rounded values as the kernel under test.

Two passes: the mean first, then the mean of the squared deviations. Nothing is fused, shifted or reassociated: where a
backend disagrees with this file, this file should be the one that is easy to believe. It is differentiable torch code,
imports nothing of the package, and holds several float64 copies of its input: it is for testing, not for speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forward:
    """What a forward gives. float64 throughout; `y` is shaped like x, the rest (C,)."""

    y: Tensor
    mean: Tensor
    """The mean that x was normalised with: the batch's in training, else the running one."""
    var: Tensor
    """The variance that x was normalised with; the batch's is the biased one, over n."""
    invstd: Tensor
    """1 / sqrt(var + eps)"""
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: int | None


@dataclass(frozen=True)
class Backward:
    """The gradients. float64; `dx` is shaped like x, the others (C,)."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def forward(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | int | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Forward:
    """Batch normalisation of x, shaped (N, C, *) with 2 dimensions or more.

    Training normalises with the batch's statistics and moves the running ones, by `momentum`, or, where that is None,
    so that they are the average over all batches counted by `num_batches_tracked`. No argument is changed in place.

    Raises ValueError where the result is not defined: fewer than 2 values per channel in training (the unbiased
    variance divides by n - 1), no running statistics in inference, no count for the cumulative average.
    """
    rows = channel_rows(x)
    n = rows.shape[1]
    new_mean = _float64(running_mean)
    new_var = _float64(running_var)
    count = None if num_batches_tracked is None else int(num_batches_tracked)

    if training:
        if n < 2:
            raise ValueError(f"training needs 2 values per channel or more, x of shape {tuple(x.shape)} has {n}")
        mean = rows.sum(dim=1) / n
        var = (rows - mean[:, None]).square().sum(dim=1) / n
        if count is not None:
            count += 1
        if momentum is not None:
            factor = momentum
        elif count is not None:
            factor = 1.0 / count
        else:
            raise ValueError("momentum None (cumulative average) needs num_batches_tracked")
        if new_mean is not None:
            new_mean = (1 - factor) * new_mean + factor * mean
        if new_var is not None:
            new_var = (1 - factor) * new_var + factor * var * (n / (n - 1))
    else:
        if new_mean is None or new_var is None:
            raise ValueError("inference needs running_mean and running_var")
        mean, var = new_mean, new_var

    invstd = 1 / torch.sqrt(var + eps)
    y = (rows - mean[:, None]) * invstd[:, None]
    if weight is not None:
        y = y * weight.to(torch.float64)[:, None]
    if bias is not None:
        y = y + bias.to(torch.float64)[:, None]
    return Forward(from_channel_rows(y, x.shape), mean, var, invstd, new_mean, new_var, count)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool = True,
) -> Backward:
    """Gradients of `forward` with respect to x, weight and bias; `grad` is shaped like x.

    mean and invstd are what the forward normalised with. In training they depend on x, which gives dx its two further
    terms; in inference they are constants. dweight and dbias are given whether or not there was a weight or a bias.
    """
    g = channel_rows(grad)
    xhat = (channel_rows(x) - mean.to(torch.float64)[:, None]) * invstd.to(torch.float64)[:, None]
    n = g.shape[1]
    dbias = g.sum(dim=1)
    dweight = (g * xhat).sum(dim=1)
    dx = g
    if training:
        dx = g - dbias[:, None] / n - xhat * dweight[:, None] / n
    dx = dx * invstd.to(torch.float64)[:, None]
    if weight is not None:
        dx = dx * weight.to(torch.float64)[:, None]
    return Backward(from_channel_rows(dx, x.shape), dweight, dbias)


def channel_rows(x: Tensor) -> Tensor:
    """x (N, C, *) as a float64 matrix (C, n): one contiguous row per channel, n = N * prod(*)."""
    if x.dim() < 2:
        raise ValueError(f"expected (N, C, *), got shape {tuple(x.shape)}")
    n = x.numel() // x.shape[1] if x.shape[1] else 0
    # contiguous(): reshape keeps the strides where it can, and then the order of the sums would follow them.
    return x.to(torch.float64).movedim(1, 0).reshape(x.shape[1], n).contiguous()


def from_channel_rows(rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `channel_rows`: (C, n) back to (N, C, *)."""
    return rows.reshape(shape[1], shape[0], *shape[2:]).movedim(0, 1)


def _float64(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float64)
