"""Runs one case: this package's layer, torch's layer, and checks of invariants that the tolerance does not cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bnkernels

from ..testing import (
    Case,
    Epilogue,
    ErrorReport,
    Inputs,
    Outputs,
    at_the_sum,
    guarded,
    judge_calls,
    judge_fused_call,
    make_epilogue,
    poisoned_allocations,
    same_bits,
)

BatchNorm = Callable[..., Tensor]
"""A function with the signature of bnkernels.batch_norm, called with residual and activation for an epilogue."""


NO_EPILOGUE = Epilogue()


@dataclass(frozen=True)
class Result:
    """The result of one case. `native` is None if torch's layer does not support the input."""

    case: Case
    ours: tuple[ErrorReport, ...]
    native: tuple[ErrorReport, ...] | None
    problems: tuple[str, ...]
    """Descriptions of violated invariants."""

    @property
    def ratio(self) -> float:
        """The worst error over bound of bnkernels; infinite if an invariant is violated."""
        return math.inf if self.problems else worst_ratio(self.ours)

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


def worst_ratio(error_reports: tuple[ErrorReport, ...]) -> float:
    return max((v.ratio for v in error_reports), default=0.0)


def run_case(case: Case, device: torch.device) -> Result:
    """Runs a case on a device. Errors of bnkernels become problems of the case, except for out-of-memory errors."""
    threads = nullcontext if math.prod(case.shape) > _LARGE else _one_thread
    with threads():
        inputs = case.inputs(device)
        epilogue = make_epilogue(case.epilogue, inputs)
    providers: list[Outputs] = []
    problems: list[str] = []
    try:
        # Looked up at every call, to check the function that users call.
        ours, problems = _call_and_check_invariants(bnkernels.batch_norm, inputs, epilogue)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises errors of kernels here
        providers.append(ours)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return Result(case, (), None, (f"raised {type(error).__name__}: {error}",))
    with threads():
        with suppress(RuntimeError):
            providers.append(call(_native, inputs, epilogue))
        error_reports = _judged(inputs, epilogue, providers)
    return Result(case, error_reports[0], error_reports[1] if len(error_reports) > 1 else None, tuple(problems))


def is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


_LARGE = 1 << 20
"""Up to this many elements, the reference runs in one thread."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch in one thread: for small tensors thread wake-up is slower than the work, especially under load."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def call(layer: BatchNorm, inputs: Inputs, epilogue: Epilogue = NO_EPILOGUE) -> Outputs:
    """One forward and backward through autograd. The tensors in `inputs` are not modified."""
    outputs, _ = _call(layer, inputs, epilogue)
    return outputs


def _native(x: Tensor, *rest: Any, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    y = torch.nn.functional.batch_norm(x, *rest)
    y = y if residual is None else y + residual
    return y if activation is None else torch.relu(y)


def _judged(inputs: Inputs, epilogue: Epilogue, providers: list[Outputs]) -> list[tuple[ErrorReport, ...]]:
    if epilogue.is_empty:
        return [tuple(error_reports) for error_reports in judge_calls(inputs, providers)]  # runs the reference once
    return [tuple(judge_fused_call(inputs, epilogue, outputs)) for outputs in providers]


def _call(layer: BatchNorm, inputs: Inputs, epilogue: Epilogue) -> tuple[Outputs, list[str]]:
    problems = []
    residual = None if epilogue.residual is None else epilogue.residual.detach().requires_grad_()
    more: dict[str, Any] = {}
    if not epilogue.is_empty:
        more = {"residual": residual, "activation": "relu" if epilogue.relu else None}
    x = inputs.x.detach().requires_grad_()
    weight, bias = (t if t is None else t.detach().requires_grad_() for t in (inputs.weight, inputs.bias))
    guards = {}
    for name in ("running_mean", "running_var"):
        before = getattr(inputs, name)
        if before is not None:
            # With the alignment of the case, between guard bands.
            offset = before.storage_offset()
            guards[name] = guarded(tuple(before.shape), before.dtype, before.device, values=before, offset=offset)
    running = {name: guard.tensor for name, guard in guards.items()}
    y = layer(
        x,
        running.get("running_mean"),
        running.get("running_var"),
        weight,
        bias,
        inputs.training,
        inputs.momentum,
        inputs.eps,
        **more,
    )
    leaves = {"dx": x, "dweight": weight, "dbias": bias, "dresidual": residual}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), inputs.grad)))
    judged = {name: grad for name, grad in grads.items() if name != "dresidual"}
    outputs = Outputs(y=y.detach(), **running, **judged)
    if residual is not None and not same_bits(grads["dresidual"], at_the_sum(inputs, epilogue, y.detach()).grad):
        problems.append("the residual's gradient differs from the gradient of the sum")
    for name, guard in guards.items():
        if not guard.intact():
            problems.append(f"wrote out of bounds of {name}")
        if not inputs.training and not same_bits(guard.tensor, getattr(inputs, name)):
            problems.append(f"changed {name} in inference")
    for name, out, like in (("y", outputs.y, x), *((name, grads[name], leaf) for name, leaf in wanted.items())):
        if out is not None and (out.dtype != like.dtype or out.shape != like.shape):
            expected = f"{like.dtype} {tuple(like.shape)}"
            problems.append(f"expected {name} to be {expected}, but got {out.dtype} {tuple(out.shape)}")
    return outputs, problems


def _call_and_check_invariants(layer: BatchNorm, inputs: Inputs, epilogue: Epilogue) -> tuple[Outputs, list[str]]:
    """The outputs and the violated invariants.

    The call must not modify its inputs, must write its outputs completely and nothing else, and must return the same
    bits every time, for any number of threads.
    """
    names = ("x", "grad", "weight", "bias", "running_mean", "running_var")
    before = {name: None if (t := getattr(inputs, name)) is None else t.clone() for name in names}
    residual = None if epilogue.residual is None else epilogue.residual.clone()
    outputs, problems = _call(layer, inputs, epilogue)
    for name in names:
        if not same_bits(getattr(inputs, name), before[name]):
            problems.append(f"changed its input {name}")
    if not same_bits(epilogue.residual, residual):
        problems.append("changed its input residual")
    with poisoned_allocations(), _one_thread():
        repeated, _ = _call(layer, inputs, epilogue)
    for name in ("y", "dx", "dweight", "dbias", "running_mean", "running_var"):
        if not same_bits(getattr(outputs, name), getattr(repeated, name)):
            problems.append(f"{name} differs bitwise in a repeated call, in one thread and with NaN in fresh memory")
    return outputs, problems
