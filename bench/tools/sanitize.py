"""Calls at sizes small enough for compute-sanitizer: every kernel variant, or a case of each kind of plan.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.tools.sanitize

With --kinds (run by bench/gpu.sh under three tools) the plans of the device select some twenty cases. A layout or kind
of group without a case is an error. With BNKERNELS_PLAN=two_pass the cases are of the two-pass path.

The caching allocator is disabled: every tensor is a separate allocation, so that memcheck detects an access one element
out of bounds. Results are also checked against the reference: a race that a tool does not model may still show there.
Exit code 0: all results within the bound; 1: some are not, or a kind is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import bnkernels
from bnkernels import _ops as ops
from bnkernels.check.ranks import call_in_ranks
from bnkernels.testing import (
    DTYPE_PAIRS,
    EPILOGUES,
    LAYOUTS,
    Case,
    Epilogue,
    ErrorReport,
    Inputs,
    Outputs,
    judge_call,
    judge_fused_call,
    make_epilogue,
    misaligned,
    poisoned_allocations,
)

from . import kinds

# One for each path through the kernels (csrc/plan selects the path).
SHAPES: tuple[tuple[int, ...], ...] = (
    (2, 3),  # two rows, less than a vector of channels
    (67, 100),  # 2-D: the channels-last kernels, a partial last channel tile
    (3, 6, 31),  # rows shorter than a warp, each with partial vectors at both ends
    (2, 8, 4, 4),  # full vectors only
    (2, 20, 7, 7),  # 49 elements: alignment differs by row
    (9, 130, 3, 11),  # more than one channel tile
    (1, 2, 10_007),  # one long odd row: several splits per channel, combined by the finalize kernels
    (40, 16, 16, 16),  # the same with full vectors
)

# Layout and alignment (aligned, or off by one element) of the kernels' inputs. Other layouts are copied to these.
KERNEL_LAYOUTS = ("contiguous", "channels_last", "offset", "channels_last_offset")


EPILOGUE_SHAPES = (SHAPES[4], SHAPES[5])  # no path is specific to epilogues, but each variant is another kernel


def cases(quick: bool = False) -> Iterator[Case]:
    """Dtypes x layouts x alignments x training and inference, for each shape; with each epilogue for two shapes.

    quick: two shapes, and one with epilogues.
    """
    yield from _plain_cases(SHAPES[3:5] if quick else SHAPES)
    for epilogue in EPILOGUES[1:]:
        for case in _plain_cases(EPILOGUE_SHAPES[:1] if quick else EPILOGUE_SHAPES):
            yield replace(case, epilogue=epilogue)


def _plain_cases(shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    for shape in shapes:
        for layout in KERNEL_LAYOUTS:
            if not LAYOUTS[layout].applies(shape):
                continue
            for dtype, parameters in DTYPE_PAIRS:
                for training in (True, False):
                    yield Case("normal", shape, dtype, parameters, layout, training=training)


def _copy(statistics: Tensor | None) -> Tensor | None:
    """A copy for the call to update, as judge_call() needs the original; with the same misalignment."""
    if statistics is None:
        return None
    return misaligned(statistics) if statistics.storage_offset() else statistics.clone()


def run_case(inputs: Inputs, epilogue: Epilogue) -> list[ErrorReport]:
    """The error reports of a forward and backward through the public function, with all gradients."""
    mean, var = _copy(inputs.running_mean), _copy(inputs.running_var)
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias) if t is not None]
    x, weight, bias = leaves
    more: dict[str, Any] = {}
    if epilogue.residual is not None:
        more["residual"] = epilogue.residual.detach().requires_grad_()
        leaves.append(more["residual"])
    if epilogue.relu:
        more["activation"] = "relu"
    y = bnkernels.batch_norm(x, mean, var, weight, bias, inputs.training, inputs.momentum or 0.0, inputs.eps, **more)
    dx, dweight, dbias, *_ = torch.autograd.grad(y, leaves, inputs.grad)
    outputs = Outputs(y=y.detach(), running_mean=mean, running_var=var, dx=dx, dweight=dweight, dbias=dbias)
    return judge_fused_call(inputs, epilogue, outputs)


def counts_a_batch(inputs: Inputs) -> bool:
    """Whether momentum=None counts one batch: the last CTA to arrive at a shared counter does it."""
    mean, var, counter = _copy(inputs.running_mean), _copy(inputs.running_var), torch.zeros((), dtype=torch.int64)
    counter = counter.to(inputs.x.device)
    ops.forward_train(inputs.x, inputs.weight, inputs.bias, mean, var, counter, None, inputs.eps)
    return counter.item() == 1


def in_ranks(inputs: Inputs) -> list[ErrorReport]:
    """The SyncBatchNorm kernels on three ranks, one of them without data."""
    batch = len(inputs.x)
    return judge_call(inputs, call_in_ranks(inputs, (0, 0, batch // 2, batch)))


@contextmanager
def uncached_memory(device: torch.device) -> Iterator[None]:
    """Every tensor is a separate allocation."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.init()
    torch.cuda.memory.caching_allocator_enable(False)
    try:
        yield
    finally:
        torch.cuda.memory.caching_allocator_enable(True)


def run_variants(device: torch.device, quick: bool) -> tuple[int, list[str]]:
    """The number of calls, and one line per error."""
    count = 0
    wrong: list[str] = []
    for case in cases(quick):
        with uncached_memory(device):
            inputs = case.inputs(device)
            with poisoned_allocations():
                error_reports = run_case(inputs, make_epilogue(case.epilogue, inputs))
                if case.training and not case.epilogue:
                    error_reports += in_ranks(inputs)
        count += 1
        wrong += [f"{case}: {error_report}" for error_report in error_reports if not error_report.ok]
    return count, wrong


def run_kinds(device: torch.device) -> tuple[int, list[str]]:
    """As run_variants. Prints each case before it runs, in case the tool is interrupted."""
    limits = ops.device_limits(device.index or 0)
    two_pass = os.environ.get("BNKERNELS_PLAN") == "two_pass"
    chosen = kinds.choose(limits, two_pass)
    wrong = [f"no case is {kind}" for kind in kinds.missing(chosen, limits, two_pass)]
    for one in chosen:
        print(f"{one.case}: {', '.join(map(str, one.kinds))}", flush=True)
        with uncached_memory(device):
            inputs = one.case.inputs(device)
            with poisoned_allocations():
                error_reports = run_case(inputs, make_epilogue(one.case.epilogue, inputs))
                if two_pass:
                    error_reports += in_ranks(inputs)
                if not counts_a_batch(inputs):
                    wrong.append(f"{one.case}: the batch is not counted once")
        wrong += [f"{one.case}: not run as {kind}" for kind in kinds.demoted(one, inputs)]
        wrong += [f"{one.case}: {error_report}" for error_report in error_reports if not error_report.ok]
    return len(chosen), wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description="Runs the kernels at small sizes, for compute-sanitizer.")
    parse.add_argument("--device", default="cuda", help="default: cuda")
    choice = parse.add_mutually_exclusive_group()
    choice.add_argument("--quick", action="store_true", help="two shapes instead of all")
    choice.add_argument("--kinds", action="store_true", help="one case of each kind of plan that the device has")
    options = parse.parse_args(arguments)
    device = torch.device(options.device)
    count, wrong = run_kinds(device) if options.kinds else run_variants(device, options.quick)
    print(f"{count} calls, forward and backward, on {device}: {len(wrong)} results outside the bound, or missing")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
