"""The plan of one pass on a device (Plan of csrc/plan/plan.h) and values derived from it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from .. import _ops as ops
from .devices import Device
from .spec import Epilogue, Spec

PASSES = {
    "forward_train": "forward in training",
    "backward_train": "backward of training",
    "forward_eval": "forward in inference",
    "backward_eval": "backward of inference",
}


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory traffic."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written)


NOTHING = Traffic(0, 0)


@dataclass(frozen=True)
class TilePartition:
    """The partition of an array into channel tiles, and of each channel tile into splits."""

    layout: str
    channel_tiles: int
    tile_channels: int
    splits: int
    split_size: int
    threads_c: int
    row_vectors: int
    step_rows: int
    step_vectors: int


@dataclass(frozen=True)
class TwoPass:
    """The two-pass path: several launches, supported by every device."""

    partition: TilePartition
    grid: int
    block: int
    finalize_grid: int
    finalize_block: int
    finalize_threads_c: int


@dataclass(frozen=True)
class Persistent:
    """The persistent kernel: one launch, in which groups of group_size CTAs cache channel tiles in shared memory.

    shared_bytes: the shared memory of each CTA.
    """

    partition: TilePartition
    group: str
    group_size: int
    groups: int
    cached_vectors: int
    grid: int
    block: int
    shared_bytes: int
    shared_overhead: int
    two_shot: bool
    combine_threads_c: int

    @property
    def rounds(self) -> int:
        """The maximum number of channel tiles per group."""
        return -(-self.partition.channel_tiles // self.groups)


@dataclass(frozen=True)
class PassPlan:
    """How one pass runs.

    floor, predicted: the minimum and the predicted DRAM traffic of the BatchNorm without its epilogue.
    more_floor, more: what the epilogue adds to floor and predicted.
    exchanged: the traffic of partials between CTAs, not included in predicted.
    bandwidth: of the device's memory in bytes/s, None if unknown.
    masked: whether torch's threshold_backward runs before the backward, which is the case for a ReLU of a sum.
    """

    name: str
    path: str
    reason: str | None
    two_pass: TwoPass
    persistent: Persistent | None
    floor: Traffic
    predicted: Traffic
    exchanged: Traffic
    bandwidth: float | None
    more_floor: Traffic = NOTHING
    more: Traffic = NOTHING
    masked: bool = False

    @property
    def whole_floor(self) -> Traffic:
        """The minimum traffic of the pass, including its epilogue."""
        return self.floor + self.more_floor

    @property
    def whole(self) -> Traffic:
        """The predicted traffic of the pass, including its epilogue."""
        return self.predicted + self.more

    @property
    def partition(self) -> TilePartition:
        """The partition of the chosen path."""
        return self.two_pass.partition if self.persistent is None else self.persistent.partition

    @property
    def ratio(self) -> float:
        """Predicted DRAM bytes over the floor."""
        return self.whole.total / self.whole_floor.total

    @property
    def launches(self) -> int:
        """The number of launches if all results are required."""
        return (1 if self.persistent is not None or self.name == "forward_eval" else 3) + self.masked

    @property
    def on_chip(self) -> int:
        """Bytes of shared memory, of all CTAs together."""
        return 0 if self.persistent is None else self.persistent.grid * self.persistent.shared_bytes

    @property
    def cached_fraction(self) -> float:
        """The fraction of the elements read that is cached in shared memory for the second use."""
        return 0.0 if self.persistent is None else 2 - self.predicted.read / self.floor.read

    @property
    def seconds(self) -> float | None:
        """Predicted bytes divided by memory bandwidth, a lower bound of the time; None if the bandwidth is unknown."""
        return None if self.bandwidth is None else self.whole.total / self.bandwidth

    def as_json(self) -> dict[str, Any]:
        derived = {
            "launches": self.launches,
            "whole_floor_bytes": self.whole_floor.total,
            "whole_predicted_bytes": self.whole.total,
            "ratio": self.ratio,
            "on_chip_bytes": self.on_chip,
            "rounds": None if self.persistent is None else self.persistent.rounds,
            "lower_estimate_seconds": self.seconds,
        }
        return {**asdict(self), **derived}


def _forces_two_pass() -> bool:
    """Reads BNKERNELS_PLAN like the CUDA backend. Raises ValueError for an unknown value."""
    value = os.environ.get("BNKERNELS_PLAN", "")
    if value not in ("", "auto", "two_pass"):
        raise ValueError(f"BNKERNELS_PLAN={value}: expected auto or two_pass")
    return value == "two_pass"


def _more(spec: Spec, name: str, epilogue: Epilogue) -> dict[str, Any]:
    """The traffic that an epilogue adds to a pass. A ReLU alone adds none: the backward recomputes its mask from x."""
    tensor = spec.bytes
    if not epilogue.residual:
        return {}
    if name.startswith("forward"):
        return {"more_floor": Traffic(tensor, 0), "more": Traffic(tensor, 0)}
    if not epilogue.relu:
        return {}  # the gradient of the residual is grad_y itself
    # The masked gradient is another output in any implementation. torch's threshold_backward reads grad_y and y, writes
    # it, and the BatchNorm backward then reads it instead of grad_y.
    return {"more_floor": Traffic(0, tensor), "more": Traffic(2 * tensor, tensor), "masked": True}


def plan_of(spec: Spec, name: str, device: Device, epilogue: Epilogue) -> PassPlan:
    """The plan of a pass, including its epilogue, on a device."""
    raw = ops.plan(
        spec.outer,
        spec.channels,
        spec.inner,
        spec.dtype,
        name,
        spec.aligned,
        **device.limits.arguments(),
        force_two_pass=_forces_two_pass(),
    )
    two_pass, persistent = raw["two_pass"], raw["persistent"]
    return PassPlan(
        name=name,
        path=raw["path"],
        reason=raw["reason"],
        two_pass=TwoPass(**{**two_pass, "partition": TilePartition(**two_pass["partition"])}),
        persistent=persistent and Persistent(**{**persistent, "partition": TilePartition(**persistent["partition"])}),
        floor=Traffic(**raw["floor"]),
        predicted=Traffic(**raw["predicted"]),
        exchanged=Traffic(**raw["exchanged"]),
        bandwidth=device.bandwidth,
        **_more(spec, name, epilogue),
    )
