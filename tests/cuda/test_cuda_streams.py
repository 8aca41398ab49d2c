"""Streams and devices: work runs on the current stream and on the input's device, and waits for no other stream."""

from __future__ import annotations

import pytest
import torch
from cuda_steps import Step

import bnkernels as bnk
from bnkernels.testing import Case, same_bits

pytestmark = pytest.mark.cuda

CASES = [
    Case("offset_1e2", (16, 3, 14, 14)),
    Case("offset_1e2", (256, 8, 7, 7), "bfloat16", "float32"),
    Case("offset_1e2", (4096, 16)),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@cases
def test_current_stream(case: Case) -> None:
    """The input is produced and read on a non-default stream; a kernel on another stream would not wait for it."""
    inputs = case.inputs("cuda")
    expected = [tensor.detach().clone() for tensor in Step(inputs)()]
    step = Step(inputs)
    x = step.leaves[0].detach().clone()
    with torch.no_grad():
        step.leaves[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        with torch.no_grad():
            step.leaves[0].copy_(x)
        results = [tensor.detach().clone() for tensor in step()]
    torch.cuda.synchronize()
    for number, (one, other) in enumerate(zip(expected, results)):
        assert same_bits(one, other), number


@cases
def test_device_of_the_input(case: Case) -> None:
    """Tensors on a device other than the current one, which must stay current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    expected = Step(case.inputs("cuda:0"))()
    results = Step(case.inputs("cuda:1"))()
    assert torch.cuda.current_device() == 0
    for number, (one, other) in enumerate(zip(expected, results)):
        assert other.device == torch.device("cuda:1")
        assert same_bits(one.detach().cpu(), other.detach().cpu()), number


def test_devices_must_be_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    layer = bnk.BatchNorm2d(3, device="cuda:0")
    with pytest.raises(RuntimeError, match="cuda:1"):
        layer(torch.randn(2, 3, 4, 4, device="cuda:1"))


def test_replicas_in_threads() -> None:
    """As in nn.parallel: one thread per device, all in one process."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    devices = [torch.device("cuda", index) for index in range(2)]
    layers = [bnk.BatchNorm2d(4).to(device) for device in devices]
    x = torch.randn(8, 4, 7, 7)
    results = torch.nn.parallel.parallel_apply(layers, [(x.to(device),) for device in devices])
    expected = bnk.BatchNorm2d(4).cuda()(x.cuda())
    for device, result in zip(devices, results):
        assert result.device == device
        assert same_bits(result.detach().cpu(), expected.detach().cpu())
