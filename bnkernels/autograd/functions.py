"""The autograd.Functions of batch_norm. What they compute is in the ops (kernels) and in formulas.py (the rest).

    Eager            backward through the kernels: the way of ordinary training
    Transformable    with jvp and vmap, for torch.func and for forward mode
    Traced           of ops without side effects, for torch.compile and torch.export
    Backward         the backward kernel, as a function that is differentiable in its turn

Why three of one thing: torch.func requires the setup_context form, whose arguments torch binds with inspect.signature()
on every call, which takes longer than a small BatchNorm does (23 us against 3 us, on empty functions of these
arguments); and torch.compile traces no function that has a jvp.

Saved are x, the weight and the statistics of *this* forward, 2C values. The running statistics are not read again, so
an eval forward that is followed by a train forward still has its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.compiler import is_compiling
from torch.onnx import is_in_onnx_export

from bnkernels import ops

from . import batching, formulas

transforms_active = torch._C._are_functorch_transforms_active


def is_traced() -> bool:
    """Whether a compiler sees this call: TorchDynamo, torch.export, or what takes a captured graph to its ops.

    torch before 2.13 says so by is_compiling() for the first two only.
    """
    return is_compiling() or TracingContext.try_get() is not None


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """y of batch_norm, differentiable in x, weight and bias; if training, the buffers that are there are updated.

    x is (N, C, *), the others (C,) or None, num_batches_tracked one int64; dtypes as the ops take them.
    Inference needs running_mean and running_var. momentum None averages over all batches: it needs num_batches_tracked.
    """
    grad_enabled = is_grad_enabled()
    if grad_enabled and (
        (running_mean is not None and running_mean.requires_grad)
        or (running_var is not None and running_var.requires_grad)
    ):
        raise RuntimeError("batch_norm is not differentiable with respect to running_mean and running_var.")
    if is_traced():
        traced = _traced
        if is_in_onnx_export():
            traced = _exported_to_onnx
        elif transforms_active():
            # A compiler drops the backward of a Function in a transform of torch.func (torch 2.13: zeros, silently).
            traced = formulas.forward
        return traced(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    if transforms_active() or forward_ad._current_level >= 0:
        outputs: tuple[Tensor, ...] = Transformable.apply(
            x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
        )
        return outputs[0]
    if grad_enabled and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        rest = (running_mean, running_var, num_batches_tracked, training, momentum, eps)
        y: Tensor = _apply_eager(x, weight, bias, rest)
        return y
    if training:
        return ops.forward_train(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)[0]
    return ops.forward_eval(x, weight, bias, running_mean, running_var, eps)[0]


class Eager(Function):
    """(x, weight, bias, (running_mean, running_var, num_batches_tracked, training, momentum, eps)) -> y

    What has no gradient is in one tuple, which autograd does not look into: every argument of its own costs time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest: tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None, float],
    ) -> Tensor:
        running_mean, running_var, num_batches_tracked, training, momentum, eps = rest
        if training:
            y, mean, invstd = ops.forward_train(
                x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps
            )
        else:
            y, mean, invstd = ops.forward_eval(x, weight, bias, running_mean, running_var, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.call = (training, eps)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        training, eps = ctx.call
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        # Where there is no weight, autograd itself casts the bias's gradient to the bias's dtype.
        if is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0:
            grads = Backward.apply(grad, x, weight, mean, invstd, training, eps, need_input, need_weight, need_bias)
        else:
            grads = ops.backward(grad, x, weight, mean, invstd, training, need_input, need_weight, need_bias)
        return *grads, None


def _apply_eager_in_c(x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]) -> Any:
    """Eager.apply() for a torch whose own is Python: it looks for transforms, of which batch_norm() has found none.

    What is left of it to do is to unwrap tensors that have outlived the transform they come from.
    """
    return super(Function, Eager).apply(
        _unwrap_if_dead(x),
        None if weight is None else _unwrap_if_dead(weight),
        None if bias is None else _unwrap_if_dead(bias),
        rest,
    )


