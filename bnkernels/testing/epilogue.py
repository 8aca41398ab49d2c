"""Epilogues, y = relu(v + residual), and the comparison of calls that have one with the reference.

A ReLU does not increase the distance of two values, so y has the tolerance of v plus the rounding of the addition.
Gradients are compared with the reference for the ReLU mask of the forward's own y: rounding in the forward decides the
sign of values near 0, and the backward must use exactly the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from .calls import Inputs, Outputs, judge_call
from .tolerance import ErrorReport, Expectation, accumulate_roundoff, expect_forward, judge

EPILOGUES = ("", "relu", "add", "add+relu")
"""The names of epilogues in cases."""


@dataclass(frozen=True)
class Epilogue:
    """The operations fused after normalisation; both parts are optional."""

    residual: Tensor | None = None
    """Has the shape, dtype and layout of x."""
    relu: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a residual nor a ReLU."""
        return self.residual is None and not self.relu

    @property
    def has_bounds(self) -> bool:
        """Whether the forward saves ReLU bounds, the interval of x with positive results."""
        return self.relu and self.residual is None


def make_epilogue(name: str, inputs: Inputs) -> Epilogue:
    """The epilogue with this name in EPILOGUES, for these inputs."""
    parts = name.split("+")
    return Epilogue(make_residual(inputs) if "add" in parts else None, "relu" in parts)


def expect_fused(inputs: Inputs, epilogue: Epilogue) -> Expectation:
    """The expectation for y, from v of the float64 reference. The addition adds one rounding."""
    i = inputs
    forward = reference.forward(
        i.x, i.weight, i.bias, i.running_mean, i.running_var, i.num_batches_tracked, i.training, i.momentum, i.eps
    )
    v = expect_forward(i.x, i.weight, i.bias, None, None, forward, i.training)["y"]
    value, scale = v.value, v.scale
    if epilogue.residual is not None:
        value = value + epilogue.residual.double()
        scale = scale + epilogue.residual.double().abs()
    return Expectation("y", value.relu() if epilogue.relu else value, scale, accumulate_roundoff(i.x.dtype))


def behind_relu(inputs: Inputs, y: Tensor) -> Inputs:
    """The inputs with grad replaced by the ReLU's input gradient, for its result `y`: 0 where y <= 0, as in torch."""
    return replace(inputs, grad=inputs.grad.masked_fill(y <= 0, 0))


def judge_fused(
    inputs: Inputs, epilogue: Epilogue, outputs: Outputs, device: torch.device | str = "cpu"
) -> list[ErrorReport]:
    """Error reports for the ops: y with the epilogue, and the gradients of the backward op.

    If the backward op applies the ReLU mask (ReLU bounds), the reference uses the mask of the forward's own y.
    `device`: as for judge_call, for the gradients; y is compared on the device of x.
    """
    assert outputs.y is not None
    own = behind_relu(inputs, outputs.y) if epilogue.has_bounds else inputs
    return [judge(outputs.y, expect_fused(inputs, epilogue)), *judge_call(own, replace(outputs, y=None), device)]


def at_the_sum(inputs: Inputs, epilogue: Epilogue, y: Tensor) -> Inputs:
    """The inputs with grad replaced by the gradient of v + residual, which is the gradient of the residual."""
    return behind_relu(inputs, y) if epilogue.relu else inputs


def judge_fused_call(
    inputs: Inputs, epilogue: Epilogue, outputs: Outputs, device: torch.device | str = "cpu"
) -> list[ErrorReport]:
    """judge_call() for a call through autograd, with or without an epilogue."""
    if epilogue.is_empty:
        return judge_call(inputs, outputs, device)
    assert outputs.y is not None
    return judge_fused(at_the_sum(inputs, epilogue, outputs.y), epilogue, outputs, device)


def let_through(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The elements where the ReLU backward passes the gradient: within their channel's bounds, or NaN."""
    rows = reference.channel_rows(x)
    return reference.from_channel_rows(
        ((low.double()[:, None] <= rows) & (rows <= high.double()[:, None])) | rows.isnan(), x.shape
    )


def wrongly_masked(inputs: Inputs, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where the bounds disagree with y = relu(...): nowhere, if they are correct.

    With a weight of 0, y is NaN where the deviation overflows, far from the mean on both sides. No interval can
    represent these elements, so they are excluded.
    """
    flat = torch.zeros(y.shape[1], dtype=torch.bool) if inputs.weight is None else inputs.weight == 0
    beyond = flat.view(1, -1, *(1,) * (y.dim() - 2)) & y.isnan() & ~inputs.x.isnan()
    return (let_through(inputs.x, low, high) == (y <= 0)) & ~beyond


def assert_bounds_are_exact(inputs: Inputs, y: Tensor, low: Tensor, high: Tensor, context: object) -> None:
    wrong = wrongly_masked(inputs, y, low, high)
    assert not wrong.any(), f"{context}: {int(wrong.sum())} elements, the first at {wrong.nonzero()[0].tolist()}"


def make_residual(inputs: Inputs) -> Tensor:
    """A residual with the strides of x: normal values, of the magnitude of v and of both signs."""
    generator = torch.Generator().manual_seed(inputs.x.numel())
    return torch.empty_like(inputs.x).copy_(torch.randn(inputs.x.shape, generator=generator))
