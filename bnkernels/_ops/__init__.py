"""The ops of the compiled library, by name. load.py loads it; fakes.py registers fake implementations for tracers.

This is the only module that calls into C++. Two sets of entry points lead to the same kernels and argument checks:

    forward_train, forward_eval, backward            pybind functions, for eager mode: lower call overhead
    train_functional, eval_op, backward_op           the registered ops torch.ops.bnkernels.*, for tracing

Both accept an epilogue: a residual to add, a ReLU, or both. The steps of synchronised BatchNorm are registered ops
only: call overhead does not matter next to a collective.

The pybind functions also go through torch's dispatcher, so that dispatch modes and tensor subclasses see them.
"""

from __future__ import annotations

import torch

from .load import _C, fail, load_error

try:
    forward_train = _C.forward_train
    forward_eval = _C.forward_eval
    backward = _C.backward
    _empty_cache = _C.empty_cache

    # The CUDA launch plan of a pass, computed on the host, and the device limits that it depends on (csrc/plan/plan.h).
    plan = _C.plan
    device_limits = _C.device_limits
    barrier_workspace = _C.barrier_workspace

    train_op = torch.ops.bnkernels.batch_norm_train.default
    train_functional = torch.ops.bnkernels.batch_norm_train_functional.default
    eval_op = torch.ops.bnkernels.batch_norm_eval.default
    backward_op = torch.ops.bnkernels.batch_norm_backward.default

    # torch's op: grad where another tensor is above a threshold, else 0.
    threshold_backward = torch.ops.aten.threshold_backward.default

    sync_statistics = torch.ops.bnkernels.sync_batch_norm_statistics.default
    sync_combine = torch.ops.bnkernels.sync_batch_norm_combine.default
    sync_combine_functional = torch.ops.bnkernels.sync_batch_norm_combine_functional.default
    sync_normalize = torch.ops.bnkernels.sync_batch_norm_normalize.default
    sync_grad_sums = torch.ops.bnkernels.sync_batch_norm_grad_sums.default
    sync_grad_input = torch.ops.bnkernels.sync_batch_norm_grad_input.default
except AttributeError as error:  # the library was built from another version of the sources
    fail(load_error(error, "this version of bnkernels"))


def build_info() -> dict[str, object]:
    """The build configuration: versions of torch, CUDA and the compiler, GPU architectures, SIMD level of this CPU."""
    return dict(_C.build_info())


def empty_cache() -> int:
    """Releases the unused memory of the CPU result cache to the system, like torch.cuda.empty_cache() on a GPU.

    Freed CPU results of 256 KiB or more are cached and reused, because allocating fresh memory takes longer than a
    BatchNorm. The environment variable BNKERNELS_CPU_CACHE_MB limits the cache (MiB, default 1024; 0 disables it). The
    system can reclaim most of the cache under memory pressure.

    Returns:
        The number of bytes released.
    """
    return _empty_cache()


from . import fakes  # noqa: E402, F401 (the ops must be registered first)
