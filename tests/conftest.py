"""What all tests share: the devices, a fixed seed, and who is skipped where, with the reason."""

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
"""record_property(TORCH_INPUTS, (what, count)): summed up and printed at the end of the run (test_torch_inputs.py)."""


def no_cuda() -> str | None:
    """Why tests that need a GPU cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and torch sees none"
    from bnkernels import build_info

    if not build_info()["with_cuda"]:
        return "needs the CUDA kernels, and this is a CPU-only build"
    return None


def not_on_fake_cuda(item: pytest.Item) -> str | None:
    """Why a test is none for the fake CUDA device, or for nothing else."""
    hardware = item.get_closest_marker("hardware")
    if hardware and item.get_closest_marker("cuda") and fake_cuda.is_attached():
        return f"needs a GPU itself: {hardware.args[0]}"
    if item.get_closest_marker("fake_cuda") and not fake_cuda.is_attached():
        return "is of the fake CUDA device (tests/support/fake_cuda)"
    return None


def available_memory(device: str) -> int:
    """Bytes that can be allocated without harm to anybody else."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = not_on_fake_cuda(item) or (no_cuda() if item.get_closest_marker("cuda") else None)
    if reason:
        pytest.skip(reason)
    huge = item.get_closest_marker("huge")
    if huge and os.environ.get("BNKERNELS_HUGE") != "1":
        device = "cuda" if item.get_closest_marker("cuda") else "cpu"
        gib = int(huge.kwargs["gib"])
        if available_memory(device) < (3 * gib) << 30:
            pytest.skip(f"takes {gib} GiB of {device} memory; run where {3 * gib} GiB are free, or by BNKERNELS_HUGE=1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that the package has kernels for."""
    return str(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of OpenMP that spin for each other take minutes for seconds' work where others use the machine too."""
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
    for what in sorted(totals["passed"] | totals["failed"]):
        terminalreporter.write_line(f"{totals['passed'][what]:6d} passed, {totals['failed'][what]:4d} failed   {what}")
    passed, failed = (total.total() if hasattr(total, "total") else sum(total.values()) for total in totals.values())
    terminalreporter.write_line(f"{passed:6d} passed, {failed:4d} failed   in all")
