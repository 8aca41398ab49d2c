"""No number without this: each contestant's results, elementwise against the float64 reference, before it is timed.

The bound is bnkernels.testing's, the same that the tests and `python -m bnkernels.check` hold every backend to. The
reference runs on the device of the inputs, a block of channels at a time; once for all contestants, unless something
follows, as each has to know the gradient of a ReLU behind its own y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnkernels import reference
from bnkernels.testing import Epilogue, Inputs, Outputs, at_the_sum, gate, judge_fused_call

from .cases import Buffers, Case
from .contestants import OURS, TITLES, Contestant, make_layer
from .results import GateRecord

_ELEMENTS_AT_ONCE = 1 << 23


class GateError(RuntimeError):
    """bnkernels' own results are outside the bound: there is nothing to time. The message names each one that is."""

    def __init__(self, message: str, records: list[GateRecord]) -> None:
        super().__init__(message)
        self.records = records  # of all contestants


@dataclass(frozen=True)
class Outcome:
    """What one contestant made of a case. Gradients are None in evaluation, running statistics too."""

    y: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dresidual: Tensor | None = None


def run_once(contestant: Contestant, buffers: Buffers, training: bool) -> Outcome:
    """One call on the buffers, from the layer's initial running statistics; what it gave is copied."""
    layer, module = contestant.layer, contestant.module
    contestant.reset()
    module.train(training)
    if not training:
        with torch.no_grad():
            return Outcome(module(*buffers.inputs).clone())
    y = module(*buffers.inputs)
    grads = torch.autograd.grad(y, contestant.leaves(buffers), buffers.grad)
    assert layer.running_mean is not None and layer.running_var is not None
    return Outcome(y.detach(), layer.running_mean.clone(), layer.running_var.clone(), *grads)


def _channels(tensor: Tensor, block: slice) -> Tensor:
    return tensor[block] if tensor.dim() == 1 else tensor[:, block]


def judge(
    case: Case, buffers: Buffers, outcomes: Mapping[str, Outcome], training: bool
) -> dict[str, list[gate.Verdict]]:
    """For each contestant the worst verdict of every quantity that it gave, worst first."""
    layer = make_layer(case, buffers.x.device)  # the parameters and statistics that every contestant started from
    channels = case.shape.channels
    step = max(1, _ELEMENTS_AT_ONCE * channels // max(1, case.elements))
    worst: dict[str, dict[str, gate.Verdict]] = {name: {} for name in outcomes}
    for start in range(0, channels, step):
        block = slice(start, start + step)
        inputs = _inputs(layer, buffers, block, training)
        expected = {} if case.epilogue else _expect(inputs)
        for name, outcome in outcomes.items():
            given = {what: _channels(out, block) for what, out in vars(outcome).items() if out is not None}
            if case.epilogue:
                residual = None if buffers.residual is None else _channels(buffers.residual.detach(), block)
                verdicts = _judge_fused(inputs, Epilogue(residual, case.relu), given)
            else:
                verdicts = [gate.judge(given[quantity], expected[quantity]) for quantity in given.keys() & expected]
            for verdict in verdicts:
                known = worst[name].get(verdict.quantity)
                if known is None or verdict.ratio > known.ratio:
                    worst[name][verdict.quantity] = verdict
    return {name: sorted(verdicts.values(), key=lambda v: -v.ratio) for name, verdicts in worst.items()}


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


def _expect(i: Inputs) -> dict[str, gate.Expectation]:
    forward = reference.forward(
        i.x, i.weight, i.bias, i.running_mean, i.running_var, training=i.training, momentum=i.momentum, eps=i.eps
    )
    expected = gate.expect_forward(
        i.x, i.weight, i.bias, i.running_mean, i.running_var, forward, i.training, i.momentum
    )
    if i.training:
        backward = reference.backward(i.grad, i.x, i.weight, forward.mean, forward.invstd)
        expected |= gate.expect_backward(i.grad, i.x, i.weight, forward.mean, forward.invstd, backward, i.training)
    return expected


def _judge_fused(inputs: Inputs, epilogue: Epilogue, given: Mapping[str, Tensor]) -> list[gate.Verdict]:
    """One contestant's. The residual's gradient is that of the sum, unrounded."""
    outputs = Outputs(**{name: out for name, out in given.items() if name != "dresidual"})
    verdicts = judge_fused_call(inputs, epilogue, outputs, inputs.x.device)
    if "dresidual" in given:
        value = at_the_sum(inputs, epilogue, given["y"]).grad.double()
        exact = gate.Expectation("dresidual", value, torch.zeros_like(value), u_acc=0.0)
        verdicts.append(gate.judge(given["dresidual"], exact))
    return verdicts


def hold(case: Case, contestants: Mapping[str, Contestant], buffers: Buffers, training: bool) -> list[GateRecord]:
    """Runs and judges all contestants on one case; GateError if it is ours that is outside the bound."""
    outcomes = {name: run_once(contestant, buffers, training) for name, contestant in contestants.items()}
    direction = "step" if training else "eval"
    records = []
    outside: list[str] = []
    for name, verdicts in judge(case, buffers, outcomes, training).items():
        first = verdicts[0]
        records.append(GateRecord(name, str(case), direction, first.ratio, first.quantity))
        if name == OURS:
            outside += [str(verdict) for verdict in verdicts if not verdict.ok]
    if outside:
        raise GateError(f"{TITLES[OURS]} is outside the bound on {case}, {direction}: {'; '.join(outside)}", records)
    return records
