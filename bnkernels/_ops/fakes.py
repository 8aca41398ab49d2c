"""Fake implementations of the ops: shapes, dtypes and strides of the outputs, for FakeTensor, torch.compile and export.

They check sizes, dtypes and devices like the real ops, so that an invalid call fails while tracing and not in the
compiled code. Calls that mix real and meta tensors also run these.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _like(x: Tensor) -> Tensor:
    """An output like y or grad_x: the shape of x, and the memory format that x has or is closest to."""
    memory_format = torch._prims_common.suggest_memory_format(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=_statistic_dtype(x.dtype))


def _relu_bounds(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    statistic = _statistic(x)
    return statistic.new_empty((2, x.shape[1])) if relu and residual is None else statistic.new_empty(0)


def _updated(
    mean: Tensor, running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The updated buffers that a functional op returns; empty if not given."""

    def updated(buffer: Tensor | None) -> Tensor:
        return mean.new_empty(0) if buffer is None else torch.empty_like(buffer)

    return updated(running_mean), updated(running_var), updated(num_batches_tracked)


def _parameter_grads(
    x: Tensor, weight: Tensor | None, mean: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    parameter = weight if weight is not None else mean
    return (
        parameter.new_empty(x.shape[1] if need_weight and weight is not None else 0),
        parameter.new_empty(x.shape[1] if need_bias else 0),
    )


def _check(x: Tensor, num_batches_tracked: Tensor | None = None, **vectors: Tensor | None) -> None:
    """Checks the input, num_batches_tracked and the per-channel vectors of a call, given by name."""
    if x.dim() < 2:
        raise RuntimeError(f"batch_norm: expected an input of at least 2 dimensions, (N, C, ...), but got {x.dim()}")
    _check_vectors(x.shape[1], x.dtype, x.device, num_batches_tracked, **vectors)


def _check_vectors(
    channels: int, dtype: torch.dtype, device: torch.device, counter: Tensor | None, **vectors: Tensor | None
) -> None:
    if dtype not in _DTYPES:
        raise NotImplementedError(f'"batch_norm" not implemented for {dtype}')
    dtypes = {dtype, torch.float32} if dtype in (torch.float16, torch.bfloat16) else {dtype}
    for name, vector in vectors.items():
        if vector is None:
            continue
        torch._check(vector.numel() == channels, partial(_wrong_size, name, vector, channels))
        if vector.device != device:
            raise RuntimeError(f"batch_norm: expected {name} on the input's device, {device}, not {vector.device}")
        allowed = {_statistic_dtype(dtype)} if name in ("mean", "invstd") else dtypes
        if vector.dtype not in allowed:
            dtypes_text = " or ".join(sorted(map(str, allowed)))
            raise RuntimeError(f"batch_norm: expected {name} of dtype {dtypes_text}, but got {vector.dtype}")
    for names in (("weight", "bias"), ("running_mean", "running_var")):
        one, other = (vectors.get(name) for name in names)
        if one is not None and other is not None and one.dtype != other.dtype:
            raise RuntimeError(
                f"batch_norm: expected {names[0]} and {names[1]} of one dtype, but got {one.dtype} and {other.dtype}"
            )
    if counter is not None:
        torch._check(counter.numel() == 1, lambda: "batch_norm: expected num_batches_tracked to be one int64 value")
        if counter.dtype != torch.int64 or counter.device != device:
            raise RuntimeError(
                f"batch_norm: expected num_batches_tracked to be one int64 value on {device}, but got {counter.dtype} "
                f"on {counter.device}"
            )


def _wrong_size(name: str, vector: Tensor, channels: int) -> str:
    return f"{name} should contain {channels} elements not {vector.numel()}"


def _check_rows(rows: Tensor, size: int, device: torch.device) -> None:
    if rows.dim() != 2 or rows.dtype != torch.float64:
        raise RuntimeError(
            f"sync_batch_norm: expected a row of doubles from each rank, but got shape {tuple(rows.shape)} and dtype "
            f"{rows.dtype}"
        )
    torch._check(
        rows.shape[1] == size,
        lambda: f"sync_batch_norm: expected a row of {size} doubles from each rank, but got shape {rows.shape}",
    )
    torch._check(rows.shape[0] >= 1, lambda: "sync_batch_norm: expected a row from each rank, but got none")
    if rows.device != device:
        raise RuntimeError(f"sync_batch_norm: expected the ranks' rows on {device}, but got {rows.device}")


def _check_like(tensor: Tensor | None, x: Tensor, op: str, name: str) -> None:
    if tensor is None:
        return
    torch._check(tensor.shape == x.shape, lambda: f"{op}: expected a {name} of shape {x.shape}, but got {tensor.shape}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise RuntimeError(
            f"{op}: expected a {name} of dtype {x.dtype} on {x.device}, but got {tensor.dtype} on {tensor.device}"
        )


def _check_grad(grad: Tensor, x: Tensor) -> None:
    _check_like(grad, x, "batch_norm backward", "gradient")


def _check_residual(residual: Tensor | None, x: Tensor) -> None:
    _check_like(residual, x, "batch_norm", "residual")


@torch.library.register_fake("bnkernels::batch_norm_train")
def _train_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, num_batches_tracked, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_residual(residual, x)
    return _like(x), _statistic(x), _statistic(x), _relu_bounds(x, residual, relu)


@torch.library.register_fake("bnkernels::batch_norm_train_functional")
def _train_functional_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    buffers = (running_mean, running_var, num_batches_tracked)
    results = _train_fake(x, weight, bias, *buffers, *rest, **options)
    return *results, *_updated(results[1], *buffers)


@torch.library.register_fake("bnkernels::batch_norm_eval")
def _eval_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_residual(residual, x)
    return _like(x), _statistic(x), _statistic(x), _relu_bounds(x, residual, relu)


@torch.library.register_fake("bnkernels::batch_norm_backward")
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    relu_bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_grad(grad, x)
    _check(x, weight=weight, mean=mean, invstd=invstd)
    if relu_bounds is not None:
        _check_relu_bounds(relu_bounds, x)
    return _like(x) if need_input else x.new_empty(0), *_parameter_grads(x, weight, mean, need_weight, need_bias)


def _check_relu_bounds(relu_bounds: Tensor, x: Tensor) -> None:
    torch._check(
        relu_bounds.dim() == 2 and relu_bounds.shape[0] == 2 and relu_bounds.shape[1] == x.shape[1],
        lambda: f"batch_norm backward: expected a relu_bounds of shape [2, {x.shape[1]}], but got {relu_bounds.shape}",
    )
    if relu_bounds.dtype != _statistic_dtype(x.dtype) or relu_bounds.device != x.device:
        raise RuntimeError(
            f"batch_norm backward: expected a relu_bounds of dtype {_statistic_dtype(x.dtype)} on {x.device}, but got "
            f"{relu_bounds.dtype} on {relu_bounds.device}"
        )


@torch.library.register_fake("bnkernels::sync_batch_norm_statistics")
def _sync_statistics_fake(x: Tensor, eps: float) -> Tensor:
    _check(x)
    return x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)


