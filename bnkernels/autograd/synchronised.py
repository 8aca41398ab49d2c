"""batch_norm of a batch that is distributed over several ranks, with one collective in each direction.

    Eager            forward: statistics of the rank's part -> all-gather -> combine -> normalize
                     backward: gradient sums of the rank's part -> all-gather -> gradient of the input
    Traced           the same with ops without side effects, for torch.compile
    Backward         the backward as a differentiable function, for double backward
    Total            the differentiable sum over ranks that the double backward uses

The gradients of weight and bias are those of the rank's part of the batch, as for any other layer: DDP and FSDP reduce
them over the ranks.

The total number of values per channel is exchanged with the statistics and stays on the device; the host never waits
for it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, once_differentiable
from torch.compiler import is_compiling

from bnkernels import _ops as ops
from bnkernels.ranks import Ranks, gather_traced

from . import formulas
from .functions import transforms_active


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    ranks: Ranks,
) -> Tensor:
    """y of batch_norm in training for this rank's part x (N, C, *) of the batch. Updates the given buffers in place.

    Every rank must call it in the same order; x may be empty. Other arguments: see batch_norm().

    Raises:
        NotImplementedError: a transform of torch.func or forward-mode AD is active.
        RuntimeError: the collective failed; see Ranks.gather().
    """
    if transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{ranks.layer}: transforms of torch.func and forward-mode AD are not supported while statistics are "
            "synchronised between ranks. They are supported in eval mode and without a process group"
        )
    buffers = (running_mean, running_var, num_batches_tracked)
    if is_compiling():
        outputs: tuple[Tensor, ...] = Traced.apply(
            x, weight, bias, *buffers, momentum, eps, ranks.group.group_name, ranks.size
        )
        for buffer, updated in zip(buffers, outputs[1:]):
            if buffer is not None:
                buffer.copy_(updated)
        return outputs[0]
    y: Tensor = Eager.apply(x, weight, bias, (*buffers, momentum, eps, ranks))
    return y


class Eager(Function):
    """(x, weight, bias, (running_mean, running_var, num_batches_tracked, momentum, eps, ranks)) -> y"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest: tuple[Tensor | None, Tensor | None, Tensor | None, float | None, float, Ranks],
    ) -> Tensor:
        *buffers, momentum, eps, ranks = rest
        rows = ranks.gather(ops.sync_statistics(x, eps), x, "the forward")
        mean, invstd, count = ops.sync_combine(rows, *buffers, momentum, eps, x.dtype)
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.eps, ctx.ranks = eps, ranks
        y: Tensor = ops.sync_normalize(x, weight, bias, mean, invstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = Backward.apply(grad, *ctx.saved_tensors, ctx.eps, ctx.ranks, ctx.needs_input_grad[:3])
        return *grads, None


class Backward(Function):
    """(grad, x, weight, mean, invstd, count, eps, ranks, needs) -> (dx, dweight, dbias), None where not needed."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        eps: float,
        ranks: Ranks,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        need_input, need_weight, need_bias = needs
        ctx.save_for_backward(grad, x, weight, count)
        ctx.eps, ctx.ranks = eps, ranks
        ctx.set_materialize_grads(False)
        row, dweight, dbias = ops.sync_grad_sums(grad, x, weight, mean, invstd, need_weight, need_bias)
        dx = None
        if need_input:
            rows = ranks.gather(row, x, "the backward")
            dx = ops.sync_grad_input(grad, x, weight, mean, invstd, rows, count)
        return dx, dweight if need_weight and weight is not None else None, dbias if need_bias else None

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, x, weight, count = ctx.saved_tensors

        def total(v: Tensor) -> Tensor:
            summed: Tensor = Total.apply(v, ctx.ranks)
            return summed

        s = formulas.SynchronisedInput(x, ctx.eps, count, total)
        results = formulas.double_backward(s, grad, weight, cotangents, ctx.needs_input_grad[:3])
        return (
            *(None if result is None else result.to(like.dtype) for result, like in zip(results, (grad, x, weight))),
            *(None,) * 6,
        )


class Total(Function):
    """(v, ranks) -> the sum of v over the ranks. Its gradient is the sum of the gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(v.reshape(-1), v, "a sum of the double backward").sum(0).view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Total.apply(grad, ctx.ranks), None


class Traced(Function):
    """(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, group_name, size) ->
    (y, *(updated buffers))"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        group_name: str,
        size: int,
    ) -> tuple[Tensor, ...]:
        rows = gather_traced(ops.sync_statistics(x, eps), group_name, size)
        mean, invstd, count, *updated = ops.sync_combine_functional(
            rows, running_mean, running_var, num_batches_tracked, momentum, eps, x.dtype
        )
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.group_name, ctx.size = group_name, size
        ctx.mark_non_differentiable(*updated)
        return ops.sync_normalize(x, weight, bias, mean, invstd), *updated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        row, dweight, dbias = ops.sync_grad_sums(grad, x, weight, mean, invstd, need_weight, need_bias)
        dx = None
        if need_input:
            rows = gather_traced(row, ctx.group_name, ctx.size)
            dx = ops.sync_grad_input(grad, x, weight, mean, invstd, rows, count)
        return (
            dx,
            dweight if need_weight and weight is not None else None,
            dbias if need_bias else None,
            *(None,) * 7,
        )
