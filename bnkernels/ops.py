"""The compiled library: loads it and names its ops. fakes.py describes them to torch's tracers.

The only file that knows how Python reaches C++. Two entry points lead to the same kernels and argument checks:

    forward_train, forward_eval, backward            pybind functions, for eager: the cheaper call
    train_functional, eval_op, backward_op           the registered ops torch.ops.bnkernels.*, for tracing

Both take an epilogue: a residual to add, a ReLU, or both. The steps of a batch that lies on several ranks have
registered ops alone: next to a collective the cost of a call does not matter.

The pybind functions go through torch's dispatcher as well, so that dispatch modes and tensor subclasses see them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch

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
    _empty_cache = _C.empty_cache

    # How the CUDA kernels would run a pass, by arithmetic alone, and the limits of a CUDA device that this depends on
    # (csrc/plan/plan.h).
    plan = _C.plan
    device_limits = _C.device_limits
    barrier_workspace = _C.barrier_workspace

    train_op = torch.ops.bnkernels.batch_norm_train.default
    train_functional = torch.ops.bnkernels.batch_norm_train_functional.default
    eval_op = torch.ops.bnkernels.batch_norm_eval.default
    backward_op = torch.ops.bnkernels.batch_norm_backward.default

    # torch's own: grad where another tensor is above a threshold.
    threshold_backward = torch.ops.aten.threshold_backward.default

    sync_statistics = torch.ops.bnkernels.sync_batch_norm_statistics.default
    sync_combine = torch.ops.bnkernels.sync_batch_norm_combine.default
    sync_combine_functional = torch.ops.bnkernels.sync_batch_norm_combine_functional.default
    sync_normalize = torch.ops.bnkernels.sync_batch_norm_normalize.default
    sync_grad_sums = torch.ops.bnkernels.sync_batch_norm_grad_sums.default
    sync_grad_input = torch.ops.bnkernels.sync_batch_norm_grad_input.default
except AttributeError as error:  # built from sources that did not have it yet, or no longer
    _refuse(_load_error(error, "this version of bnkernels"))


def build_info() -> dict[str, object]:
    """What this installation was built with: versions of torch, CUDA and the compiler, GPU architectures, CPU SIMD."""
    return dict(_C.build_info())


def empty_cache() -> int:
    """Gives the memory that CPU results keep for later ones back to the system, and returns how many bytes that was.

    What torch.cuda.empty_cache() is for a GPU. Results of 256 KiB and more leave theirs when they are freed, as fresh
    memory costs more time than a BatchNorm does: up to BNKERNELS_CPU_CACHE_MB (MiB, default 1024; 0: nothing). The
    system takes most of it by itself when it is short.
    """
    return _empty_cache()


from . import fakes  # noqa: E402, F401 (of ops that are there now)
