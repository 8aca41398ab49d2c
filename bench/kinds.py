"""One small case of every kind of plan that a device has: what a tool gets to see that is too slow for real layers.

Which kind a case takes hangs on the device, so the cases are looked for: among inputs of rising size, those whose plan
(csrc/plan, asked with the device's limits) is of a kind that none before them was of.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from bnkernels import ops
from bnkernels.testing import DTYPE_PAIRS, DTYPES, EPILOGUES, Case, Inputs

PASSES = ("forward_train", "backward_train")
LAYOUTS = ("channels_first", "packed", "channels_last")

BATCHES = (2, 3, 8, 32, 128, 256, 512, 1024, 2048)
CHANNELS = (2, 3, 5, 8, 16, 24, 40, 64, 96, 130, 256, 512, 1024)
PIXELS = (4, 16, 49, 64, 196, 256, 784, 1024, 3136, 4096, 12544, 16384, 65536)
MOST_BYTES = 16 << 20  # of a tensor


@dataclass(frozen=True)
class Kind:
    """Of a pass: its layout, how the blocks of a group exchange ("two_pass": there are none), and what is special."""

    pass_: str
    layout: str
    group: str
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.pass_.split("_")[0], self.layout, self.group, *self.more])


@dataclass(frozen=True)
class Chosen:
    case: Case
    kinds: tuple[Kind, ...]  # of its forward, of its backward


def kind_of(case: Case, pass_: str, limits: dict[str, Any], two_pass: bool = False) -> Kind:
    """What the plan of this pass is. two_pass: where BNKERNELS_PLAN=two_pass leaves nothing else."""
    batch, channels, *rest = case.shape
    pixels = math.prod(rest)
    last = case.layout == "channels_last" or not rest
    problem = (batch * pixels, channels, 1) if last else (batch, channels, pixels)
    plan = ops.plan(*problem, case.dtype, pass_, aligned=True, **limits, force_two_pass=two_pass)
    persistent = plan["persistent"]
    if persistent is None:
        partition = plan["two_pass"]["partition"]
        return Kind(pass_, partition["layout"], "two_pass", ("splits",) * (partition["splits"] > 1))
    more = {
        "two_shot": persistent["two_shot"],
        "part": plan["predicted"] != plan["floor"],  # not all that is read stays on chip
        "rounds": persistent["partition"]["channel_tiles"] > persistent["groups"],  # a group exchanges more than once
    }
    return Kind(
        pass_, persistent["partition"]["layout"], persistent["group"], tuple(name for name in more if more[name])
    )


def candidates(most_bytes: int) -> Iterator[Case]:
    """By rising size; dtypes take turns."""
    sized = []
    for number, shape in enumerate(product(BATCHES, CHANNELS, PIXELS)):
        pair = DTYPE_PAIRS[number % len(DTYPE_PAIRS)]
        sized.append((math.prod(shape) * DTYPES[pair[0]].itemsize, shape, pair))
    for bytes, (batch, channels, pixels), pair in sorted(sized):
        if bytes <= most_bytes:
            yield Case("normal", (batch, channels, pixels), *pair)
            yield Case("normal", (batch * pixels, channels), *pair)  # 2-D: channels last


def choose(limits: dict[str, Any], two_pass: bool = False, most_bytes: int = MOST_BYTES) -> list[Chosen]:
    """A case for each kind of forward and of backward. What follows in the same kernel takes turns."""
    chosen: list[Chosen] = []
    seen: set[Kind] = set()
    for case in candidates(most_bytes):
        kinds = tuple(kind_of(case, pass_, limits, two_pass) for pass_ in PASSES)
        if not seen.issuperset(kinds):
            epilogue = EPILOGUES[len(chosen) % len(EPILOGUES)]
            chosen.append(Chosen(replace(case, epilogue=epilogue), kinds))
            seen.update(kinds)
    return chosen


def missing(chosen: Iterable[Chosen], limits: dict[str, Any], two_pass: bool = False) -> list[str]:
    """Layouts and groups that the device can run, and no case is of."""
    groups = {
        "cta": not two_pass,
        "cluster": not two_pass and limits["max_cluster"] >= 2,
        "grid": not two_pass and limits["cooperative_launch"],
        "two_pass": two_pass,
    }
    seen = {(kind.pass_, kind.layout, kind.group) for one in chosen for kind in one.kinds}
    wanted = product(PASSES, LAYOUTS, [group for group, there in groups.items() if there])
    # Packed is a way to keep rows on chip: the two-pass kernels do not have it.
    return [
        str(Kind(*words))
        for words in wanted
        if words not in seen and not (words[1] == "packed" and words[2] == "two_pass")
    ]


def nodes(call: Callable[[], object]) -> int:
    """How much a call gives the device: the nodes of a CUDA graph of it. (A profiler would not run under a tool.)"""
    call()  # what is done once, is done
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    count = ctypes.c_size_t()
    error = _cudart().cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if error:
        raise RuntimeError(f"cudaGraphGetNodes: cudaError_t {error}")
    return count.value


def _cudart() -> ctypes.CDLL:
    """The runtime that torch has loaded."""
    whole = ctypes.CDLL(None)
    if hasattr(whole, "cudaGraphGetNodes"):
        return whole
    major, *_ = str(torch.version.cuda).split(".")
    return ctypes.CDLL(f"libcudart.so.{major}")


def demoted(one: Chosen, inputs: Inputs) -> list[Kind]:
    """Of the kinds, those that did not run: where fewer blocks fit than the plan expects, as under a tool that adds to
    the kernels' registers, the two-pass path takes their place. It has several launches, the others have one."""
    i = inputs
    _, mean, invstd, _ = ops.forward_train(i.x, i.weight, i.bias, None, None, None, 0.0, i.eps)
    calls: dict[str, Callable[[], object]] = {
        "forward_train": lambda: ops.forward_train(i.x, i.weight, i.bias, None, None, None, 0.0, i.eps),
        "backward_train": lambda: ops.backward(i.grad, i.x, i.weight, mean, invstd, True, True, True, True),
    }
    return [kind for kind in one.kinds if (kind.group == "two_pass") != (nodes(calls[kind.pass_]) > 1)]
