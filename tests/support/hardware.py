"""Marks for CUDA tests that the fake CUDA device (tests/support/fake_cuda) cannot run in reasonable time, or at all."""

from __future__ import annotations

import pytest

LARGE = pytest.mark.hardware("this many threads or elements take minutes on the fake CUDA device")
INDUCTOR = pytest.mark.hardware("inductor compiles its own kernels for the GPU that it detects")
PYTHON = pytest.mark.hardware(
    "formulas in Python take minutes on the fake CUDA device; other tests compare them with the CPU's"
)
DRIVER = pytest.mark.hardware("torch's profiler and torch.jit's fuser call the driver directly")
