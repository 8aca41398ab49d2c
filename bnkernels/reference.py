"""The float64 reference that every backend is compared with.

Formulas of Ioffe & Szegedy, "Batch Normalization" (2015, arXiv 1502.03167): Algorithm 1 (training), Algorithm 2
(inference) and the gradients that the paper derives after Algorithm 1. Inputs may have any floating dtype and any
strides. They are upcast to float64, so the reference computes from the same rounded values as the kernel under test.

The variance is computed in two passes: the mean, then the mean of the squared deviations. Nothing is fused, shifted or
reassociated, so that the code can be verified against the paper by reading. It is differentiable torch code, imports
nothing from the package, and holds several float64 copies of its input: it is for testing, not for speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forward:
    """Results of forward(): float64. y has the shape of x, the other tensors (C,)."""

    y: Tensor
    mean: Tensor
    """The mean used for normalisation: the batch mean in training, else running_mean."""
    var: Tensor
    """The variance used for normalisation: the biased batch variance (divided by n) in training, else running_var."""
    invstd: Tensor
    """1 / sqrt(var + eps)"""
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: int | None


@dataclass(frozen=True)
class Backward:
    """Results of backward(): float64. dx has the shape of x, the others (C,)."""

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
    """Batch normalisation of x, (N, C, *) with 2 or more dimensions, any floating dtype.

    Training normalises with the batch statistics and returns updated running statistics: the exponential average with
    `momentum`, or, if that is None, the cumulative average over the batches counted by `num_batches_tracked`. The
    vectors are (C,) or None. No argument is modified.

    Raises:
        ValueError: fewer than 2 values per channel in training (the unbiased variance divides by n - 1); no running
            statistics in inference; momentum=None without num_batches_tracked; x has fewer than 2 dimensions.
    """
    rows = channel_rows(x)
    n = rows.shape[1]
    new_mean = _float64(running_mean)
    new_var = _float64(running_var)
    count = None if num_batches_tracked is None else int(num_batches_tracked)

    if training:
        if n < 2:
            raise ValueError(f"training needs at least 2 values per channel, but x of shape {tuple(x.shape)} has {n}")
        mean = rows.sum(dim=1) / n
        var = (rows - mean[:, None]).square().sum(dim=1) / n
        if count is not None:
            count += 1
        if momentum is not None:
            factor = momentum
        elif count is not None:
            factor = 1.0 / count
        else:
            raise ValueError("momentum=None (cumulative average) requires num_batches_tracked")
        if new_mean is not None:
            new_mean = (1 - factor) * new_mean + factor * mean
        if new_var is not None:
            new_var = (1 - factor) * new_var + factor * var * (n / (n - 1))
    else:
        if new_mean is None or new_var is None:
            raise ValueError("inference requires running_mean and running_var")
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
    """Gradients of `forward` with respect to x, weight and bias. `grad` has the shape of x.

    mean and invstd (C,) are those of the forward. In training they depend on x, which adds two terms to dx; in
    inference they are constants. dweight and dbias are returned even if weight or bias was None.
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
    # contiguous(): reshape may return a view, and the summation order would then depend on the strides of x.
    return x.to(torch.float64).movedim(1, 0).reshape(x.shape[1], n).contiguous()


def from_channel_rows(rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `channel_rows`: (C, n) back to (N, C, *)."""
    return rows.reshape(shape[1], shape[0], *shape[2:]).movedim(0, 1)


def _float64(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float64)
