"""Fixtures and hooks of all tests: devices, a fixed seed, and the reasons for skips."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import pytest
import torch
from _pytest.terminal import TerminalReporter

if fake_cuda.is_attached():
    fake_cuda.attach()

TORCH_INPUTS = "torch_inputs"
"""record_property(TORCH_INPUTS, (label, count)): summed and printed at the end of the run (test_torch_inputs.py)."""


def no_cuda() -> str | None:
    """Reason to skip a test that needs a GPU, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and torch sees none"
    from bnkernels import build_info

    if not build_info()["with_cuda"]:
        return "needs the CUDA kernels, and this is a CPU-only build"
    return None


def fake_cuda_skip_reason(item: pytest.Item) -> str | None:
    """Reason to skip a test that cannot run on the fake CUDA device, or only runs there, or None."""
    hardware = item.get_closest_marker("hardware")
    if hardware and item.get_closest_marker("cuda") and fake_cuda.is_attached():
        return f"needs a real GPU: {hardware.args[0]}"
    if item.get_closest_marker("fake_cuda") and not fake_cuda.is_attached():
        return "needs the fake CUDA device (tests/support/fake_cuda)"
    return None


def available_memory(device: str) -> int:
    """Memory in bytes that a test can allocate without swapping or starving other processes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = fake_cuda_skip_reason(item) or (no_cuda() if item.get_closest_marker("cuda") else None)
    if reason:
        pytest.skip(reason)
    huge = item.get_closest_marker("huge")
    if huge and os.environ.get("BNKERNELS_HUGE") != "1":
        device = "cuda" if item.get_closest_marker("cuda") else "cpu"
        gib = int(huge.kwargs["gib"])
        if available_memory(device) < (3 * gib) << 30:
            pytest.skip(f"needs {gib} GiB of {device} memory; runs if {3 * gib} GiB are free or if BNKERNELS_HUGE=1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device type that the package has kernels for."""
    return str(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: spinning OpenMP threads on a shared machine turn seconds of work into minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    totals: dict[str, Counter[str]] = {"passed": Counter(), "failed": Counter()}
    for outcome, total in totals.items():
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == TORCH_INPUTS and report.when == "call":
                    total[value[0]] += value[1]
    if not any(totals.values()):
        return
    terminalreporter.section("torch's own BatchNorm inputs, run on bnkernels")
    for label in sorted(totals["passed"] | totals["failed"]):
        terminalreporter.write_line(
            f"{totals['passed'][label]:6d} passed, {totals['failed'][label]:4d} failed   {label}"
        )
    passed, failed = (total.total() if hasattr(total, "total") else sum(total.values()) for total in totals.values())
    terminalreporter.write_line(f"{passed:6d} passed, {failed:4d} failed   total")
