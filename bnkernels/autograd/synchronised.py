"""batch_norm of a batch that lies on several ranks: two kernels, one exchange and one kernel, in each direction.

    Eager            forward: statistics of the rank's part -> gather -> join -> normalize
                     backward: sums of the rank's part -> gather -> gradient of the input
    Traced           the same of ops without side effects, for torch.compile
    Backward         the backward, as a function that is differentiable in its turn
    Total            the sum over the ranks, which its derivatives are made of

The gradient of the weight and of the bias is the rank's part of it, as that of any other layer: whoever averages
gradients between ranks (DDP, FSDP) sums these too.

How many values there are in all is known on the device alone: it travels with the statistics and no host waits for it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function, once_differentiable
from torch.compiler import is_compiling

from bnkernels import ops
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
    """y of batch_norm in training, for this rank's part x of the batch; the buffers that are there are updated.

    Every rank calls it, in the same order; x may be empty. Arguments otherwise as batch_norm's.
    """
    if transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{ranks.layer}: transforms of torch.func and forward-mode AD are not supported where statistics are "
            "synchronised between ranks; in eval mode, or without a process group, they are"
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

        s = formulas.Synchronised(x, ctx.eps, count, total)
        results = formulas.double_backward(s, grad, weight, cotangents, ctx.needs_input_grad[:3])
        return (
            *(None if result is None else result.to(like.dtype) for result, like in zip(results, (grad, x, weight))),
            *(None,) * 6,
        )


class Total(Function):
    """(v, ranks) -> the sum of the ranks' v. Each rank's v moves the results of all: the gradient is such a sum too."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(v.reshape(-1), v, "a sum of the double backward").sum(0).view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Total.apply(grad, ctx.ranks), None


class Traced(Function):
    """(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, group_name, size) ->
    (y, and the buffers as they are to be afterwards)"""

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
