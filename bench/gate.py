"""No number without this: each contestant's results, elementwise against the float64 reference, before it is timed.

The bound is bnkernels.testing's, the same that the tests and `python -m bnkernels.check` hold every backend to. The
reference runs on the device of the inputs, once for all contestants, a block of channels at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnkernels import reference
from bnkernels.testing import gate

from .cases import Buffers, Case
from .contestants import OURS, TITLES, Contestant, make_layer
from .results import GateRecord

_ELEMENTS_AT_ONCE = 1 << 23


class GateError(RuntimeError):
    """bnkernels' own results are outside the bound: there is nothing to time."""


@dataclass(frozen=True)
class Outcome:
    """What one contestant made of a case. Gradients are None in evaluation, running statistics too."""

    y: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


def run_once(contestant: Contestant, buffers: Buffers, training: bool) -> Outcome:
    """One call on the buffers, from the layer's initial running statistics; what it gave is copied."""
    layer, module = contestant.layer, contestant.module
    contestant.reset()
    module.train(training)
    if not training:
        with torch.no_grad():
            return Outcome(module(buffers.x).clone())
    y = module(buffers.x)
    dx, dweight, dbias = torch.autograd.grad(y, contestant.leaves(buffers), buffers.grad)
    assert layer.running_mean is not None and layer.running_var is not None
    return Outcome(y.detach(), layer.running_mean.clone(), layer.running_var.clone(), dx, dweight, dbias)


def _channels(tensor: Tensor | None, block: slice) -> Tensor | None:
    if tensor is None:
        return None
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
        expected = _expect(layer, buffers, block, training)
        for name, outcome in outcomes.items():
            for quantity, expectation in expected.items():
                out = _channels(getattr(outcome, quantity, None), block)
                if out is None:
                    continue
                verdict = gate.judge(out, expectation)
                known = worst[name].get(quantity)
                if known is None or verdict.ratio > known.ratio:
                    worst[name][quantity] = verdict
    return {name: sorted(verdicts.values(), key=lambda v: -v.ratio) for name, verdicts in worst.items()}


def _expect(layer: torch.nn.BatchNorm2d, buffers: Buffers, block: slice, training: bool) -> dict[str, gate.Expectation]:
    x, grad = buffers.x.detach()[:, block], buffers.grad[:, block]
    weight, bias = layer.weight.detach()[block], layer.bias.detach()[block]
    running_mean, running_var = _channels(layer.running_mean, block), _channels(layer.running_var, block)
    forward = reference.forward(
        x, weight, bias, running_mean, running_var, training=training, momentum=layer.momentum, eps=layer.eps
    )
    expected = gate.expect_forward(x, weight, bias, running_mean, running_var, forward, training, layer.momentum)
    if training:
        backward = reference.backward(grad, x, weight, forward.mean, forward.invstd)
        expected |= gate.expect_backward(grad, x, weight, forward.mean, forward.invstd, backward, training)
    return expected


def hold(case: Case, contestants: Mapping[str, Contestant], buffers: Buffers, training: bool) -> list[GateRecord]:
    """Runs and judges all contestants on one case; GateError if it is ours that is outside the bound."""
    outcomes = {name: run_once(contestant, buffers, training) for name, contestant in contestants.items()}
    direction = "step" if training else "eval"
    records = []
    for name, verdicts in judge(case, buffers, outcomes, training).items():
        first = verdicts[0]
        records.append(GateRecord(name, str(case), direction, first.ratio, first.quantity))
        if name == OURS and not first.ok:
            lines = "\n  ".join(str(verdict) for verdict in verdicts if not verdict.ok)
            raise GateError(f"{TITLES[OURS]} is outside the bound on {case}, {direction}:\n  {lines}")
    return records
