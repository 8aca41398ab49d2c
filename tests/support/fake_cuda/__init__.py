"""The fake CUDA device: CUDA's runtime on a machine without a GPU, for torch and bnkernels on top of it.

It is a test instrument, not a backend. torch's CUDA build and the extension's GPU build are loaded unchanged, and their
calls of libcudart are answered here:

    state.h, .cpp            devices and their limits, errors, faults
    memory.h, .cpp           device memory, poisoned; every access of a kernel is checked
    work.h, streams.h, .cpp  streams, events, captures: work runs as late as possible, in any allowed order
    kernels.h, .cpp          bnkernels' kernels, compiled for the host, run by the engine of tests/support/simt
    cudart_*.cpp, driver.cpp the entry points, by area
    nccl.cpp                 the NCCL entry points of a process group, over memory shared by the processes
    build.py                 compiles these
    python.cpp, runtime.py   from Python: the recorded work of streams, and Python functions as work
    torch_kernels.py         torch's operators, computed by its CPU kernels

    make test-fake-cuda PYTEST_ARGS=tests/api/test_ops.py       all tests marked cuda, or these
    PYTHONPATH=.:tests/support python -m fake_cuda -m bnkernels.check --device cuda

It shows that the launchers request only what a device supports, on the right device and stream, without a host
synchronisation; that a step can be captured and replayed; and that memory is alive and on the right device when a
kernel accesses it. It does not show nvcc's code, registers and occupancy, weak memory order, NCCL itself, or speed.
"""

from __future__ import annotations

import os

VARIABLE = "BNKERNELS_FAKE_CUDA"
"""Set in processes that run on the fake CUDA device, and in those that they start."""


def missing() -> str | None:
    """Why the fake CUDA device is unavailable here, or None."""
    import torch

    from build_support import find_cuda_root

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if find_cuda_root(os.environ) is None:
        return "the fake CUDA device needs the headers of a CUDA toolkit, but none was found"
    from bnkernels import build_info

    return None if build_info()["with_cuda"] else "this is a CPU-only build of bnkernels"


def environment() -> dict[str, str]:
    """The environment variables of a process that uses the fake CUDA device. Compiles it if needed."""
    from .build import library

    path = str(library())
    return {"LD_PRELOAD": path, VARIABLE: path}


def is_attached() -> bool:
    return VARIABLE in os.environ


def attach() -> None:
    """Installs torch's operators for the fake CUDA device, in this process."""
    from .torch_kernels import install

    install()
