"""Fails every allocation of a call, one per run, for each op: see test_faults.py.

    allowed outcomes    an exception, with the arguments' memory unchanged, and success of the same call afterwards;
                        or correct results, if the call has a fallback

Runs in an interpreter that preloads allocations.cpp. Prints one line per call: its name, its number of allocations, and
how many of their failures ended in an exception.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuzz_arguments import Arguments, Memory
from simt import build
from torch import Tensor

import bnkernels as bnk
from bnkernels import _ops as ops
from bnkernels.testing import lay_out, same_bits

Results = tuple[Tensor | None, ...]
Call = Callable[..., Any]


def library() -> Path:
    """The library to preload. Raises RuntimeError if it does not compile."""
    source = Path(__file__).with_suffix(".cpp")
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC"]
    return build.make("allocations.so", [*flags, str(source), "-ldl"], [source.read_bytes()])


def calls() -> Iterator[tuple[str, Call, Arguments]]:
    """Each op in each of the ways it allocates: vectors on the heap, cached results, copies, several threads."""
    for name, shape, layout in (
        ("small", (4, 3, 5), "contiguous"),
        ("many channels", (6, 1500), "contiguous"),
        ("many channels, 16-bit parameters", (3, 1500, 2), "channels_last"),
        ("a large result", (32, 16, 40, 40), "contiguous"),
        ("a large result", (20, 200, 10, 10), "channels_last"),
        ("one channel, several threads", (8, 1, 300, 300), "contiguous"),
        ("copies", (8, 64, 9, 9), "sliced"),
    ):
        dtype = torch.bfloat16 if "16-bit" in name else torch.float32
        x = lay_out(torch.randn(shape).to(dtype), layout)
        for op, function, arguments in of_input(x, strided=name == "copies"):
            yield f"{op}, {name}", function, arguments
    empty = torch.empty(0, 600, 3)
    for op, function, arguments in of_input(empty, strided=False):
        yield f"{op}, empty", function, arguments


def of_input(x: Tensor, strided: bool) -> Iterator[tuple[str, Call, Arguments]]:
    """Calls with this input. strided: per-channel vectors are copied, and the running statistics are copied back."""
    channels = x.shape[1]

    def vector() -> Tensor:
        return torch.rand(channels, 2).to(x.dtype)[:, 0] if strided else torch.rand(channels).to(x.dtype)

    head: Arguments = {"x": x, "weight": vector(), "bias": vector()}
    added: Arguments = {"residual": torch.randn_like(x), "relu": True}
    relu: Arguments = {"residual": None, "relu": True}
    running: Arguments = {"running_mean": vector(), "running_var": vector() + 0.5}
    counted: Arguments = {"num_batches_tracked": torch.tensor(3), "momentum": None}
    eps: Arguments = {"eps": 1e-5}
    saved: Arguments = {"mean": torch.rand(channels), "invstd": torch.rand(channels) + 0.5}
    needs = {"training": True, "need_input": True, "need_weight": True, "need_bias": True}
    grad: Arguments = {"grad": torch.randn(x.shape).to(x.dtype), "x": x, "weight": head["weight"], **saved}
    bounds: Arguments = {"relu_bounds": torch.stack((torch.zeros(channels), torch.ones(channels)))}
    rows = torch.rand(3, 2 * channels + 1, dtype=torch.float64)
    sums = torch.rand(3, 2 * channels, dtype=torch.float64)
    yield "train", ops.forward_train, head | running | counted | eps
    yield "train through the registered op", ops.train_op, head | running | counted | eps
    yield "train_functional", ops.train_functional, head | running | counted | eps
    yield "eval", ops.forward_eval, head | running | eps
    yield "backward", ops.backward, grad | needs
    yield "train, relu", ops.forward_train, head | running | counted | eps | relu
    yield "train, add + relu", ops.forward_train, head | running | counted | eps | added
    yield "eval, add + relu", ops.forward_eval, head | running | eps | added
    yield "backward, relu", ops.backward, grad | needs | bounds
    yield "sync_statistics", ops.sync_statistics, {"x": x} | eps
    yield "sync_combine", ops.sync_combine, {"rows": rows} | running | counted | eps | {"dtype": x.dtype}
    yield "sync_normalize", ops.sync_normalize, head | saved
    yield "sync_grad_sums", ops.sync_grad_sums, grad | {"need_weight": True, "need_bias": True}
    yield "sync_grad_input", ops.sync_grad_input, grad | {"rows": sums, "count": torch.ones(1, dtype=torch.float64)}


class Failing:
    """Counts the allocations within the context and fails the number-th of them."""

    _shim = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0]) if "LD_PRELOAD" in os.environ else None

    def __init__(self, number: int = -1) -> None:
        self._number, self.seen = number, 0

    def __enter__(self) -> Failing:
        self._shim.start_counting(ctypes.c_long(self._number))  # type: ignore[union-attr]
        return self

    def __exit__(self, *_: object) -> None:
        self.seen = self._shim.stop_counting()  # type: ignore[union-attr]


def as_results(results: Any) -> Results:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def written(arguments: Arguments) -> list[Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [arguments[name] for name in names if arguments.get(name) is not None]


def copied(arguments: Arguments) -> Arguments:
    """Copies with the same strides; statistics are not shared with the originals."""
    copies = dict(arguments)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        old = arguments.get(name)
        if old is not None:
            storage = torch.empty(0, dtype=old.dtype).set_(old.untyped_storage()).clone()
            copies[name] = storage.as_strided(old.shape, old.stride(), old.storage_offset())
    return copies


def fail_each(name: str, call: Call, given: Arguments, cached: bool) -> tuple[int, int]:
    """`cached`: with cached memory of earlier results, otherwise with an empty cache."""
    call(*copied(given).values())
    right = copied(given)
    expected = as_results(call(*right.values()))
    state = written(right)

    def check(results: Results, arguments: Arguments, when: str) -> None:
        for a, b in zip(results, expected):
            assert same_bits(a, b), f"{name}: different results {when}"
        for a, b in zip(written(arguments), state):
            assert same_bits(a, b), f"{name}: other statistics {when}"

    number = raised = 0
    while True:
        if not cached:
            bnk.empty_cache()
        arguments = copied(given)
        values = tuple(arguments.values())
        memory = Memory(arguments)
        failing = Failing(number)
        try:
            with failing:
                results = as_results(call(*values))
        except (MemoryError, RuntimeError) as error:
            assert "INTERNAL ASSERT" not in str(error), f"{name}, allocation {number}: {error}"
            assert failing.seen > number, f"{name}: raised without a reason: {error}"
            assert not memory.changed(), f"{name}: changed its arguments, and then had no memory (allocation {number})"
            raised += 1
            check(as_results(call(*values)), arguments, f"after allocation {number} had failed")
        else:
            check(results, arguments, f"where allocation {number} fails")
            if failing.seen <= number:
                return number, raised
        number += 1


def fail_frees() -> int:
    """Fails each allocation made while large results are freed: a block may then be released instead of cached, and
    nothing else."""
    x = torch.randn(32, 16, 40, 40)
    expected = ops.forward_train(x, None, None, None, None, None, 0.1, 1e-5)[0]
    for number in range(100):
        bnk.empty_cache()
        held = [ops.forward_train(x, None, None, None, None, None, 0.1, 1e-5)[0] for _ in range(8)]
        with Failing(number) as failing:
            held.clear()
        assert same_bits(ops.forward_train(x, None, None, None, None, None, 0.1, 1e-5)[0], expected)
        if failing.seen <= number:
            return number
    raise AssertionError("freeing eight results makes a hundred allocations")


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for name, call, arguments in calls():
        for cached in (False, True):
            made, raised = fail_each(name, call, arguments, cached)
            print(f"{made:4d} allocations, {raised:4d} exceptions  {name}{', memory cached' * cached}")
    print(f"{fail_frees():4d} allocations,    0 exceptions  freeing large results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
