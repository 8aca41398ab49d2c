"""Shared by tests of CUDA streams and graphs: a training step on fixed tensors, and its capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

import bnkernels
from bnkernels.testing import Inputs

Result = TypeVar("Result")


class Step:
    """Forward and backward on fixed inputs."""

    def __init__(self, inputs: Inputs) -> None:
        assert inputs.running_mean is not None and inputs.running_var is not None
        assert inputs.weight is not None and inputs.bias is not None
        self.inputs = inputs
        self.statistics = inputs.running_mean.clone(), inputs.running_var.clone()
        self.leaves = [t.detach().clone().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
        self.grad = inputs.grad.clone()

    def reset(self) -> None:
        for tensor, start in zip(self.statistics, (self.inputs.running_mean, self.inputs.running_var)):
            assert start is not None
            tensor.copy_(start)

    def forward(self) -> Tensor:
        x, weight, bias = self.leaves
        return bnkernels.batch_norm(x, *self.statistics, weight, bias, training=True)

    def __call__(self) -> list[Tensor]:
        y = self.forward()
        return [y, *torch.autograd.grad(y, self.leaves, self.grad), *self.statistics]


def captured(step: Callable[[], Result], warm_up: int = 1) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of the step, and its results, which replays overwrite. Warms up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result
