"""batch_norm() as a function, for those who keep the parameters and the buffers themselves."""

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
    """Batch normalisation (Ioffe & Szegedy 2015): torch.nn.functional.batch_norm's signature, results and errors.

        y = activation((input - mean) / sqrt(var + eps) * weight + bias + residual)      per channel

    with the batch's mean and biased variance if training, and running_mean and running_var otherwise. If training, the
    running statistics that are given are updated in place:

        running_mean += momentum * (mean - running_mean)
        running_var  += momentum * (var * n/(n - 1) - running_var)      n = elements per channel

    Args:
        input: (N, C) or (N, C, *), float64, float32, float16 or bfloat16, any strides. Contiguous and channels_last
            inputs are read as they are; others are copied once.
        running_mean, running_var: (C,), or both None, which needs training.
        weight, bias: (C,) or None. These and the running statistics have input's dtype; or float32 if that is 16-bit.
        residual: added to the normalised input. Of input's shape, dtype and device, it is read by the kernel that
            writes y, and the sum is rounded once; another one is added by torch, with torch's broadcasting.
        activation: None or "relu", of the sum, by the same kernel.

    Returns:
        y, of input's shape, dtype and memory format. Differentiable in input, weight, bias and residual, to any order.

    Raises:
        ValueError: one value per channel in training; eps <= 0 in training, or < 0; one running statistic without the
            other in training; input of fewer than two dimensions; an activation of another name.
        RuntimeError: no running statistics in inference; a wrong size, dtype or device; a residual that does not
            broadcast.
        TypeError: an argument that is no tensor.
        NotImplementedError: input of another dtype; a nested, sparse or quantized tensor.

    A call that raises leaves the running statistics as they were.
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
    """What the modules call: batch_norm() that also counts the batches; momentum None averages over all of them."""
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
    # The ops check the rest, in torch's words. They cannot be given None here, and they write numbers in another way.
    if not training and (running_mean is None or running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"{missing} must be defined in evaluation mode")
    if eps <= 0.0 and (training or eps < 0.0):
        wanted = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {wanted}, but got {eps}")
    spec = (running_mean, running_var, num_batches_tracked, training, momentum, eps)
    try:
        if residual is not None and not _fits(residual, input):
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


def _fits(residual: Tensor, input: Tensor) -> bool:
    """Whether the kernels can add it: anything else is torch's to add, or to refuse."""
    return residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device


def check_residual(residual: Tensor, input: Tensor, activation: str | None) -> None:
    """Raises what torch's operations after the normalisation would, before the statistics change: on one element."""
    torch.broadcast_tensors(input, residual)
    with_epilogue(input.new_empty(1), residual.new_empty((1,) if residual.dim() else ()), activation)


def with_epilogue(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(y + residual) of torch's operations, each part if it is there."""
    y = y if residual is None else y + residual
    return y if activation is None else torch.relu(y)


def check_activation(activation: str | None) -> None:
    """Raises ValueError for a name that is not one of an activation."""
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
    """What SyncBatchNorm calls in training: batch_norm_tracked() of a batch that lies on several ranks."""
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
    """torch lets an empty 1-D input pass, as one of no channels. It reads past the shape of others; here they raise."""
    if input.dim() == 1 and input.numel() == 0:
        for name, vector in zip(("running_mean", "running_var", "weight", "bias"), vectors):
            if vector is not None and vector.numel() != 0:
                raise RuntimeError(f"{name} should contain 0 elements not {vector.numel()}")
        return input.clone()
    raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
