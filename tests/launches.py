"""What a call gives the device, by name: for tests on the host device (tests/host_device)."""

from __future__ import annotations

from collections.abc import Callable

from host_device.runtime import Runtime

KERNELS = (
    "resident_forward_kernel",
    "resident_backward_kernel",
    "finish_statistics",
    "statistics_kernel",
    "normalize_kernel",
    "finish_grad_sums",
    "grad_sums_kernel",
    "grad_input_kernel",
    "finish_moments",
    "join_statistics",
    "join_grad_sums",
)


def launches(function: Callable[..., object], *args: object) -> list[str]:
    """What a call gives the device: its kernels by name without template arguments; torch's and copies as they are."""
    with Runtime().recorded() as tasks:
        function(*args)
    return [next((name for name in KERNELS if f"{len(name)}{name}" in task), task) for task in tasks]
