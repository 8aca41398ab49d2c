"""Inputs and Outputs of one call of BatchNorm, and their comparison with the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from .tolerance import ErrorReport, Expectation, expect_backward, expect_forward, judge


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradient for its backward. Tensors have the layout under test."""

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
    """The outputs of a backend. None: not compared."""

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
"""Channels are compared in blocks of about this many elements, which bounds the memory of the float64 copies."""


def judge_call(inputs: Inputs, outputs: Outputs, device: torch.device | str = "cpu") -> list[ErrorReport]:
    """One error report for each output that is not None, worst first.

    `inputs` must contain the running statistics from BEFORE the call. The reference runs on `device`; use a GPU for
    tensors so large that the reference takes minutes on the CPU.
    """
    return judge_calls(inputs, [outputs], device)[0]


def judge_calls(
    inputs: Inputs, providers: list[Outputs], device: torch.device | str = "cpu"
) -> list[list[ErrorReport]]:
    """`judge_call` for several outputs of the same inputs, with a single run of the reference."""
    channels = inputs.x.shape[1]
    step = max(1, _ELEMENTS_AT_ONCE * channels // max(1, inputs.x.numel()))
    worst: list[dict[str, ErrorReport]] = [{} for _ in providers]
    for start in range(0, channels, step):
        block = slice(start, min(start + step, channels))
        expected = _expectations(_slice_inputs(inputs, block, device))
        for outputs, so_far in zip(providers, worst):
            for error_report in _judge_block(expected, _slice_outputs(outputs, block, device)):
                position = 1 if error_report.quantity in ("y", "dx") else 0
                index = tuple(i + start if d == position else i for d, i in enumerate(error_report.index))
                if error_report.quantity not in so_far or error_report.ratio > so_far[error_report.quantity].ratio:
                    so_far[error_report.quantity] = replace(error_report, index=index)
    for outputs, so_far in zip(providers, worst):
        if outputs.num_batches_tracked is not None and inputs.num_batches_tracked is not None:
            got, before = int(outputs.num_batches_tracked), int(inputs.num_batches_tracked)
            after = before + int(inputs.training)
            ratio = 0.0 if got == after else math.inf
            so_far["num_batches_tracked"] = ErrorReport("num_batches_tracked", ratio, (), got, after, 0.0, torch.int64)
    return [sorted(error_reports.values(), key=lambda v: -v.ratio) for error_reports in worst]


def _expectations(inputs: Inputs) -> dict[str, Expectation]:
    i = inputs
    forward = reference.forward(
        i.x, i.weight, i.bias, i.running_mean, i.running_var, i.num_batches_tracked, i.training, i.momentum, i.eps
    )
    expected = expect_forward(i.x, i.weight, i.bias, i.running_mean, i.running_var, forward, i.training, i.momentum)
    backward = reference.backward(i.grad, i.x, i.weight, forward.mean, forward.invstd, i.training)
    return expected | expect_backward(i.grad, i.x, i.weight, forward.mean, forward.invstd, backward, i.training)


def _judge_block(expected: dict[str, Expectation], outputs: Outputs) -> list[ErrorReport]:
    error_reports = []
    for name, expectation in expected.items():
        out = getattr(outputs, name)
        if out is not None:
            error_reports.append(judge(out, expectation))
    return error_reports


def _slice_inputs(i: Inputs, block: slice, device: torch.device | str) -> Inputs:
    return Inputs(
        i.x[:, block].detach().to(device),
        i.grad[:, block].detach().to(device),
        _slice_vector(i.weight, block, device),
        _slice_vector(i.bias, block, device),
        _slice_vector(i.running_mean, block, device),
        _slice_vector(i.running_var, block, device),
        i.num_batches_tracked,
        i.training,
        i.momentum,
        i.eps,
    )


def _slice_outputs(o: Outputs, block: slice, device: torch.device | str) -> Outputs:
    return Outputs(
        y=None if o.y is None else o.y[:, block].detach().to(device),
        mean=_slice_vector(o.mean, block, device),
        invstd=_slice_vector(o.invstd, block, device),
        running_mean=_slice_vector(o.running_mean, block, device),
        running_var=_slice_vector(o.running_var, block, device),
        dx=None if o.dx is None else o.dx[:, block].detach().to(device),
        dweight=_slice_vector(o.dweight, block, device),
        dbias=_slice_vector(o.dbias, block, device),
    )


def _slice_vector(t: Tensor | None, block: slice, device: torch.device | str) -> Tensor | None:
    return None if t is None else t[block].detach().to(device)
