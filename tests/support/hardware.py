"""Tests marked cuda that the fake CUDA device (tests/support/fake_cuda) cannot run, or not in reasonable time, and why."""

from __future__ import annotations

import pytest

LARGE = pytest.mark.hardware("so many threads, or elements, take minutes on the fake CUDA device")
INDUCTOR = pytest.mark.hardware("inductor compiles its own kernels for the GPU that it finds")
PYTHON = pytest.mark.hardware(
    "minutes on the fake CUDA device for formulas in Python, which other tests hold to the CPU's"
)
DRIVER = pytest.mark.hardware("torch's profiler and torch.jit's fuser go to the driver themselves")
