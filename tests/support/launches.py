"""The kernels that a call launches, by name: for tests on the fake CUDA device (tests/support/fake_cuda)."""

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
    """Launches of a call: this package's kernels without template arguments; torch's ops and copies by their names."""
    with Runtime().recorded() as tasks:
        function(*args)
    return [next((name for name in KERNELS if f"{len(name)}{name}" in task), task) for task in tasks]
