"""Devices that a plan can be made for: the GPUs of this machine, and well-known ones by name.

What a plan needs of a device is what CUDA's attributes tell; a time needs its memory bandwidth as well. The figures of
named devices are of these kinds:

    of a multiprocessor   CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; what the system
                          reserves of each block's shared memory: its sections on compute capability 8.x and later
    multiprocessors       NVIDIA's architecture white papers (Turing, Ampere, Ada, Hopper, Blackwell)
    memory bandwidth      NVIDIA's datasheet or product page of the GPU (B200: DGX B200's 64 TB/s for eight)
    MIG slices            multiprocessors as `nvidia-smi mig -lgip` lists them; the bandwidth is the GPU's, by the share
                          of memory that NVIDIA's MIG User Guide gives the profile
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import ops

_KIB = 1024
_GIGA = 1e9

DEFAULT = "h200"
"""Explained for where no GPU is at hand and no device is named."""


@dataclass(frozen=True)
class Limits:
    """DeviceLimits of csrc/plan/plan.h; bytes where memory is meant."""

    multiprocessors: int
    max_threads_per_multiprocessor: int
    max_blocks_per_multiprocessor: int
    shared_per_multiprocessor: int
    shared_per_block: int
    shared_reserved: int
    cooperative_launch: bool
    max_cluster: int

    def arguments(self) -> dict[str, Any]:
        """As ops.plan takes them."""
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """A CUDA device. bandwidth: bytes/s of its memory, None if unknown; bandwidth_source: where the figure is from."""

    name: str
    title: str
    limits: Limits
    bandwidth: float | None
    bandwidth_source: str


@dataclass(frozen=True)
class _Gpu:
    title: str  # as torch.cuda.get_device_name() has it
    capability: str
    multiprocessors: int
    gigabytes_per_second: float
    # Of its MIG profiles, if it has them: multiprocessors, and eighths of the memory.
    slices: dict[str, tuple[int, int]]


# Threads, blocks and KiB of shared memory of a multiprocessor; KiB that a block may ask for, and reserved of it; blocks
# of a cluster.
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
"""By the names that explain() and its command line take."""


def named(name: str) -> Device:
    """The device of a name, in any case; ValueError lists those that there are."""
    device = NAMED.get(name.lower())
    if device is None:
        raise ValueError(f"expected a device of {', '.join(NAMED)}, cuda, cuda:N or cpu, but got {name!r}")
    return device


def _bandwidth(properties: torch.cuda._CudaDeviceProperties) -> tuple[float | None, str]:
    """Of a device at hand: a datasheet's, by its name; else from the clock and bus width that the driver tells."""
    for device in NAMED.values():
        if device.title == properties.name:
            return device.bandwidth, device.bandwidth_source
    clock = getattr(properties, "memory_clock_rate", 0)  # kHz
    bits = getattr(properties, "memory_bus_width", 0)
    if clock and bits and " MIG " not in properties.name:  # a slice has a part of the bus, and is not told which
        return 2 * clock * 1e3 * bits / 8, "memory clock x bus width"
    return None, "unknown"


def at_hand(index: int) -> Device:
    """The CUDA device of this number; ValueError if this installation cannot use it."""
    try:
        limits = ops.device_limits(index)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"cuda:{index}: {reason}. Named devices need no GPU: device={DEFAULT!r}, say") from error
    properties = torch.cuda.get_device_properties(index)
    bandwidth, source = _bandwidth(properties)
    return Device(f"cuda:{index}", properties.name, Limits(**limits), bandwidth, source)


def has_gpu() -> bool:
    """Whether this installation's kernels could run on a GPU of this machine."""
    return bool(ops.build_info()["with_cuda"]) and torch.cuda.is_available()
