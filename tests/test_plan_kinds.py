"""Every kind of plan on a GPU, at the size of real layers: within the gate, and one launch each way.

In CUDA graphs: test_cuda_graphs.py. That the cases below are of these kinds is known without a GPU, for an H200.
"""

from __future__ import annotations

import pytest
import torch
from cuda_steps import Step
from hardware import DRIVER, LARGE
from plan_model import DEVICES, TRAINING, Problem

import bnkernels
from bnkernels.check.runner import call
from bnkernels.explain.devices import Limits
from bnkernels.testing import Case, assert_within, judge_call, same_bits

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


def kind(case: Case, pass_: str, limits: Limits = DEVICES["h200"]) -> str:
    batch, channels, *rest = case.shape
    pixels = torch.Size(rest).numel()
    last = case.layout == "channels_last" or not rest
    problem = Problem(batch * pixels, channels, 1, case.dtype) if last else Problem(batch, channels, pixels, case.dtype)
    plan = problem.plan(pass_, limits)
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
@LARGE
@cases
def test_gate_and_bits(case: Case) -> None:
    inputs = case.inputs("cuda")
    first = call(bnkernels.batch_norm, inputs)
    assert_within(judge_call(inputs, first, "cuda"), str(case))
    again = call(bnkernels.batch_norm, inputs)
    for name, tensor in vars(first).items():
        assert same_bits(tensor, getattr(again, name)), name


def kernels_of(profile: torch.profiler.profile) -> list[str]:
    """What ran on the GPU: kernels, copies, fills."""
    device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == device]


@pytest.mark.cuda
@DRIVER
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
