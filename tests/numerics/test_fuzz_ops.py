"""A part of the random calls of tests/support/fuzz_ops.py with fixed seeds, and tests of the fuzzer's own checks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import fuzz_ops
import pytest
import torch
from fuzz_ops import ENTRY_POINTS, Caller, Tally
from torch import Tensor

from bnkernels import _ops as ops

# Rounds per part, and elements of an input. Kernels are slow on the fake CUDA device.
PARTS = 3
SIZES = {"cpu": (400, 2000), "cuda": (30, 300)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(device: str, part: int) -> None:
    """Valid calls are within tolerance; invalid calls raise and change nothing."""
    rounds, most = SIZES[device]
    tally = fuzz_ops.run(part * rounds, rounds, device, most=most)
    if device == "cpu":
        assert tally.calls > 1700 and len(tally.spoiled) > 100
        assert set(tally.allowed) == set(tally.refused) == set(ENTRY_POINTS)


Entry = Callable[..., Any]


def writes_beyond(x: Tensor, *rest: Any) -> Any:
    results = ops.forward_train(x, *rest)
    rest[2]._base[-1] = 7
    return results


def writes_the_input(x: Tensor, *rest: Any) -> Any:
    results = ops.forward_train(x, *rest)
    x.view(-1)[0] += 1
    return results


def does_not_bump_version(*arguments: Any) -> Any:
    copies = [None if t is None else t.clone() for t in arguments[3:6]]
    results = ops.forward_train(*arguments[:3], *copies, *arguments[6:])
    for t, copy in zip(arguments[3:6], copies):
        t.data.copy_(copy)
    return results


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (writes_beyond, "wrote elsewhere"),
        (writes_the_input, "version of x"),
        (does_not_bump_version, "version of running_mean"),
    ],
)
def test_forbidden_writes_are_detected(entry: Entry, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write next to the statistics, a write to the input, and a write without a version bump."""
    monkeypatch.setitem(ENTRY_POINTS, "train", (entry,))
    monkeypatch.setattr(fuzz_ops, "REFUSED_SHARE", 0.0)
    call = Caller(random.Random(0), Tally())
    buffers: dict[str, Any] = {"running_mean": torch.zeros(9)[:3], "running_var": torch.ones(3)}
    counted: dict[str, Any] = {"num_batches_tracked": torch.tensor(0), "momentum": 0.1, "eps": 1e-5}
    with pytest.raises(AssertionError, match=match):
        call("train", x=torch.randn(4, 3), weight=None, bias=None, **buffers, **counted)


def accepts(*arguments: Any) -> Any:
    return None


def fails_assertion(*arguments: Any) -> Any:
    raise RuntimeError('INTERNAL ASSERT FAILED at "file":7')


def writes_before_raising(*arguments: Any) -> Any:
    arguments[0].data.add_(1)
    raise ValueError("eps")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (accepts, "did not raise"),
        (fails_assertion, "INTERNAL ASSERT"),
        (writes_before_raising, "raised, but has written"),
    ],
)
def test_bad_errors_are_detected(entry: Entry, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error, an internal assertion, and an error raised after a write."""
    monkeypatch.setitem(ENTRY_POINTS, "sync_statistics", (entry,))
    call = Caller(random.Random(0), Tally())
    with pytest.raises(AssertionError, match=match):
        call.refused("sync_statistics", "eps: 0", {"x": torch.randn(4, 3), "eps": 0.0})


@pytest.mark.parametrize("name", ["train", "eval", "backward", "sync_grad_input"])
def test_wrong_values_are_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first result that is off by 1 % fails within some rounds, for each op."""
    real = ENTRY_POINTS[name][0]

    def off(*arguments: Any) -> Any:
        results = real(*arguments)
        first, *rest = (results,) if isinstance(results, Tensor) else results
        return (first * 1.01, *rest) if rest else first * 1.01

    monkeypatch.setitem(ENTRY_POINTS, name, (off,))
    monkeypatch.setattr(fuzz_ops, "REFUSED_SHARE", 0.0)
    with pytest.raises(AssertionError, match=r"beyond the tolerance|elements, the first"):
        fuzz_ops.run(0, 300)
