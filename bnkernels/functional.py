"""batch_norm(), the functional form: the caller holds the parameters and buffers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import autograd
from .errors import UNNAMED, name_the_cause
from .ranks import Ranks


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Batch normalisation (Ioffe & Szegedy 2015), with the signature, results and errors of F.batch_norm.

        y = activation((input - mean) / sqrt(var + eps) * weight + bias + residual)      per channel

    mean and var are the batch's mean and biased variance if training is True, else running_mean and running_var.
    Training updates the given running statistics in place:

        running_mean += momentum * (mean - running_mean)
        running_var  += momentum * (var * n/(n - 1) - running_var)      n = elements per channel

    Args:
        input: (N, C) or (N, C, *), float64, float32, float16 or bfloat16, any strides. Contiguous and channels_last
            inputs are read in place; other layouts are copied once.
        running_mean, running_var: (C,). Both may be None if training is True.
        weight, bias: (C,) or None. They and the running statistics have the dtype of input, or float32 if input is
            16-bit.
        residual: added to the normalised input. If it has the shape, dtype and device of input, the kernel that writes
            y adds it and rounds the sum once. Otherwise torch adds it, with broadcasting.
        activation: None or "relu". Applied to the sum by the same kernel.

    Returns:
        y, with the shape, dtype and memory format of input. Differentiable with respect to input, weight, bias and
        residual, to any order.

    Raises:
        ValueError: training with one value per channel, or with only one of the running statistics; eps <= 0 in
            training, or < 0 in inference; input has fewer than two dimensions; unknown activation.
        RuntimeError: inference without running statistics; wrong size, dtype or device; residual does not broadcast.
        TypeError: an argument is not a tensor.
        NotImplementedError: unsupported dtype; nested, sparse or quantized tensor.

    A call that raises does not change the running statistics.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        result: Tensor = handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias, residual),
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            activation=activation,
        )
        return result
    check_activation(activation)
    if momentum is None:
        raise TypeError("batch_norm(): argument 'momentum' must be float, not NoneType")
    if not isinstance(input, Tensor):
        name_the_cause(input=input)
    if input.dim() < 2:
        return with_epilogue(_without_channels(input, running_mean, running_var, weight, bias), residual, activation)
    return batch_norm_tracked(
        input, weight, bias, running_mean, running_var, None, training, momentum, eps, residual, activation
    )


def batch_norm_tracked(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """batch_norm() as the modules call it.

    Training also increments num_batches_tracked, one int64. momentum=None computes the cumulative average.
    """
    if has_torch_function_unary(input) or (residual is not None and has_torch_function_unary(residual)):
        result: Tensor = handle_torch_function(
            batch_norm_tracked,
            (input, residual),
            input,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            momentum,
            eps,
            residual,
            activation,
        )
        return result
    # The ops check everything else and use torch's messages. These two checks are here because the ops do not accept
    # None for the running statistics and format eps differently.
    if not training and (running_mean is None or running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"{missing} must be defined in evaluation mode")
    if eps <= 0.0 and (training or eps < 0.0):
        wanted = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {wanted}, but got {eps}")
    spec = (running_mean, running_var, num_batches_tracked, training, momentum, eps)
    try:
        if residual is not None and not _can_be_added_by_kernel(residual, input):
            check_residual(residual, input, activation)
            return with_epilogue(autograd.batch_norm(input, weight, bias, spec), residual, activation)
        return autograd.batch_norm(input, weight, bias, spec, residual, activation is not None)
    except UNNAMED:
        name_the_cause(
            input=input,
            weight=weight,
            bias=bias,
            running_mean=running_mean,
            running_var=running_var,
            residual=residual,
        )
        raise


def _can_be_added_by_kernel(residual: Tensor, input: Tensor) -> bool:
    """Whether the kernels can add the residual. torch adds, or rejects, any other one."""
    return residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device


def check_residual(residual: Tensor, input: Tensor, activation: str | None) -> None:
    """Raises the errors of torch's addition and activation before the running statistics are updated.

    Runs both operations on one element.
    """
    torch.broadcast_tensors(input, residual)
    with_epilogue(input.new_empty(1), residual.new_empty((1,) if residual.dim() else ()), activation)


def with_epilogue(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(y + residual) with torch's operations; both parts are optional."""
    y = y if residual is None else y + residual
    return y if activation is None else torch.relu(y)


def check_activation(activation: str | None) -> None:
    """Raises ValueError for an unknown activation."""
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', but got {activation!r}")


def sync_batch_norm_tracked(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    ranks: Ranks,
) -> Tensor:
    """batch_norm_tracked() in training, for a batch that is distributed over several ranks. SyncBatchNorm calls it."""
    if has_torch_function_unary(input):
        result: Tensor = handle_torch_function(
            sync_batch_norm_tracked,
            (input,),
            input,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            eps,
            ranks,
        )
        return result
    try:
        return autograd.sync_batch_norm(
            input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, ranks
        )
    except UNNAMED:
        name_the_cause(input=input)
        raise


def _without_channels(input: Tensor, *vectors: Tensor | None) -> Tensor:
    """Handles inputs of fewer than two dimensions.

    torch accepts an empty 1-D input, which has no channels, and reads out of bounds of the shape for any other. Those
    raise ValueError here.
    """
    if input.dim() == 1 and input.numel() == 0:
        for name, vector in zip(("running_mean", "running_var", "weight", "bias"), vectors):
            if vector is not None and vector.numel() != 0:
                raise RuntimeError(f"{name} should contain 0 elements not {vector.numel()}")
        return input.clone()
    raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
