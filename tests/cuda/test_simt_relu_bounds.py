"""The exact range of x that a ReLU after BatchNorm passes (csrc/core/relu_bounds.h), run on the host
(tests/support/simt).

Normalization by running statistics does not depend on x. A first call therefore computes the bounds of hundreds of
channels, and a second one takes the numbers around these bounds as x: for each of them, the forward's own y shows
whether the bounds are right.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from simt.common import PAIRS
from simt.server import How, Server
from torch import Tensor

from bnkernels.testing import (
    DTYPES,
    Epilogue,
    Inputs,
    Outputs,
    assert_bounds_are_exact,
    assert_within,
    behind_relu,
    judge_call,
)

pytest_plugins = ["simt.fixtures"]

MEANS = (0.0, 1.0, -300.0, 1e-30, 1e30, -1e34)
VARIANCES = (0.0, 1.0, 1e-12, 1e8, 1e35)
WEIGHTS = (0.0, -0.0, 1.0, -1.0, 1e-20, -3e4, 1e30)
BIASES = (0.0, -0.0, 0.3, -7.0, 1e-40, -1e20, 3e38, -3e38)


def inputs_of(x: Tensor, parameters: Tensor) -> Inputs:
    mean, variance, weight, bias = parameters
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(x.shape, generator=generator).to(x.dtype)
    return Inputs(x, grad, weight, bias, mean, variance, torch.tensor(0), False, 0.1, 1e-5)


def around(edges: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of `dtype` at each edge and next to it (rows), then some far from any edge."""
    # Steps of half a unit in the last place and of a whole one, so that no number is skipped.
    step = edges.double().abs() * torch.finfo(dtype).eps / 2
    near = [edges.double() + k * step for k in range(-4, 5)]
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # With a weight of 0, an overflow on the way would give NaN.
    largest = torch.full_like(weight, torch.finfo(dtype).max, dtype=torch.float64).masked_fill(weight == 0, 1.0)
    far = [value * torch.ones_like(largest) for value in (0.0, tiny, -tiny, 1.0, -1.0, math.nan)]
    x = torch.stack([*near, *far, largest, -largest])
    return torch.where(x.isnan(), x, x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)).to(dtype)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.values[0][1] in ("float32", "float64")])
def test_bounds_are_exact(plain: Server, pair: tuple[str, str]) -> None:
    """Weights of both signs and 0, statistics and biases from zero to overflow."""
    dtype, held = DTYPES[pair[0]], DTYPES[pair[1]]
    table = list(itertools.product(MEANS, VARIANCES, WEIGHTS, BIASES))
    parameters = torch.tensor(table, dtype=torch.float64).T.to(held).contiguous()
    epilogue = Epilogue(relu=True)
    how = How(block=64, grid=5)
    first = plain.call(
        inputs_of(torch.zeros(2, len(table), dtype=dtype), parameters), how, channels_last=True, epilogue=epilogue
    )
    low, high = first.results["relu_low"], first.results["relu_high"]
    assert bool((low.isinf() | high.isinf()).all())  # one end is open
    edges = torch.where(low.isfinite(), low, high)
    found = edges.isfinite()
    assert int(found.sum()) > len(table) // 2
    assert int((found & high.isfinite()).sum()) > len(table) // 8
    x = around(torch.where(found, edges, torch.zeros_like(edges)), parameters[2], dtype)
    inputs = inputs_of(x, parameters)
    run = plain.call(inputs, how, channels_last=True, epilogue=epilogue)
    assert bool((run.results["relu_low"] == low).all()) and bool((run.results["relu_high"] == high).all())
    assert run.outputs.y is not None
    assert_bounds_are_exact(inputs, run.outputs.y, low, high, pair)
    # Next to the largest numbers, x has no finite sum.
    gradients = Outputs(dx=run.outputs.dx, dbias=run.outputs.dbias)
    assert_within(judge_call(behind_relu(inputs, run.outputs.y), gradients), str(pair))
