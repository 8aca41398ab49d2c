"""The overhead of a call on a tiny tensor does not exceed nn.BatchNorm2d's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bnkernels as bnk

SHAPE = (2, 3, 4, 4)
CALLS = 100
ROUNDS = 60
ATTEMPTS = 5
MARGIN = 1.15
"""The target is 1.0. The margin allows for noise from other processes in a measurement of a few microseconds."""


def step(layer: nn.Module, backward: bool) -> Callable[[], None]:
    x = torch.randn(SHAPE, requires_grad=backward)
    grad = torch.randn(SHAPE)
    parameters = (x, *layer.parameters())

    def with_backward() -> None:
        layer(x).backward(grad)
        for parameter in parameters:
            parameter.grad = None

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return with_backward if backward else forward


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def ratio(ours: Callable[[], None], native: Callable[[], None]) -> tuple[float, float, float]:
    """The median ratio of adjacent measurements, and the two medians, after a warm-up."""
    seconds(ours), seconds(native)
    pairs = [(seconds(ours), seconds(native)) for _ in range(ROUNDS)]
    return (
        statistics.median(mine / native_value for mine, native_value in pairs),
        statistics.median(mine for mine, _ in pairs),
        statistics.median(native_value for _, native_value in pairs),
    )


@pytest.mark.parametrize("backward", [True, False], ids=["forward_backward", "forward"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_tiny_call(training: bool, backward: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved measurements on one thread; the best of several attempts, so that other load on the machine does not
    fail the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours = step(bnk.BatchNorm2d(SHAPE[1]).train(training), backward)
        native = step(nn.BatchNorm2d(SHAPE[1]).train(training), backward)
        measured = []
        for _ in range(ATTEMPTS):
            measured.append(ratio(ours, native))
            if min(measured)[0] <= 1.0:
                break
    finally:
        torch.set_num_threads(threads)
    best, mine, native_value = min(measured)
    with capsys.disabled():
        name = f"{'train' if training else 'eval'}, forward{' + backward' if backward else ''}"
        print(
            f"\n  {SHAPE}, {name}: {mine * 1e6:.1f} us, torch {native_value * 1e6:.1f} us, "
            f"ratio {best:.3f} (target 1.0)"
        )
    assert best <= MARGIN