_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_apply_eager = _apply_eager_in_c if isinstance(Function.__dict__["apply"], classmethod) else Eager.apply


class Transformable(Function):
    """(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps) -> (y, mean, invstd)

    mean and invstd are what y was made with; they have no gradient of their own.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> tuple[Tensor, ...]:
        if training:
            return ops.forward_train(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
        return ops.forward_eval(x, weight, bias, running_mean, running_var, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        saved = (*inputs[:2], *output[1:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.training, _, ctx.eps = inputs[6:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        grads = Backward.apply(grad, *ctx.saved_tensors, ctx.training, ctx.eps, *ctx.needs_input_grad[:3])
        return *grads, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: None) -> tuple[Any, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        s = formulas.Standardised(x, mean, invstd, ctx.training, ctx.eps)
        dy = formulas.forward_tangent(s, weight, dx, dweight, dbias)
        return (None if dy is None else dy.to(x.dtype)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> tuple[tuple[Tensor, ...], batching.Dims]:
        return batching.forward(Transformable.apply, info.batch_size, in_dims, *args)


def _traced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """batch_norm() for a compiler: the new statistics are results, and writing them back is an operation it sees."""
    buffers = (running_mean, running_var, num_batches_tracked)
    outputs: tuple[Tensor, ...] = Traced.apply(x, weight, bias, *buffers, training, momentum, eps)
    for buffer, updated in zip(buffers, outputs[3:]):
        if buffer is not None:
            buffer.copy_(updated)
    return outputs[0]


def _exported_to_onnx(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """batch_norm() for ONNX: its own BatchNormalization, as which it knows torch's operator; in training, formulas."""
    if training:
        buffers = (running_mean, running_var, num_batches_tracked)
        return formulas.forward(x, weight, bias, *buffers, training, momentum, eps)
    return torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)


class Traced(Function):
    """Arguments as Transformable's -> (y, mean, invstd), and in training the buffers as they are to be afterwards."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> tuple[Tensor, ...]:
        if training:
            return ops.train_functional(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
        return ops.eval_op(x, weight, bias, running_mean, running_var, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:3])
        ctx.training = inputs[6]
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = ops.backward_op(grad, *ctx.saved_tensors, ctx.training, *needs)
        return *(g if need else None for g, need in zip(grads, needs)), None, None, None, None, None, None


class Backward(Function):
    """(grad, x, weight, mean, invstd, training, eps, need_input, need_weight, need_bias) -> (dx, dweight, dbias)

    Those that are not needed are None. mean and invstd are what the forward returned. In training they are functions of
    x, and x's derivatives are the total ones; otherwise they are constants. Theirs are never asked for.
    """

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        training: bool,
        eps: float,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return ops.backward(grad, x, weight, mean, invstd, training, need_input, need_weight, need_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.training, ctx.eps, *ctx.computed = inputs[5:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, x, weight, mean, invstd = ctx.saved_tensors
        s = formulas.Standardised(x, mean, invstd, ctx.training, ctx.eps)
        results = formulas.double_backward(s, grad, weight, cotangents, ctx.needs_input_grad[:3])
        return (
            *(None if result is None else result.to(like.dtype) for result, like in zip(results, (grad, x, weight))),
            *(None,) * 7,
        )

    @staticmethod
    def jvp(ctx: Any, dgrad: Tensor | None, dx: Tensor | None, dweight: Tensor | None, *_: None) -> tuple[Any, ...]:
        grad, x, weight, mean, invstd = ctx.saved_tensors
        s = formulas.Standardised(x, mean, invstd, ctx.training, ctx.eps)
        tangents = formulas.backward_tangent(s, grad, weight, dgrad, dx, dweight)
        parameter = weight if weight is not None else mean
        return tuple(
            None if not computed else torch.zeros_like(like) if tangent is None else tangent.to(like.dtype)
            for tangent, like, computed in zip(tangents, (x, parameter, parameter), ctx.computed)
        )

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> tuple[tuple[Tensor | None, ...], batching.Dims]:
        return batching.backward(Backward.apply, info.batch_size, in_dims, *args)
