"""Devices for which plans can be made: the GPUs of this machine, and well-known GPUs by name.

A plan depends on CUDA device attributes; time estimates also need the memory bandwidth. Sources of the values for named
devices:

    per multiprocessor    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the shared
                          memory that the system reserves per block: its sections on compute capability 8.x and later
    multiprocessors       NVIDIA's architecture white papers (Turing, Ampere, Ada, Hopper, Blackwell)
    memory bandwidth      NVIDIA's datasheet or product page of the GPU (B200: DGX B200's 64 TB/s for eight)
    MIG slices            multiprocessors from `nvidia-smi mig -lgip`; the bandwidth is that of the GPU times the
                          fraction of memory of the profile (NVIDIA's MIG User Guide)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import _ops as ops

_KIB = 1024
_GIGA = 1e9

DEFAULT = "h200"
"""The device to explain for if none is given and there is no usable GPU."""


@dataclass(frozen=True)
class Limits:
    """DeviceLimits of csrc/plan/plan.h. Shared memory in bytes."""

    multiprocessors: int
    max_threads_per_multiprocessor: int
    max_blocks_per_multiprocessor: int
    shared_per_multiprocessor: int
    shared_per_block: int
    shared_reserved: int
    cooperative_launch: bool
    max_cluster: int

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ops.plan."""
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """A CUDA device. bandwidth: of its memory in bytes/s, None if unknown; bandwidth_source: its source."""

    name: str
    title: str
    limits: Limits
    bandwidth: float | None
    bandwidth_source: str


@dataclass(frozen=True)
class _Gpu:
    title: str  # torch.cuda.get_device_name()
    capability: str
    multiprocessors: int
    gigabytes_per_second: float
    # MIG profiles: multiprocessors, and eighths of the memory.
    slices: dict[str, tuple[int, int]]


# By compute capability: threads, blocks and KiB of shared memory per multiprocessor; KiB of shared memory available and
# reserved per block; blocks per cluster.
_MULTIPROCESSORS = {
    "7.5": (1024, 16, 64, 64, 0, 0),
    "8.0": (2048, 32, 164, 163, 1, 0),
    "8.6": (1536, 16, 100, 99, 1, 0),
    "8.9": (1536, 24, 100, 99, 1, 0),
    "9.0": (2048, 32, 228, 227, 1, 8),
    "10.0": (2048, 32, 228, 227, 1, 8),
    "12.0": (1536, 24, 100, 99, 1, 8),
}

_A100_40GB = {"1g.5gb": (14, 1), "2g.10gb": (28, 2), "3g.20gb": (42, 4), "4g.20gb": (56, 4), "7g.40gb": (98, 8)}
_A100_80GB = {"1g.10gb": (14, 1), "2g.20gb": (28, 2), "3g.40gb": (42, 4), "4g.40gb": (56, 4), "7g.80gb": (98, 8)}
_H100 = {"1g.10gb": (16, 1), "1g.20gb": (26, 2), "2g.20gb": (32, 2), "3g.40gb": (60, 4), "4g.40gb": (64, 4)}
_H200 = {"1g.18gb": (16, 1), "1g.35gb": (26, 2), "2g.35gb": (32, 2), "3g.71gb": (60, 4), "4g.71gb": (64, 4)}

_GPUS = {
    "t4": _Gpu("Tesla T4", "7.5", 40, 320, {}),
    "a10": _Gpu("NVIDIA A10", "8.6", 72, 600, {}),
    "a100": _Gpu("NVIDIA A100-SXM4-40GB", "8.0", 108, 1555, _A100_40GB),
    "a100-80gb": _Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108, 2039, _A100_80GB),
    "a100-80gb-pcie": _Gpu("NVIDIA A100 80GB PCIe", "8.0", 108, 1935, _A100_80GB),
    "l4": _Gpu("NVIDIA L4", "8.9", 58, 300, {}),
    "l40s": _Gpu("NVIDIA L40S", "8.9", 142, 864, {}),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", "9.0", 132, 3350, _H100),
    "h100-pcie": _Gpu("NVIDIA H100 PCIe", "9.0", 114, 2000, {}),
    "h200": _Gpu("NVIDIA H200", "9.0", 132, 4800, _H200),
    "b200": _Gpu("NVIDIA B200", "10.0", 148, 8000, {}),
    "rtx3090": _Gpu("NVIDIA GeForce RTX 3090", "8.6", 82, 936, {}),
    "rtx4090": _Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 1008, {}),
    "rtx5090": _Gpu("NVIDIA GeForce RTX 5090", "12.0", 170, 1792, {}),
}


def _limits(capability: str, multiprocessors: int) -> Limits:
    threads, blocks, shared, shared_block, reserved, cluster = _MULTIPROCESSORS[capability]
    shared, shared_block, reserved = (kib * _KIB for kib in (shared, shared_block, reserved))
    return Limits(multiprocessors, threads, blocks, shared, shared_block, reserved, True, cluster)


def _table() -> dict[str, Device]:
    table = {}
    for name, gpu in _GPUS.items():
        bandwidth = gpu.gigabytes_per_second * _GIGA
        table[name] = Device(name, gpu.title, _limits(gpu.capability, gpu.multiprocessors), bandwidth, "datasheet")
        for profile, (multiprocessors, eighths) in gpu.slices.items():
            table[f"{name}-{profile}"] = Device(
                f"{name}-{profile}",
                f"{gpu.title} MIG {profile}",
                _limits(gpu.capability, multiprocessors),
                bandwidth * eighths / 8,
                f"datasheet, {eighths}/8 of the GPU's",
            )
    return table


NAMED: dict[str, Device] = _table()
"""Devices by the names that explain() and its command line accept."""


def named(name: str) -> Device:
    """The device with this name, ignoring case. Raises ValueError with the known names if there is none."""
    device = NAMED.get(name.lower())
    if device is None:
        raise ValueError(f"expected device to be one of {', '.join(NAMED)}, cuda, cuda:N or cpu, but got {name!r}")
    return device


def _bandwidth(properties: torch.cuda._CudaDeviceProperties) -> tuple[float | None, str]:
    """The memory bandwidth of a GPU of this machine: from the datasheet if its name is known, else from the driver."""
    for device in NAMED.values():
        if device.title == properties.name:
            return device.bandwidth, device.bandwidth_source
    clock = getattr(properties, "memory_clock_rate", 0)  # kHz
    bits = getattr(properties, "memory_bus_width", 0)
    if clock and bits and " MIG " not in properties.name:  # a MIG slice has an unknown fraction of the bus
        return 2 * clock * 1e3 * bits / 8, "memory clock x bus width"
    return None, "unknown"


def cuda_device(index: int) -> Device:
    """The CUDA device with this index. Raises ValueError if this installation cannot use it."""
    try:
        limits = ops.device_limits(index)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"cuda:{index}: {reason}. Named devices need no GPU, e.g. device={DEFAULT!r}") from error
    properties = torch.cuda.get_device_properties(index)
    bandwidth, source = _bandwidth(properties)
    return Device(f"cuda:{index}", properties.name, Limits(**limits), bandwidth, source)


def has_gpu() -> bool:
    """Whether this installation can run kernels on a GPU of this machine."""
    return bool(ops.build_info()["with_cuda"]) and torch.cuda.is_available()
