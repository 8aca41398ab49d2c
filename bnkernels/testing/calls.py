"""One whole call of BatchNorm, and its judgement: inputs and outputs on one side, the reference on the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from .. import reference
from .gate import Verdict, expect_backward, expect_forward, judge


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradient to send back. Tensors keep the layout that the call will see."""

    x: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    momentum: float | None
    eps: float


@dataclass(frozen=True)
class Outputs:
    """What a backend gave; None: not judged."""

    y: Tensor | None = None
    mean: Tensor | None = None
    invstd: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


_ELEMENTS_AT_ONCE = 1 << 23
"""Channels are judged in blocks of about this many elements, so that memory does not grow with the tensor."""


def judge_call(inputs: Inputs, outputs: Outputs) -> list[Verdict]:
    """One verdict for each output that is there, worst first. The reference runs on the CPU.

    `inputs` must hold the running statistics as they were BEFORE the call.
    """
    channels = inputs.x.shape[1]
    step = max(1, _ELEMENTS_AT_ONCE * channels // max(1, inputs.x.numel()))
    worst: dict[str, Verdict] = {}
    for start in range(0, channels, step):
        block = slice(start, min(start + step, channels))
        for verdict in _judge_block(_slice_inputs(inputs, block), _slice_outputs(outputs, block)):
            position = 1 if verdict.quantity in ("y", "dx") else 0
            index = tuple(i + start if d == position else i for d, i in enumerate(verdict.index))
            verdict = replace(verdict, index=index)
            if verdict.quantity not in worst or verdict.ratio > worst[verdict.quantity].ratio:
                worst[verdict.quantity] = verdict
    if outputs.num_batches_tracked is not None and inputs.num_batches_tracked is not None:
        expected = int(inputs.num_batches_tracked) + int(inputs.training)
        got = int(outputs.num_batches_tracked)
        ratio = 0.0 if got == expected else math.inf
        worst["num_batches_tracked"] = Verdict(
            "num_batches_tracked", ratio, (), got, expected, 0.0, outputs.num_batches_tracked.dtype
        )
    return sorted(worst.values(), key=lambda v: -v.ratio)


def _judge_block(inputs: Inputs, outputs: Outputs) -> list[Verdict]:
    i = inputs
    forward = reference.forward(
        i.x, i.weight, i.bias, i.running_mean, i.running_var, i.num_batches_tracked, i.training, i.momentum, i.eps
    )
    expected = expect_forward(i.x, i.weight, i.bias, i.running_mean, i.running_var, forward, i.training, i.momentum)
    if any(t is not None for t in (outputs.dx, outputs.dweight, outputs.dbias)):
        backward = reference.backward(i.grad, i.x, i.weight, forward.mean, forward.invstd, i.training)
        expected.update(expect_backward(i.grad, i.x, i.weight, forward.mean, forward.invstd, backward, i.training))
    verdicts = []
    for name, expectation in expected.items():
        out = getattr(outputs, name)
        if out is not None:
            verdicts.append(judge(out, expectation))
    return verdicts


def _slice_inputs(i: Inputs, block: slice) -> Inputs:
    return Inputs(
        i.x[:, block].detach().cpu(),
        i.grad[:, block].detach().cpu(),
        _slice_vector(i.weight, block),
        _slice_vector(i.bias, block),
        _slice_vector(i.running_mean, block),
        _slice_vector(i.running_var, block),
        i.num_batches_tracked,
        i.training,
        i.momentum,
        i.eps,
    )


def _slice_outputs(o: Outputs, block: slice) -> Outputs:
    return Outputs(
        y=None if o.y is None else o.y[:, block].detach().cpu(),
        mean=_slice_vector(o.mean, block),
        invstd=_slice_vector(o.invstd, block),
        running_mean=_slice_vector(o.running_mean, block),
        running_var=_slice_vector(o.running_var, block),
        dx=None if o.dx is None else o.dx[:, block].detach().cpu(),
        dweight=_slice_vector(o.dweight, block),
        dbias=_slice_vector(o.dbias, block),
    )


def _slice_vector(t: Tensor | None, block: slice) -> Tensor | None:
    return None if t is None else t[block].detach().cpu()
