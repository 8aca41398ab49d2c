"""Checks each provider's results elementwise against the float64 reference before it is timed.

The bound is that of bnkernels.testing, which the tests and `python -m bnkernels.check` use for every backend. The
reference runs on the device of the inputs, in blocks of channels: once for all providers, or, with an epilogue, once
for each, because the ReLU backward depends on the provider's own y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnkernels import reference
from bnkernels.testing import Epilogue, Inputs, Outputs, at_the_sum, judge_fused_call, tolerance

from .cases import Buffers, Case
from .providers import OURS, TITLES, Provider, make_layer
from .results import ToleranceRecord

_ELEMENTS_AT_ONCE = 1 << 23


class ToleranceError(RuntimeError):
    """Results of bnkernels are outside the bound. The message names each of them."""

    def __init__(self, message: str, records: list[ToleranceRecord]) -> None:
        super().__init__(message)
        self.records = records  # of all providers


@dataclass(frozen=True)
class Outcome:
    """The results of one provider. Gradients and running statistics are None in evaluation."""

    y: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dresidual: Tensor | None = None


def run_once(provider: Provider, buffers: Buffers, training: bool) -> Outcome:
    """One call on the buffers, from the initial running statistics. Returns copies."""
    layer, module = provider.layer, provider.module
    provider.reset()
    module.train(training)
    if not training:
        with torch.no_grad():
            return Outcome(module(*buffers.inputs).clone())
    y = module(*buffers.inputs)
    grads = torch.autograd.grad(y, provider.leaves(buffers), buffers.grad)
    assert layer.running_mean is not None and layer.running_var is not None
    return Outcome(y.detach(), layer.running_mean.clone(), layer.running_var.clone(), *grads)


def _channels(tensor: Tensor, block: slice) -> Tensor:
    return tensor[block] if tensor.dim() == 1 else tensor[:, block]


def judge(
    case: Case, buffers: Buffers, outcomes: Mapping[str, Outcome], training: bool
) -> dict[str, list[tolerance.ErrorReport]]:
    """The worst error report of each quantity by provider, worst first."""
    layer = make_layer(case, buffers.x.device)  # the parameters and statistics that every provider starts from
    channels = case.shape.channels
    step = max(1, _ELEMENTS_AT_ONCE * channels // max(1, case.elements))
    worst: dict[str, dict[str, tolerance.ErrorReport]] = {name: {} for name in outcomes}
    for start in range(0, channels, step):
        block = slice(start, start + step)
        inputs = _inputs(layer, buffers, block, training)
        expected = {} if case.epilogue else _expect(inputs)
        for name, outcome in outcomes.items():
            given = {what: _channels(out, block) for what, out in vars(outcome).items() if out is not None}
            if case.epilogue:
                residual = None if buffers.residual is None else _channels(buffers.residual.detach(), block)
                error_reports = _judge_epilogue(inputs, Epilogue(residual, case.relu), given)
            else:
                error_reports = [
                    tolerance.judge(given[quantity], expected[quantity]) for quantity in given.keys() & expected
                ]
            for error_report in error_reports:
                known = worst[name].get(error_report.quantity)
                if known is None or error_report.ratio > known.ratio:
                    worst[name][error_report.quantity] = error_report
    return {name: sorted(error_reports.values(), key=lambda v: -v.ratio) for name, error_reports in worst.items()}


def _inputs(layer: torch.nn.BatchNorm2d, buffers: Buffers, block: slice, training: bool) -> Inputs:
    assert layer.running_mean is not None and layer.running_var is not None
    return Inputs(
        x=buffers.x.detach()[:, block],
        grad=buffers.grad[:, block],
        weight=layer.weight.detach()[block],
        bias=layer.bias.detach()[block],
        running_mean=layer.running_mean[block],
        running_var=layer.running_var[block],
        num_batches_tracked=None,
        training=training,
        momentum=layer.momentum,
        eps=layer.eps,
    )


def _expect(i: Inputs) -> dict[str, tolerance.Expectation]:
    forward = reference.forward(
        i.x, i.weight, i.bias, i.running_mean, i.running_var, training=i.training, momentum=i.momentum, eps=i.eps
    )
    expected = tolerance.expect_forward(
        i.x, i.weight, i.bias, i.running_mean, i.running_var, forward, i.training, i.momentum
    )
    if i.training:
        backward = reference.backward(i.grad, i.x, i.weight, forward.mean, forward.invstd)
        expected |= tolerance.expect_backward(i.grad, i.x, i.weight, forward.mean, forward.invstd, backward, i.training)
    return expected


def _judge_epilogue(inputs: Inputs, epilogue: Epilogue, given: Mapping[str, Tensor]) -> list[tolerance.ErrorReport]:
    """The error reports of one provider. The gradient of the residual is that of the sum, unrounded."""
    outputs = Outputs(**{name: out for name, out in given.items() if name != "dresidual"})
    error_reports = judge_fused_call(inputs, epilogue, outputs, inputs.x.device)
    if "dresidual" in given:
        value = at_the_sum(inputs, epilogue, given["y"]).grad.double()
        exact = tolerance.Expectation("dresidual", value, torch.zeros_like(value), u_acc=0.0)
        error_reports.append(tolerance.judge(given["dresidual"], exact))
    return error_reports


def check(case: Case, providers: Mapping[str, Provider], buffers: Buffers, training: bool) -> list[ToleranceRecord]:
    """Runs and checks all providers on one case. ToleranceError if bnkernels is outside the bound."""
    outcomes = {name: run_once(provider, buffers, training) for name, provider in providers.items()}
    direction = "step" if training else "eval"
    records = []
    outside: list[str] = []
    for name, error_reports in judge(case, buffers, outcomes, training).items():
        first = error_reports[0]
        records.append(ToleranceRecord(name, str(case), direction, first.ratio, first.quantity))
        if name == OURS:
            outside += [str(error_report) for error_report in error_reports if not error_report.ok]
    if outside:
        raise ToleranceError(
            f"{TITLES[OURS]} is outside the bound on {case}, {direction}: {'; '.join(outside)}", records
        )
    return records
