"""The fake CUDA device: CUDA's runtime on a machine without a GPU, for all of torch and of bnkernels that runs above
it.

A test instrument and no backend. torch's own CUDA build and the extension as it is built for GPUs are loaded, and what
they call of libcudart is answered here:

    state.h, .cpp            devices and their limits, errors, faults
    memory.h, .cpp           device memory, poisoned, each access of a kernel looked up
    work.h, streams.h, .cpp  streams, events, captures: work that runs as late as it may, in any allowed order
    kernels.h, .cpp          bnkernels' kernels, compiled for the host, run by the engine of tests/support/simt
    cudart_*.cpp, driver.cpp the entry points, by area
    nccl.cpp                 and those of NCCL that a process group calls, over memory that processes share
    build.py                 compiles these
    python.cpp, runtime.py   from Python: what was put on streams, and Python functions as work
    torch_kernels.py         torch's operators, by the kernels of its CPU

    make test-fake-cuda PYTEST_ARGS=tests/api/test_ops.py       all tests marked cuda, or these
    PYTHONPATH=.:tests/support python -m fake_cuda -m bnkernels.check --device cuda

What it shows: that the launchers ask for what a device can do, on the device and the stream that they should, without a
wait of the host; that a step can be captured and replayed; that memory is alive and of the right device when a kernel
touches it. What it cannot: what nvcc makes of the kernels, registers and occupancy, weak memory order, NCCL itself and
speed.
"""

from __future__ import annotations

import os

VARIABLE = "BNKERNELS_HOST_DEVICE"
"""Set in processes that run on the fake CUDA device, and in those that they start."""


def missing() -> str | None:
    """Why there can be no fake CUDA device here, or None."""
    import torch

    from build_support import find_cuda_root

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if find_cuda_root(os.environ) is None:
        return "the fake CUDA device is compiled with the headers of a CUDA toolkit, and there is none"
    from bnkernels import build_info

    return None if build_info()["with_cuda"] else "this is a CPU-only build of bnkernels"


def environment() -> dict[str, str]:
    """What a process needs in its environment to see the fake CUDA device. Compiles it where that was not done before."""
    from .build import library

    path = str(library())
    return {"LD_PRELOAD": path, VARIABLE: path}


def is_attached() -> bool:
    return VARIABLE in os.environ


def attach() -> None:
    """Torch's operators on the fake CUDA device, for this process."""
    from .torch_kernels import install

    install()
