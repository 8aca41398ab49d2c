"""What may follow a normalised value in the same kernel, y = relu(v + residual), and how a call with it is judged.

A ReLU moves no two values apart, so y is held to the tolerance of v, with what the addition may round on top. The
gradients are held to the tolerance behind the forward's own y: whether a value near 0 has passed is the forward's to
round, and the backward has to know it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from .calls import Inputs, Outputs, judge_call
from .tolerance import ErrorReport, Expectation, accumulate_roundoff, expect_forward, judge

EPILOGUES = ("", "relu", "add", "add+relu")
"""By the names that cases have for them."""


@dataclass(frozen=True)
class Epilogue:
    """An epilogue: each part if it is there."""

    residual: Tensor | None = None
    """Of x's shape, dtype and layout."""
    relu: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows."""
        return self.residual is None and not self.relu

    @property
    def has_bounds(self) -> bool:
        """Whether the forward leaves the interval of x that the ReLU lets through."""
        return self.relu and self.residual is None


def make_epilogue(name: str, inputs: Inputs) -> Epilogue:
    """The one of that name in EPILOGUES, for these inputs."""
    parts = name.split("+")
    return Epilogue(make_residual(inputs) if "add" in parts else None, "relu" in parts)


def expect_fused(inputs: Inputs, epilogue: Epilogue) -> Expectation:
    """Of y, from the float64 reference's v. A ReLU moves no two values apart; what is added is rounded once more."""
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
    """The same with the gradient that a ReLU whose result is `y` hands on: as in torch, where y is not 0 or less."""
    return replace(inputs, grad=inputs.grad.masked_fill(y <= 0, 0))


def judge_fused(
    inputs: Inputs, epilogue: Epilogue, outputs: Outputs, device: torch.device | str = "cpu"
) -> list[ErrorReport]:
    """Of the ops: y against the reference with the epilogue; gradients against its backward behind the forward's own y,
    where the backward op knows the ReLU.

    `device`: as for judge_call, of the gradients; y is judged where x is.
    """
    assert outputs.y is not None
    own = behind_relu(inputs, outputs.y) if epilogue.has_bounds else inputs
    return [judge(outputs.y, expect_fused(inputs, epilogue)), *judge_call(own, replace(outputs, y=None), device)]


def at_the_sum(inputs: Inputs, epilogue: Epilogue, y: Tensor) -> Inputs:
    """The same with the gradient that arrives at v + residual, whose epilogue made `y`: the residual's gradient."""
    return behind_relu(inputs, y) if epilogue.relu else inputs


def judge_fused_call(
    inputs: Inputs, epilogue: Epilogue, outputs: Outputs, device: torch.device | str = "cpu"
) -> list[ErrorReport]:
    """judge_call() of a whole call, which may have an epilogue: gradients are behind its ReLU, whichever op's it is."""
    if epilogue.is_empty:
        return judge_call(inputs, outputs, device)
    assert outputs.y is not None
    return judge_fused(at_the_sum(inputs, epilogue, outputs.y), epilogue, outputs, device)


def let_through(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The elements that the backward of a ReLU takes for positive: within their channel's interval, or NaN."""
    rows = reference.channel_rows(x)
    return reference.from_channel_rows(
        ((low.double()[:, None] <= rows) & (rows <= high.double()[:, None])) | rows.isnan(), x.shape
    )


def wrongly_masked(inputs: Inputs, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where the interval and y = relu(...) disagree: nowhere, if it is right.

    A weight of 0 makes y NaN where the deviation overflows, far from the mean on both sides of it: no interval holds
    just those, and they are not looked at.
    """
    flat = torch.zeros(y.shape[1], dtype=torch.bool) if inputs.weight is None else inputs.weight == 0
    beyond = flat.view(1, -1, *(1,) * (y.dim() - 2)) & y.isnan() & ~inputs.x.isnan()
    return (let_through(inputs.x, low, high) == (y <= 0)) & ~beyond


def assert_bounds_are_exact(inputs: Inputs, y: Tensor, low: Tensor, high: Tensor, context: object) -> None:
    wrong = wrongly_masked(inputs, y, low, high)
    assert not wrong.any(), f"{context}: {int(wrong.sum())} elements, the first at {wrong.nonzero()[0].tolist()}"


def make_residual(inputs: Inputs) -> Tensor:
    """As large as v is, of both signs, where x's elements lie."""
    generator = torch.Generator().manual_seed(inputs.x.numel())
    return torch.empty_like(inputs.x).copy_(torch.randn(inputs.x.shape, generator=generator))
