"""The compiled library: loads it, names its ops, and describes them to torch's tracers.

The only file that knows how Python reaches C++. Two doors lead to the same kernels and the same argument checks:

    forward_train, forward_eval, backward            pybind functions, for eager: the cheaper call
    train_functional, eval_op, backward_op           the registered ops torch.ops.bnkernels.*, for tracing

The steps of a batch that lies on several ranks have the second alone: beside a collective a call costs nothing.

The pybind functions go through torch's dispatcher as well, so that dispatch modes and tensor subclasses see them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

_FIX = (
    "Build bnkernels again with the torch that it is to run with:\n"
    "    pip install --no-build-isolation --force-reinstall --no-deps bnkernels\n"
    "(from a source tree: pip install --no-build-isolation .)"
)


def _built_against() -> dict[str, str]:
    """The versions of torch and CUDA that the library beside this file was built against.

    Read from the tag that the build compiles into it, as a library that does not load cannot be asked.
    """
    for library in sorted(Path(__file__).parent.glob("_C.*")):
        if library.suffix in (".so", ".pyd"):
            tag = re.search(rb"bnkernels-build torch=([^\s\0]+) cuda=([^\s\0]+)", library.read_bytes())
            if tag is not None:
                return {"library": library.name, "torch": tag[1].decode(), "cuda": tag[2].decode()}
            return {"library": library.name, "torch": "an unknown torch", "cuda": "unknown"}
    return {}


def _load_error(reason: object, misfits: str = "this torch") -> ImportError:
    running = f"running: torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    built = _built_against()
    if not built:
        return ImportError(f"bnkernels has no compiled library for this Python: it was not built.\n{running}\n{_FIX}")
    return ImportError(
        f"bnkernels' compiled library {built['library']} does not fit {misfits}: {reason}\n"
        f"built against: torch {built['torch']}, CUDA {built['cuda']}\n{running}\n{_FIX}"
    )


def _is_check() -> bool:
    """Whether this import is on behalf of `python -m bnkernels.check` or its script."""
    words = sys.orig_argv
    return any(pair == ("-m", "bnkernels.check") for pair in pairwise(words)) or any(
        Path(word).stem == "bnkernels-check" for word in words[:2]
    )


def _refuse(error: ImportError, cause: ImportError | None = None) -> NoReturn:
    # The check cannot speak before the package is imported, and Python's own exit code for an import that fails is 1:
    # from the check that would mean "out of bounds".
    if _is_check():
        print(f"bnkernels.check could not run: {error}", file=sys.stderr)
        raise SystemExit(2)
    raise error from cause


def _release(version: str) -> tuple[str, ...]:
    """("2", "15") of "2.15.0+cu132": torch keeps its C++ ABI within these, and not beyond."""
    return tuple(version.split(".")[:2])


def _misfit(built: Mapping[str, object], torch_version: str, torch_cuda: str | None) -> str | None:
    """Why a library that has loaded must not be used, or None."""
    if _release(str(built["torch"])) != _release(torch_version):
        # It loaded by luck: the layout of torch's C++ objects may differ, and then memory is silently corrupted.
        return "torch's C++ interface changes between releases"
    built_cuda = built["cuda"]
    if built_cuda is not None and torch_cuda is not None and _release(str(built_cuda))[0] != _release(torch_cuda)[0]:
        # Two CUDA runtimes in one process: streams and errors of the one mean nothing to the other.
        return "the CUDA runtime changes between major versions"
    return None


try:
    from bnkernels import _C
except ImportError as error:
    _refuse(_load_error(error), error)

_reason = _misfit(_C.build_info(), torch.__version__, torch.version.cuda)
if _reason is not None:
    _refuse(_load_error(_reason))

try:
    forward_train = _C.forward_train
    forward_eval = _C.forward_eval
    backward = _C.backward

    # How the CUDA kernels would run a pass, by arithmetic alone, and the limits of a CUDA device that this depends on
    # (csrc/plan.h).
    plan = _C.plan
    device_limits = _C.device_limits

    train_op = torch.ops.bnkernels.batch_norm_train.default
    train_functional = torch.ops.bnkernels.batch_norm_train_functional.default
    eval_op = torch.ops.bnkernels.batch_norm_eval.default
    backward_op = torch.ops.bnkernels.batch_norm_backward.default

    sync_statistics = torch.ops.bnkernels.sync_batch_norm_statistics.default
    sync_join = torch.ops.bnkernels.sync_batch_norm_join.default
    sync_join_functional = torch.ops.bnkernels.sync_batch_norm_join_functional.default
    sync_normalize = torch.ops.bnkernels.sync_batch_norm_normalize.default
    sync_grad_sums = torch.ops.bnkernels.sync_batch_norm_grad_sums.default
    sync_grad_input = torch.ops.bnkernels.sync_batch_norm_grad_input.default
except AttributeError as error:  # built from sources that did not have it yet, or no longer
    _refuse(_load_error(error, "this version of bnkernels"))


def build_info() -> dict[str, object]:
    """What this installation was built with: versions of torch, CUDA and the compiler, GPU architectures, CPU SIMD."""
    return dict(_C.build_info())


# Fakes: shapes, dtypes and strides of the outputs, for FakeTensor, torch.compile and torch.export. They check sizes,
# dtypes and devices as the real ops do, so that a wrong call fails when it is traced, and not in the compiled code. A
# call that mixes real and meta tensors comes here too.


def _like(x: Tensor) -> Tensor:
    """A tensor in the memory format of y and grad_x: the one that x is in, or is nearest to."""
    memory_format = torch._prims_common.suggest_memory_format(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _updated(
    mean: Tensor, running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The buffers that a functional op returns."""

    def updated(buffer: Tensor | None) -> Tensor:
        return mean.new_empty(0) if buffer is None else torch.empty_like(buffer)

    return updated(running_mean), updated(running_var), updated(num_batches_tracked)


