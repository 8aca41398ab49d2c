"""The autograd.Functions of relu(batch_norm(x) + residual), where each part may be missing.

    FusedEager       forward and backward through the kernels: the way of ordinary training
    FusedTraced      the same of ops without side effects, for torch.compile and torch.export

Behind a ReLU alone the kernels' backward takes the gradient as it comes: which x passed is an interval for each channel
(relu_bounds, 2C values that the forward returns), so neither y nor a mask is kept or read. With a residual that is not
so, and y is saved, as torch's ReLU does; the ReLU's backward is then torch's own, and the rest BatchNorm's.

Derivatives of the backward, torch.func's transforms, forward mode and ONNX take the parts one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.onnx import is_in_onnx_export

from bnkernels import ops

from . import formulas
from .functions import Backward, batch_norm, is_traced, transforms_active


def fused_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """relu(batch_norm(x) + residual), without what is not asked for; differentiable in x, weight, bias and residual.

    Arguments as batch_norm()'s; residual has the shape, dtype and device of x.
    """
    buffers = (running_mean, running_var, num_batches_tracked)
    composed = transforms_active() or forward_ad._current_level >= 0 or is_in_onnx_export()
    if composed or _differentiates(running_mean, running_var):
        y = batch_norm(x, weight, bias, *buffers, training, momentum, eps)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y
    if is_traced():
        outputs: tuple[Tensor, ...] = FusedTraced.apply(
            x, weight, bias, residual, *buffers, training, momentum, eps, relu
        )
        for buffer, updated in zip(buffers, outputs[4:]):
            if buffer is not None:
                buffer.copy_(updated)
        return outputs[0]
    if _differentiates(x, weight, bias, residual):
        result: Tensor = FusedEager.apply(x, weight, bias, residual, (*buffers, training, momentum, eps, relu))
        return result
    if training:
        return ops.fused_forward_train(x, residual, weight, bias, *buffers, momentum, eps, relu)[0]
    return ops.fused_forward_eval(x, residual, weight, bias, running_mean, running_var, eps, relu)[0]


def _differentiates(*tensors: Tensor | None) -> bool:
    return is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class FusedEager(Function):
    """(x, weight, bias, residual, rest) -> y

    rest: (running_mean, running_var, num_batches_tracked, training, momentum, eps, relu), as in Eager.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None, float, bool],
    ) -> Tensor:
        running_mean, running_var, num_batches_tracked, training, momentum, eps, relu = rest
        if training:
            y, mean, invstd, relu_bounds = ops.fused_forward_train(
                x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, relu
            )
        else:
            y, mean, invstd, relu_bounds = ops.fused_forward_eval(
                x, residual, weight, bias, running_mean, running_var, eps, relu
            )
        passed = None if not relu else relu_bounds if residual is None else y
        ctx.save_for_backward(x, weight, mean, invstd, passed)
        ctx.call = (training, eps, residual is not None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, passed = ctx.saved_tensors
        training, eps, adds = ctx.call
        *needs, need_residual, _ = ctx.needs_input_grad
        again = is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0
        if passed is not None:
            if not (adds or again):
                grads = ops.relu_backward(grad, x, weight, mean, invstd, passed, training, *needs)
                return *grads, None, None
            grad = ops.threshold_backward(grad, passed, 0) if adds else formulas.passed_by_relu(grad, x, passed)
        grads = (None, None, None)
        if any(needs):
            if again:
                grads = Backward.apply(grad, x, weight, mean, invstd, training, eps, *needs)
            else:
                grads = ops.backward(grad, x, weight, mean, invstd, training, *needs)
        return *grads, grad if need_residual else None, None


class FusedTraced(Function):
    """(x, weight, bias, residual, running_mean, running_var, num_batches_tracked, training, momentum, eps, relu)

    -> (y, mean, invstd, relu_bounds), and in training the buffers as they are to be afterwards.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, ...]:
        if training:
            return ops.fused_train_functional(
                x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, relu
            )
        return ops.fused_eval_op(x, residual, weight, bias, running_mean, running_var, eps, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, residual, *_, relu = inputs
        y, mean, invstd, relu_bounds = output[:4]
        passed = None if not relu else relu_bounds if residual is None else y
        ctx.save_for_backward(x, weight, mean, invstd, passed)
        ctx.training = inputs[7]
        ctx.adds = residual is not None
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, passed = ctx.saved_tensors
        *needs, need_residual = ctx.needs_input_grad[:4]
        if passed is not None and not ctx.adds:
            grads = ops.relu_backward_op(grad, x, weight, mean, invstd, passed, ctx.training, *needs)
        else:
            if passed is not None:
                grad = ops.threshold_backward(grad, passed, 0)
            grads = ops.backward_op(grad, x, weight, mean, invstd, ctx.training, *needs)
        of_parameters = (g if need else None for g, need in zip(grads, needs))
        return *of_parameters, grad if need_residual else None, *(None,) * 7
