"""Every kind of plan on a GPU at realistic layer sizes: results within the tolerance, one launch per direction.

test_cuda_graphs.py runs the same cases in CUDA graphs. test_kinds_on_an_h200 checks without a GPU that they select
these kinds on an H200.
"""

from __future__ import annotations

import pytest
import torch
from cuda_steps import Step
from hardware import DRIVER, LARGE
from plan_kinds import KINDS, kind
from plan_model import TRAINING

import bnkernels
from bnkernels.check.runner import call
from bnkernels.testing import Case, assert_within, judge_call, same_bits

cases = pytest.mark.parametrize("case", list(KINDS), ids=str)


@cases
def test_kinds_on_an_h200(case: Case) -> None:
    assert tuple(kind(case, pass_) for pass_ in TRAINING) == KINDS[case]


@pytest.mark.cuda
@LARGE
@cases
def test_tolerance_and_bits(case: Case) -> None:
    inputs = case.inputs("cuda")
    first = call(bnkernels.batch_norm, inputs)
    assert_within(judge_call(inputs, first, "cuda"), str(case))
    again = call(bnkernels.batch_norm, inputs)
    for name, tensor in vars(first).items():
        assert same_bits(tensor, getattr(again, name)), name


def kernels_of(profile: torch.profiler.profile) -> list[str]:
    """The kernels, copies and fills that ran on the GPU."""
    device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == device]


@pytest.mark.cuda
@DRIVER
@cases
def test_one_launch_each_way(case: Case) -> None:
    step = Step(case.inputs("cuda"))
    step()  # one-time initialization happens here
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
        assert len(ran) == 1 and f"persistent_{direction}_kernel" in ran[0], ran