def _parameter_grads(
    x: Tensor, weight: Tensor | None, mean: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    parameter = weight if weight is not None else mean
    return (
        parameter.new_empty(x.shape[1] if need_weight and weight is not None else 0),
        parameter.new_empty(x.shape[1] if need_bias else 0),
    )


def _check(x: Tensor, **vectors: Tensor | None) -> None:
    if x.dim() < 2:
        raise RuntimeError(f"batch_norm: expected an input of 2 or more dimensions, but got {x.dim()}")
    _check_vectors(x.shape[1], x.dtype, x.device, **vectors)


def _check_vectors(channels: int, dtype: torch.dtype, device: torch.device, **vectors: Tensor | None) -> None:
    dtypes = {dtype, torch.float32} if dtype in (torch.float16, torch.bfloat16) else {dtype}
    for name, vector in vectors.items():
        if vector is None:
            continue
        torch._check(vector.numel() == channels, partial(_wrong_size, name, vector, channels))
        if vector.device != device:
            raise RuntimeError(f"batch_norm: expected {name} on the input's device, {device}, not {vector.device}")
        if vector.dtype not in dtypes:
            raise RuntimeError(f"batch_norm: expected {name} of one of {dtypes}, not {vector.dtype}")


def _wrong_size(name: str, vector: Tensor, channels: int) -> str:
    return f"{name} should contain {channels} elements not {vector.numel()}"


def _check_rows(rows: Tensor, size: int, device: torch.device) -> None:
    if rows.dim() != 2 or rows.dtype != torch.float64:
        raise RuntimeError(
            f"sync_batch_norm: expected a row of doubles from each rank, but got shape {tuple(rows.shape)} and dtype "
            f"{rows.dtype}"
        )
    torch._check(
        rows.shape[1] == size,
        lambda: f"sync_batch_norm: expected a row of {size} doubles from each rank, but got shape {rows.shape}",
    )
    if rows.device != device:
        raise RuntimeError(f"sync_batch_norm: expected the ranks' rows on {device}, but got them on {rows.device}")


def _check_grad(grad: Tensor, x: Tensor) -> None:
    torch._check(
        grad.shape == x.shape,
        lambda: f"batch_norm backward: expected a gradient of shape {x.shape}, but got {grad.shape}",
    )


@torch.library.register_fake("bnkernels::batch_norm_train")
def _train_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    return _like(x), _statistic(x), _statistic(x)


@torch.library.register_fake("bnkernels::batch_norm_train_functional")
def _train_functional_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    mean, invstd = _statistic(x), _statistic(x)
    return _like(x), mean, invstd, *_updated(mean, running_mean, running_var, num_batches_tracked)


@torch.library.register_fake("bnkernels::batch_norm_eval")
def _eval_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    return _like(x), _statistic(x), _statistic(x)


@torch.library.register_fake("bnkernels::batch_norm_backward")
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_grad(grad, x)
    _check(x, weight=weight, mean=mean, invstd=invstd)
    return _like(x) if need_input else x.new_empty(0), *_parameter_grads(x, weight, mean, need_weight, need_bias)


@torch.library.register_fake("bnkernels::sync_batch_norm_statistics")
def _sync_statistics_fake(x: Tensor, eps: float) -> Tensor:
    _check(x)
    return x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)


def _joined_fake(
    rows: Tensor, running_mean: Tensor | None, running_var: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    channels = (rows.shape[1] - 1) // 2 if rows.dim() == 2 else 0
    _check_rows(rows, 2 * channels + 1, rows.device)
    _check_vectors(channels, dtype, rows.device, running_mean=running_mean, running_var=running_var)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    mean, invstd = (rows.new_empty(channels, dtype=statistic) for _ in range(2))
    return mean, invstd, rows.new_empty(1)


@torch.library.register_fake("bnkernels::sync_batch_norm_join")
def _sync_join_fake(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _joined_fake(rows, running_mean, running_var, dtype)


@torch.library.register_fake("bnkernels::sync_batch_norm_join_functional")
def _sync_join_functional_fake(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    mean, invstd, count = _joined_fake(rows, running_mean, running_var, dtype)
    return mean, invstd, count, *_updated(mean, running_mean, running_var, num_batches_tracked)


@torch.library.register_fake("bnkernels::sync_batch_norm_normalize")
def _sync_normalize_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    _check(x, weight=weight, bias=bias, mean=mean, invstd=invstd)
    return _like(x)


@torch.library.register_fake("bnkernels::sync_batch_norm_grad_sums")
def _sync_grad_sums_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_grad(grad, x)
    _check(x, weight=weight, mean=mean, invstd=invstd)
    row = x.new_empty(2 * x.shape[1], dtype=torch.float64)
    return row, *_parameter_grads(x, weight, mean, need_weight, need_bias)


@torch.library.register_fake("bnkernels::sync_batch_norm_grad_input")
def _sync_grad_input_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, rows: Tensor, count: Tensor
) -> Tensor:
    _check_grad(grad, x)
    _check(x, weight=weight, mean=mean, invstd=invstd)
    _check_rows(rows, 2 * x.shape[1], x.device)
    if count.dtype != torch.float64 or count.device != x.device:
        raise RuntimeError(
            f"sync_batch_norm: expected the count as one double on {x.device}, but got {count.dtype} on {count.device}"
        )
    return _like(x)
