"""What follows a normalised value in the same kernels, y = relu(v + residual), and how a run with it is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnkernels import reference
from bnkernels.testing import (
    Expectation,
    Inputs,
    Outputs,
    Verdict,
    accumulate_roundoff,
    assert_within,
    expect_forward,
    judge,
    judge_call,
)


@dataclass(frozen=True)
class Fusion:
    """An epilogue: each part if it is there."""

    residual: Tensor | None = None
    """Of x's shape, dtype and layout."""
    relu: bool = False

    @property
    def has_range(self) -> bool:
        """Whether the forward leaves the interval of x that the ReLU lets through."""
        return self.relu and self.residual is None


PLAIN = Fusion()


def expect_y(inputs: Inputs, fusion: Fusion) -> Expectation:
    """Of y, from the float64 reference's v. A ReLU moves no two values apart; what is added is rounded once more."""
    i = inputs
    forward = reference.forward(
        i.x, i.weight, i.bias, i.running_mean, i.running_var, i.num_batches_tracked, i.training, i.momentum, i.eps
    )
    v = expect_forward(i.x, i.weight, i.bias, None, None, forward, i.training)["y"]
    value, scale = v.value, v.scale
    if fusion.residual is not None:
        value = value + fusion.residual.double()
        scale = scale + fusion.residual.double().abs()
    return Expectation("y", value.relu() if fusion.relu else value, scale, accumulate_roundoff(i.x.dtype))


def behind_relu(inputs: Inputs, y: Tensor) -> Inputs:
    """The same with the gradient that a ReLU whose result is `y` hands on: as in torch, where y is not 0 or less."""
    return replace(inputs, grad=inputs.grad.masked_fill(y <= 0, 0))


def judge_fused(inputs: Inputs, fusion: Fusion, outputs: Outputs) -> list[Verdict]:
    """y against the reference with the epilogue; gradients against its backward behind the forward's own y."""
    assert outputs.y is not None
    own = behind_relu(inputs, outputs.y) if fusion.has_range else inputs
    return [judge(outputs.y, expect_y(inputs, fusion)), *judge_call(own, replace(outputs, y=None))]


def assert_range_is_exact(inputs: Inputs, y: Tensor, low: Tensor, high: Tensor, context: object) -> None:
    """x lies within its channel's interval, or is NaN, where y is not 0 or less, and nowhere else."""
    x = reference.channel_rows(inputs.x)
    within = ((low.double()[:, None] <= x) & (x <= high.double()[:, None])) | x.isnan()
    wrong = within != ~(reference.channel_rows(y) <= 0)
    assert not wrong.any(), f"{context}: {int(wrong.sum())} elements, the first at {wrong.nonzero()[0].tolist()}"


def assert_fused(inputs: Inputs, fusion: Fusion, outputs: Outputs, results: dict[str, Tensor], context: object) -> None:
    assert_within(judge_fused(inputs, fusion, outputs), str(context))
    if fusion.has_range:
        assert outputs.y is not None
        assert_range_is_exact(inputs, outputs.y, results["relu_low"], results["relu_high"], context)


def make_residual(inputs: Inputs) -> Tensor:
    """As large as v is, of both signs."""
    generator = torch.Generator().manual_seed(inputs.x.numel())
    return torch.randn(inputs.x.shape, generator=generator).to(inputs.x.dtype)
