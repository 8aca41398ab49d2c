"""A share of the random calls of tests/support/fuzz_ops.py with fixed seeds, and that the fuzzer sees what it is to
see."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import fuzz_ops
import pytest
import torch
from fuzz_ops import ENTRY_POINTS, Caller, Tally
from torch import Tensor

from bnkernels import ops

# Rounds of each share, and elements of an input: on the fake CUDA device a kernel takes its time.
SHARES = 3
SIZES = {"cpu": (400, 2000), "cuda": (30, 300)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("share", range(SHARES))
def test_random_calls(device: str, share: int) -> None:
    """Calls that are right are within the tolerance, calls that are wrong are refused and change nothing."""
    rounds, most = SIZES[device]
    tally = fuzz_ops.run(share * rounds, rounds, device, most=most)
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


def tells_nobody(*arguments: Any) -> Any:
    copies = [None if t is None else t.clone() for t in arguments[3:6]]
    results = ops.forward_train(*arguments[:3], *copies, *arguments[6:])
    for t, copy in zip(arguments[3:6], copies):
        t.data.copy_(copy)
    return results


@pytest.mark.parametrize(
    ("entry", "match"),
    [(writes_beyond, "wrote elsewhere"), (writes_the_input, "version of x"), (tells_nobody, "version of running_mean")],
)
def test_what_a_call_must_not_do_is_seen(entry: Entry, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte next to the statistics, the input, and a change without a version bump."""
    monkeypatch.setitem(ENTRY_POINTS, "train", (entry,))
    monkeypatch.setattr(fuzz_ops, "REFUSED_SHARE", 0.0)
    call = Caller(random.Random(0), Tally())
    buffers: dict[str, Any] = {"running_mean": torch.zeros(9)[:3], "running_var": torch.ones(3)}
    counted: dict[str, Any] = {"num_batches_tracked": torch.tensor(0), "momentum": 0.1, "eps": 1e-5}
    with pytest.raises(AssertionError, match=match):
        call("train", x=torch.randn(4, 3), weight=None, bias=None, **buffers, **counted)


def takes_it(*arguments: Any) -> Any:
    return None


def asserts(*arguments: Any) -> Any:
    raise RuntimeError('INTERNAL ASSERT FAILED at "file":7')


def writes_first(*arguments: Any) -> Any:
    arguments[0].data.add_(1)
    raise ValueError("eps")


@pytest.mark.parametrize(
    ("entry", "match"),
    [(takes_it, "not refused"), (asserts, "INTERNAL ASSERT"), (writes_first, "was refused, but has written")],
)
def test_a_bad_refusal_is_seen(entry: Entry, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all, one by an assertion, and one that comes too late."""
    monkeypatch.setitem(ENTRY_POINTS, "sync_statistics", (entry,))
    call = Caller(random.Random(0), Tally())
    with pytest.raises(AssertionError, match=match):
        call.refused("sync_statistics", "eps: 0", {"x": torch.randn(4, 3), "eps": 0.0})


@pytest.mark.parametrize("name", ["train", "eval", "backward", "sync_grad_input"])
def test_wrong_numbers_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first result that is off by a hundredth fails within some rounds, of whichever op."""
    real = ENTRY_POINTS[name][0]

    def off(*arguments: Any) -> Any:
        results = real(*arguments)
        first, *rest = (results,) if isinstance(results, Tensor) else results
        return (first * 1.01, *rest) if rest else first * 1.01

    monkeypatch.setitem(ENTRY_POINTS, name, (off,))
    monkeypatch.setattr(fuzz_ops, "REFUSED_SHARE", 0.0)
    with pytest.raises(AssertionError, match=r"beyond the tolerance|elements, the first"):
        fuzz_ops.run(0, 300)
