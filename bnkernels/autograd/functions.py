"""The autograd.Functions of y = relu(batch_norm(x) + residual), where the residual and the ReLU are optional.

    Eager            ordinary training: the backward calls the kernels
    Transformable    batch_norm without an epilogue, with jvp and vmap, for torch.func and forward-mode AD
    Traced           for torch.compile and torch.export: calls ops without side effects
    Backward         the backward kernel as a differentiable function, for double backward

The kernels (ops) and formulas.py do the computation.

Three forward functions are needed for two reasons. torch.func requires the setup_context form, for which torch binds
the arguments with inspect.signature() in every call. That takes longer than a small BatchNorm (23 us instead of 3 us,
measured with empty functions of these arguments). And torch.compile cannot trace a function that has a jvp.

The forward saves x, the weight and the statistics that it used, 2C values. The backward does not read the running
statistics, so the gradient of an eval forward is correct even if a training forward follows it. A ReLU without a
residual also saves its bounds, 2C values: the backward kernel compares x with them, so neither y nor a mask is saved or
read. A ReLU with a residual saves y, like torch's ReLU, and uses torch's backward for the ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.compiler import is_compiling
from torch.onnx import is_in_onnx_export

from bnkernels import _ops as ops

from . import batching, formulas

transforms_active = torch._C._are_functorch_transforms_active


def is_traced() -> bool:
    """Whether this call is traced by TorchDynamo, torch.export or AOTAutograd.

    Before torch 2.13, is_compiling() covers only the first two.
    """
    return is_compiling() or TracingContext.try_get() is not None


Spec = tuple["Tensor | None", "Tensor | None", "Tensor | None", bool, "float | None", float]
"""(running_mean, running_var, num_batches_tracked, training, momentum, eps)"""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(batch_norm(x) + residual), differentiable in x, weight, bias and residual.

    Training updates the buffers in `spec` that are not None, in place.

    x is (N, C, *), residual has its shape, dtype and device, num_batches_tracked is one int64, and the other tensors
    are (C,); all but x may be None. Dtypes: see bnkernels.batch_norm(). Inference requires running_mean and
    running_var. momentum=None, the cumulative average, requires num_batches_tracked.
    """
    running_mean, running_var, num_batches_tracked, training, momentum, eps = spec
    grad_enabled = is_grad_enabled()
    if grad_enabled and (
        (running_mean is not None and running_mean.requires_grad)
        or (running_var is not None and running_var.requires_grad)
    ):
        raise RuntimeError("batch_norm is not differentiable with respect to running_mean and running_var.")
    transformed = transforms_active() or forward_ad._current_level >= 0
    if (residual is not None or relu) and (transformed or is_in_onnx_export()):
        y = batch_norm(x, weight, bias, spec)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y
    if is_traced():
        if is_in_onnx_export():
            return _exported_to_onnx(x, weight, bias, spec)
        if transforms_active():
            # Compilers ignore the backward of a Function inside a transform of torch.func (torch 2.13: silently zeros).
            return formulas.forward(x, weight, bias, *spec)
        return _traced(x, weight, bias, spec, residual, relu)
    if transformed:
        outputs: tuple[Tensor, ...] = Transformable.apply(x, weight, bias, *spec)
        return outputs[0]
    if grad_enabled and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        result: Tensor = _apply_eager(x, weight, bias, (*spec, relu), residual)
        return result
    if training:
        return ops.forward_train(
            x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual, relu
        )[0]
    return ops.forward_eval(x, weight, bias, running_mean, running_var, eps, residual, relu)[0]


def _run(
    train: Callable[..., Any],
    evaluate: Callable[..., Any],
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
) -> Any:
    """Calls the forward op of the mode: returns (y, mean, invstd, relu_bounds, ...)."""
    if training:
        return train(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual, relu)
    return evaluate(x, weight, bias, running_mean, running_var, eps, residual, relu)


