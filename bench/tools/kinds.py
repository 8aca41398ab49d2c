"""One small case of each kind of plan that a device has, for tools that are too slow for real layers.

The kind of plan of a case depends on the device. The cases are found by search: inputs of increasing size whose plan
(csrc/plan, with the device's limits) is of a kind not seen before.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from bnkernels import _ops as ops
from bnkernels.testing import DTYPE_PAIRS, DTYPES, EPILOGUES, Case, Inputs

PASSES = ("forward_train", "backward_train")
LAYOUTS = ("channels_first", "packed", "channels_last")

BATCHES = (2, 3, 8, 32, 128, 256, 512, 1024, 2048)
CHANNELS = (2, 3, 5, 8, 16, 24, 40, 64, 96, 130, 256, 512, 1024)
PIXELS = (4, 16, 49, 64, 196, 256, 784, 1024, 3136, 4096, 12544, 16384, 65536)
MOST_BYTES = 16 << 20  # largest tensor


@dataclass(frozen=True)
class Kind:
    """A pass, its layout, the kind of its CTA groups ("two_pass": no groups), and further properties."""

    pass_: str
    layout: str
    group: str
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.pass_.split("_")[0], self.layout, self.group, *self.more])


@dataclass(frozen=True)
class Chosen:
    case: Case
    kinds: tuple[Kind, ...]  # of the forward and of the backward


def kind_of(case: Case, pass_: str, limits: dict[str, Any], two_pass: bool = False) -> Kind:
    """The kind of the plan of this pass. two_pass: as with BNKERNELS_PLAN=two_pass."""
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
        "part": plan["predicted"] != plan["floor"],  # only a part of the inputs is cached on chip
        "rounds": persistent["partition"]["channel_tiles"]
        > persistent["groups"],  # a group processes several channel tiles
    }
    return Kind(
        pass_, persistent["partition"]["layout"], persistent["group"], tuple(name for name in more if more[name])
    )


def candidates(most_bytes: int) -> Iterator[Case]:
    """By increasing size; dtypes alternate."""
    sized = []
    for number, shape in enumerate(product(BATCHES, CHANNELS, PIXELS)):
        pair = DTYPE_PAIRS[number % len(DTYPE_PAIRS)]
        sized.append((math.prod(shape) * DTYPES[pair[0]].itemsize, shape, pair))
    for bytes, (batch, channels, pixels), pair in sorted(sized):
        if bytes <= most_bytes:
            yield Case("normal", (batch, channels, pixels), *pair)
            yield Case("normal", (batch * pixels, channels), *pair)  # 2-D: channels last


def choose(limits: dict[str, Any], two_pass: bool = False, most_bytes: int = MOST_BYTES) -> list[Chosen]:
    """One case for each kind of forward and of backward; epilogues alternate."""
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
    """Layouts and groups that the device supports and no case covers."""
    groups = {
        "cta": not two_pass,
        "cluster": not two_pass and limits["max_cluster"] >= 2,
        "grid": not two_pass and limits["cooperative_launch"],
        "two_pass": two_pass,
    }
    seen = {(kind.pass_, kind.layout, kind.group) for one in chosen for kind in one.kinds}
    wanted = product(PASSES, LAYOUTS, [group for group, supported in groups.items() if supported])
    # Only persistent kernels have the packed layout.
    return [
        str(Kind(*words))
        for words in wanted
        if words not in seen and not (words[1] == "packed" and words[2] == "two_pass")
    ]


def nodes(call: Callable[[], object]) -> int:
    """The number of nodes of a CUDA graph of the call. (A profiler does not run under compute-sanitizer.)"""
    call()  # one-time initialization
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    count = ctypes.c_size_t()
    error = _cudart().cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if error:
        raise RuntimeError(f"cudaGraphGetNodes: cudaError_t {error}")
    return count.value


def _cudart() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    whole = ctypes.CDLL(None)
    if hasattr(whole, "cudaGraphGetNodes"):
        return whole
    major, *_ = str(torch.version.cuda).split(".")
    return ctypes.CDLL(f"libcudart.so.{major}")


def demoted(one: Chosen, inputs: Inputs) -> list[Kind]:
    """The kinds of a case that did not run as planned.

    If fewer CTAs fit than the plan expects, as under a tool that adds registers to the kernels, the two-pass path runs
    instead: it has several launches, a persistent kernel has one.
    """
    i = inputs
    _, mean, invstd, _ = ops.forward_train(i.x, i.weight, i.bias, None, None, None, 0.0, i.eps)
    calls: dict[str, Callable[[], object]] = {
        "forward_train": lambda: ops.forward_train(i.x, i.weight, i.bias, None, None, None, 0.0, i.eps),
        "backward_train": lambda: ops.backward(i.grad, i.x, i.weight, mean, invstd, True, True, True, True),
    }
    return [kind for kind in one.kinds if (kind.group == "two_pass") != (nodes(calls[kind.pass_]) > 1)]
