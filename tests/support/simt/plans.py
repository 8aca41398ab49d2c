"""Plans of csrc/plan/plan.h from Python: those that a test requests, and those that a device gets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Persistent:
    """A plan of the persistent kernel: PersistentChoice in csrc/plan/plan.h."""

    layout: str
    block: int = 64
    group_size: int = 1
    groups: int = 1
    cached_vectors: int = 4
    threads_c: int = 1
    two_shot: bool = False
    cluster: bool = False


@dataclass(frozen=True)
class Limits:
    """A device: DeviceLimits in csrc/plan/plan.h."""

    multiprocessors: int
    max_threads_per_multiprocessor: int = 2048
    max_blocks_per_multiprocessor: int = 32
    shared_per_multiprocessor: int = 228 << 10
    shared_per_block: int = 227 << 10
    shared_reserved: int = 1 << 10
    cooperative_launch: bool = True
    max_cluster: int = 8


@dataclass(frozen=True)
class Plan:
    """The plan that plan_pass chose for a device: Plan in csrc/plan/plan.h."""

    path: str
    reason: str
    """Why the two-pass path was chosen; "none" for the persistent kernel."""
    layout: str
    grid: int
    block: int
    channel_tiles: int
    tile_channels: int
    group_size: int
    group: str
    groups: int
    cached_vectors: int
    two_shot: bool
    floor: tuple[int, int]
    """Lower bound of the bytes read and written."""
    predicted: tuple[int, int]
    """Bytes read and written of tensors of the problem's size."""
    exchanged: tuple[int, int]

    @staticmethod
    def parse(line: str) -> Plan:
        """Parses run_kernels' answer."""
        words = dict(word.split("=") for word in line.split())
        text = {key: words.pop(key) for key in ("path", "reason", "layout", "group")}
        number = {key: int(value) for key, value in words.items()}
        traffic = {
            "floor": (number.pop("floor_read"), number.pop("floor_written")),
            "predicted": (number.pop("read"), number.pop("written")),
            "exchanged": (number.pop("exchanged_read"), number.pop("exchanged_written")),
        }
        return Plan(**text, **(number | {"two_shot": bool(number["two_shot"])}), **traffic)
