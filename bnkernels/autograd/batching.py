"""The vmap rules: B BatchNorms over C channels are computed as one BatchNorm over B*C channels.

Channels are independent, so folding the vmap dimension into the channels gives every example its own statistics,
parameters and gradients in one call. In inference with shared statistics and parameters it is folded into N, without a
copy.

`apply` is the Function's apply method. It calls the next outer transform, or the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Dims = tuple["int | None", ...]


def _front(t: Tensor, dim: int | None, batch: int) -> Tensor:
    """t with the vmap dimension first."""
    return t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)


def _fold_vector(t: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    """(C,) per example to (B*C,)."""
    return None if t is None else _front(t, dim, batch).reshape(-1)


def _fold_channels(t: Tensor, dim: int | None, batch: int) -> Tensor:
    """(N, C, *) per example to (N, B*C, *)."""
    return _front(t, dim, batch).movedim(0, 1).flatten(1, 2)


def _unfold_channels(t: Tensor, batch: int) -> Tensor:
    """(N, B*C, *) to (N, B, C, *): the vmap dimension is 1."""
    return t.unflatten(1, (batch, t.shape[1] // batch))


def forward(
    apply: Callable[..., tuple[Tensor, ...]], batch: int, in_dims: Dims, *args: Any
) -> tuple[tuple[Tensor, ...], Dims]:
    x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps = args
    x_dim, weight_dim, bias_dim, mean_dim, var_dim, counter_dim = in_dims[:6]
    if not training:
        if all(dim is None for dim in in_dims[1:]):
            y, mean, invstd = apply(
                _front(x, x_dim, batch).flatten(0, 1), weight, bias, running_mean, running_var, None, False, 0.0, eps
            )[:3]
            return (y.unflatten(0, (batch, y.shape[0] // batch)), mean, invstd), (0, None, None)
        y, mean, invstd = apply(
            _fold_channels(x, x_dim, batch),
            _fold_vector(weight, weight_dim, batch),
            _fold_vector(bias, bias_dim, batch),
            _fold_vector(running_mean, mean_dim, batch),
            _fold_vector(running_var, var_dim, batch),
            None,
            False,
            0.0,
            eps,
        )[:3]
        return (_unfold_channels(y, batch), mean.view(batch, -1), invstd.view(batch, -1)), (1, 0, 0)

    buffers = ((running_mean, mean_dim), (running_var, var_dim), (num_batches_tracked, counter_dim))
    if x_dim is not None and any(buffer is not None and dim is None for buffer, dim in buffers):
        raise RuntimeError(
            "Batch norm got a batched tensor as input while the running_mean, running_var or num_batches_tracked, "
            "which will be updated in place, were not batched.\nIf you are using modules, see "
            "https://pytorch.org/docs/stable/func.batch_norm.html for how to patch your module to work with vmap."
        )
    # Momentum 1 writes each example's batch mean and unbiased variance into temporary buffers. They are then averaged
    # into the real buffers, because the cumulative average may have a different factor for each example.
    folded = _fold_channels(x, x_dim, batch)
    fresh_mean, fresh_var = (
        None if buffer is None else buffer.new_zeros(folded.shape[1]) for buffer in (running_mean, running_var)
    )
    outputs = apply(
        folded,
        _fold_vector(weight, weight_dim, batch),
        _fold_vector(bias, bias_dim, batch),
        fresh_mean,
        fresh_var,
        None,
        True,
        1.0,
        eps,
    )
    y, mean, invstd = outputs[:3]
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if x.numel() > 0:
        factor = momentum if momentum is not None else num_batches_tracked.reciprocal()
        for (buffer, dim), fresh in zip(buffers, (fresh_mean, fresh_var)):
            if buffer is not None and fresh is not None:
                _average(buffer, dim, fresh.view(batch, -1), factor, counter_dim)
    return (_unfold_channels(y, batch), mean.view(batch, -1), invstd.view(batch, -1)), (1, 0, 0)


def _average(buffer: Tensor, dim: int | None, fresh: Tensor, factor: float | Tensor, factor_dim: int | None) -> None:
    """buffer += factor * (fresh - buffer). A buffer without a vmap dimension uses the first example: all are equal."""
    if dim is None:
        target, fresh = buffer, fresh[0]
    else:
        target = buffer.movedim(dim, 0)
        if isinstance(factor, Tensor) and factor_dim is not None:
            factor = factor.view(-1, 1)
    target.add_(factor * (fresh - target))


def backward(
    apply: Callable[..., tuple[Tensor | None, ...]], batch: int, in_dims: Dims, *args: Any
) -> tuple[tuple[Tensor | None, ...], Dims]:
    grad, x, weight, mean, invstd, *rest = args
    grad_x, *vectors = apply(
        _fold_channels(grad, in_dims[0], batch),
        _fold_channels(x, in_dims[1], batch),
        *(_fold_vector(vector, dim, batch) for vector, dim in zip((weight, mean, invstd), in_dims[2:5])),
        *rest,
    )
    unfolded = [None if vector is None else vector.view(batch, -1) for vector in vectors]
    return (None if grad_x is None else _unfold_channels(grad_x, batch), *unfolded), (1, 0, 0)