def _combined_fake(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = (rows.shape[1] - 1) // 2 if rows.dim() == 2 else 0
    _check_rows(rows, 2 * channels + 1, rows.device)
    buffers = {"running_mean": running_mean, "running_var": running_var}
    _check_vectors(channels, dtype, rows.device, num_batches_tracked, **buffers)
    mean, invstd = (rows.new_empty(channels, dtype=_statistic_dtype(dtype)) for _ in range(2))
    return mean, invstd, rows.new_empty(1)


@torch.library.register_fake("bnkernels::sync_batch_norm_combine")
def _sync_combine_fake(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _combined_fake(rows, running_mean, running_var, num_batches_tracked, dtype)


@torch.library.register_fake("bnkernels::sync_batch_norm_combine_functional")
def _sync_combine_functional_fake(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    mean, invstd, count = _combined_fake(rows, running_mean, running_var, num_batches_tracked, dtype)
    return mean, invstd, count, *_updated(mean, running_mean, running_var, num_batches_tracked)


@torch.library.register_fake("bnkernels::sync_batch_norm_normalize")
def _sync_normalize_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    _check(x, weight=weight, bias=bias, mean=mean, invstd=invstd)
    return _like(x)


@torch.library.register_fake("bnkernels::sync_batch_norm_grad_sums")
def _sync_grad_sums_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_grad(grad, x)
    _check(x, weight=weight, mean=mean, invstd=invstd)
    row = x.new_empty(2 * x.shape[1], dtype=torch.float64)
    return row, *_parameter_grads(x, weight, mean, need_weight, need_bias)


@torch.library.register_fake("bnkernels::sync_batch_norm_grad_input")
def _sync_grad_input_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, rows: Tensor, count: Tensor
) -> Tensor:
    _check_grad(grad, x)
    _check(x, weight=weight, mean=mean, invstd=invstd)
    _check_rows(rows, 2 * x.shape[1], x.device)
    torch._check(count.numel() == 1, lambda: "sync_batch_norm: expected the count as one double")
    if count.dtype != torch.float64 or count.device != x.device:
        raise RuntimeError(
            f"sync_batch_norm: expected the count as one double on {x.device}, but got {count.dtype} on {count.device}"
        )
    return _like(x)
