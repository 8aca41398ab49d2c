"""Every kind of plan on a GPU, at the size of real layers: within the gate, one launch each way, in a CUDA graph too.

That the cases below are of these kinds is known without a GPU, for an H200.
"""

from __future__ import annotations

import pytest
import torch
from plan_model import DEVICES, TRAINING, Problem
from torch import Tensor

import bnkernels
from bnkernels.check.runner import call
from bnkernels.testing import Case, Inputs, assert_within, judge_call, same_bits

# Kind of the forward, kind of the backward: layout, group, "divided" if the exchange is, "part" if not all is kept.
KINDS = {
    Case("offset_1e2", (32, 512, 28, 28), "bfloat16", "float32"): (
        "channels_first block",
        "channels_first block",
    ),
    Case("offset_1e2", (32, 64, 56, 56), "bfloat16", "float32"): (
        "channels_first cluster",
        "channels_first cluster",
    ),
    Case("offset_1e2", (64, 64, 112, 112), "bfloat16", "float32"): (
        "channels_first virtual_cluster",
        "channels_first virtual_cluster",
    ),
    Case("offset_1e2", (32, 1024, 14, 14), "bfloat16", "float32"): ("packed block", "packed block"),
    Case("offset_1e2", (32, 256, 14, 14), "bfloat16", "float32"): ("packed cluster", "packed cluster"),
    Case("offset_1e2", (32, 1024, 14, 14), "bfloat16", "float32", "channels_last"): (
        "channels_last cluster",
        "channels_last cluster",
    ),
    Case("offset_1e2", (32, 512, 14, 14), "bfloat16", "float32", "channels_last"): (
        "channels_last virtual_cluster",
        "channels_last virtual_cluster",
    ),
    Case("offset_1e2", (32, 64, 56, 56), "bfloat16", "float32", "channels_last"): (
        "channels_last virtual_cluster divided",
        "channels_last virtual_cluster divided",
    ),
    Case("offset_1e2", (64, 64, 112, 112), "bfloat16", "float32", "channels_last"): (
        "channels_last virtual_cluster divided part",
        "channels_last virtual_cluster divided part",
    ),
    Case("offset_1e2", (32, 64, 113, 113)): (
        "channels_first virtual_cluster",
        "channels_first virtual_cluster",
    ),
    Case("offset_1e2", (200_000, 96), "float16"): (
        "channels_last virtual_cluster divided",
        "channels_last virtual_cluster divided",
    ),
}
cases = pytest.mark.parametrize("case", list(KINDS), ids=str)


def kind(case: Case, pass_: str) -> str:
    batch, channels, *rest = case.shape
    pixels = torch.Size(rest).numel()
    last = case.layout == "channels_last" or not rest
    problem = Problem(batch * pixels, channels, 1, case.dtype) if last else Problem(batch, channels, pixels, case.dtype)
    plan = problem.plan(pass_, DEVICES["h200"])
    resident = plan["resident"]
    if resident is None:
        return "streaming"
    words = [resident["walk"]["layout"], resident["group"]]
    words += ["divided"] * resident["divided"] + ["part"] * (plan["predicted"] != plan["floor"])
    return " ".join(words)


@cases
def test_kinds_on_an_h200(case: Case) -> None:
    assert tuple(kind(case, pass_) for pass_ in TRAINING) == KINDS[case]


@pytest.mark.cuda
@cases
def test_gate_and_bits(case: Case) -> None:
    inputs = case.inputs("cuda")
    first = call(bnkernels.batch_norm, inputs)
    assert_within(judge_call(inputs, first, "cuda"), str(case))
    again = call(bnkernels.batch_norm, inputs)
    for name, tensor in vars(first).items():
        assert same_bits(tensor, getattr(again, name)), name


class Step:
    """Forward and backward of an input, on tensors that stay where they are."""

    def __init__(self, inputs: Inputs) -> None:
        assert inputs.running_mean is not None and inputs.running_var is not None
        assert inputs.weight is not None and inputs.bias is not None
        self.inputs = inputs
        self.statistics = inputs.running_mean.clone(), inputs.running_var.clone()
        self.leaves = [t.clone().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
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


def kernels_of(profile: torch.profiler.profile) -> list[str]:
    """What ran on the GPU: kernels, copies, fills."""
    device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == device]


@pytest.mark.cuda
@cases
def test_one_launch_each_way(case: Case) -> None:
    step = Step(case.inputs("cuda"))
    step()  # what is done once, is done
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as forward:
        y = step.forward()
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as backward:
        torch.autograd.grad(y, step.leaves, step.grad)
        torch.cuda.synchronize()
    for direction, profile in (("forward", forward), ("backward", backward)):
        ran = kernels_of(profile)
        assert len(ran) == 1 and f"resident_{direction}_kernel" in ran[0], ran


@pytest.mark.cuda
@cases
def test_in_a_graph(case: Case) -> None:
    """Captured and replayed, and again after a launch outside of it: the bits of eager execution."""
    step = Step(case.inputs("cuda"))
    expected = [tensor.detach().clone() for tensor in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        step.reset()
        graph.replay()
        torch.cuda.synchronize()
        for number, (one, other) in enumerate(zip(expected, captured)):
            assert same_bits(one, other.detach()), number
        step()