class Eager(Function):
    """(x, weight, bias, (*spec, relu), [residual]) -> y

    Arguments without a gradient are passed in one tuple, which autograd ignores, because each argument adds overhead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest: tuple[Any, ...],
        residual: Tensor | None = None,
    ) -> Tensor:
        running_mean, running_var, num_batches_tracked, training, momentum, eps, relu = rest
        if training:
            y, mean, invstd, bounds = ops.forward_train(
                x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual, relu
            )
        else:
            y, mean, invstd, bounds = ops.forward_eval(x, weight, bias, running_mean, running_var, eps, residual, relu)
        if relu:
            ctx.save_for_backward(x, weight, mean, invstd, bounds if residual is None else y)
        else:
            ctx.save_for_backward(x, weight, mean, invstd)
        ctx.call = (training, eps, relu, residual is not None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        training, eps, relu, has_residual = ctx.call
        if relu:
            x, weight, mean, invstd, passed = ctx.saved_tensors
        else:
            x, weight, mean, invstd = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        create_graph = is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0
        bounds = None
        if relu:
            if has_residual:
                grad = ops.threshold_backward(grad, passed, 0)
            elif create_graph:
                grad = formulas.relu_backward(grad, x, passed)
            else:
                bounds = passed
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if need_input or need_weight or need_bias:
            # Without a weight, grad_bias has the dtype of the statistics; autograd casts it to the dtype of the bias.
            if create_graph:
                grads = Backward.apply(grad, x, weight, mean, invstd, training, eps, need_input, need_weight, need_bias)
            else:
                grads = ops.backward(
                    grad, x, weight, mean, invstd, training, need_input, need_weight, need_bias, bounds
                )
        if has_residual:
            return *grads, None, grad if ctx.needs_input_grad[4] else None
        return *grads, None


def _apply_eager_in_c(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...], residual: Tensor | None
) -> Any:
    """Eager.apply() for versions of torch that implement Function.apply in Python.

    Function.apply checks for active transforms, which batch_norm() has already done, and unwraps tensors of transforms
    that have ended, which is done here.
    """
    last = () if residual is None else (_unwrap_if_dead(residual),)
    return super(Function, Eager).apply(
        _unwrap_if_dead(x),
        None if weight is None else _unwrap_if_dead(weight),
        None if bias is None else _unwrap_if_dead(bias),
        rest,
        *last,
    )


def _apply_eager_default(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...], residual: Tensor | None
) -> Any:
    return Eager.apply(x, weight, bias, rest, *(() if residual is None else (residual,)))


_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_apply_eager = _apply_eager_in_c if isinstance(Function.__dict__["apply"], classmethod) else _apply_eager_default


class Transformable(Function):
    """(x, weight, bias, *spec) -> (y, mean, invstd)

    mean and invstd are the statistics used to compute y, (C,). They are not differentiable.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, *spec: Any) -> tuple[Tensor, ...]:
        rest = (*spec, False)  # no ReLU
        outputs: tuple[Tensor, ...] = _run(ops.forward_train, ops.forward_eval, x, weight, bias, None, *rest)
        return outputs[:3]

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
        s = formulas.NormalisedInput(x, mean, invstd, ctx.training, ctx.eps)
        dy = formulas.forward_tangent(s, weight, dx, dweight, dbias)
        return (None if dy is None else dy.to(x.dtype)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> tuple[tuple[Tensor, ...], batching.Dims]:
        return batching.forward(Transformable.apply, info.batch_size, in_dims, *args)


def _traced(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec, residual: Tensor | None, relu: bool
) -> Tensor:
    """batch_norm() for compilers: a functional op returns the new buffers, and traceable copies write them back."""
    outputs: tuple[Tensor, ...] = Traced.apply(x, weight, bias, residual, *spec, relu)
    for buffer, updated in zip(spec[:3], outputs[4:]):
        if buffer is not None:
            buffer.copy_(updated)
    return outputs[0]


def _exported_to_onnx(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec) -> Tensor:
    """batch_norm() for ONNX: F.batch_norm, exported as BatchNormalization, in inference; formulas in training."""
    running_mean, running_var, _, training, _, eps = spec
    if training:
        return formulas.forward(x, weight, bias, *spec)
    return torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)


class Traced(Function):
    """(x, weight, bias, residual, *spec, relu) -> (y, mean, invstd, relu_bounds, *(new buffers in training))"""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _run(ops.train_functional, ops.eval_op, x, weight, bias, residual, *rest)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, residual, *_, ctx.training, _, _, ctx.relu = inputs
        y, mean, invstd, bounds = output[:4]
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, weight, mean, invstd, None if not ctx.relu else y if ctx.has_residual else bounds)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, passed = ctx.saved_tensors
        *needs, need_residual = ctx.needs_input_grad[:4]
        if ctx.relu and ctx.has_residual:
            grad = ops.threshold_backward(grad, passed, 0)
        bounds = passed if ctx.relu and not ctx.has_residual else None
        grads = ops.backward_op(grad, x, weight, mean, invstd, ctx.training, *needs, bounds)
        return (
            *(g if need else None for g, need in zip(grads, needs)),
            grad if need_residual else None,
            *(None,) * 7,
        )


class Backward(Function):
    """(grad, x, weight, mean, invstd, training, eps, need_input, need_weight, need_bias) -> (dx, dweight, dbias)

    Results that are not needed are None. mean and invstd are those of the forward. In training they are functions of x,
    and derivatives with respect to x are total derivatives; in inference they are constants. Gradients with respect to
    mean and invstd are never required.
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
        s = formulas.NormalisedInput(x, mean, invstd, ctx.training, ctx.eps)
        results = formulas.double_backward(s, grad, weight, cotangents, ctx.needs_input_grad[:3])
        return (
            *(None if result is None else result.to(like.dtype) for result, like in zip(results, (grad, x, weight))),
            *(None,) * 7,
        )

    @staticmethod
    def jvp(ctx: Any, dgrad: Tensor | None, dx: Tensor | None, dweight: Tensor | None, *_: None) -> tuple[Any, ...]:
        grad, x, weight, mean, invstd = ctx.saved_tensors
        s = formulas.NormalisedInput(x, mean, invstd, ctx.training, ctx.eps)
        tangents = formulas.backward_tangent(s, grad, weight, dgrad, dx, dweight)
        parameter = weight if weight is not None else mean
        return tuple(
            None if not computed else torch.zeros_like(like) if tangent is None else tangent.to(like.dtype)
            for tangent, like, computed in zip(tangents, (x, parameter, parameter), ctx.computed)
        )

    @staticmethod
    def vmap(info: Any, in_dims: batching.Dims, *args: Any) -> tuple[tuple[Tensor | None, ...], batching.Dims]:
        return batching.backward(Backward.apply, info.batch_size, in_dims, *args)
