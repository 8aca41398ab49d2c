"""What a call gives the device, by name: for tests on the fake CUDA device (tests/support/fake_cuda)."""

from __future__ import annotations

from collections.abc import Callable

from fake_cuda.runtime import Runtime

KERNELS = (
    "persistent_forward_kernel",
    "persistent_backward_kernel",
    "finalize_statistics",
    "statistics_kernel",
    "normalize_kernel",
    "finalize_grad_sums",
    "grad_sums_kernel",
    "grad_input_kernel",
    "finalize_welford",
    "combine_statistics",
    "combine_grad_sums",
)


def launches(function: Callable[..., object], *args: object) -> list[str]:
    """What a call gives the device: its kernels by name without template arguments; torch's and copies as they are."""
    with Runtime().recorded() as tasks:
        function(*args)
    return [next((name for name in KERNELS if f"{len(name)}{name}" in task), task) for task in tasks]
