"""The plan of one pass over a device: csrc/plan/plan.h's Plan, and what follows from it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from .. import ops
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
    """Bytes of global memory."""

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
    """How an array is cut: channel tiles of channels, each into splits."""

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
    """The path of several launches, which any device can run."""

    partition: TilePartition
    grid: int
    block: int
    finalize_grid: int
    finalize_block: int
    finalize_threads_c: int


@dataclass(frozen=True)
class Persistent:
    """The path of one launch: groups of `members` blocks keep a channel tile on chip, each in shared_bytes of its
    memory."""

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
        """Channel tiles that a group takes one after the other, at most."""
        return -(-self.partition.channel_tiles // self.groups)


@dataclass(frozen=True)
class PassPlan:
    """How one pass runs. bandwidth: of the device's memory in bytes/s, None if unknown.

    floor and predicted are BatchNorm's own; what an epilogue adds to each is in more_floor and more. masked: torch's
    operation takes out what a ReLU held back, before the backward: where the ReLU is of a sum.
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
        """The fewest bytes of the pass, its epilogue's included."""
        return self.floor + self.more_floor

    @property
    def whole(self) -> Traffic:
        """The predicted bytes of the pass, its epilogue's included."""
        return self.predicted + self.more

    @property
    def partition(self) -> TilePartition:
        """Of the path that is taken."""
        return self.two_pass.partition if self.persistent is None else self.persistent.partition

    @property
    def ratio(self) -> float:
        """Predicted DRAM bytes over the floor."""
        return self.whole.total / self.whole_floor.total

    @property
    def launches(self) -> int:
        """Where all results are asked for."""
        return (1 if self.persistent is not None or self.name == "forward_eval" else 3) + self.masked

    @property
    def on_chip(self) -> int:
        """Bytes of shared memory that hold data, of all blocks together."""
        return 0 if self.persistent is None else self.persistent.grid * self.persistent.shared_bytes

    @property
    def stays(self) -> float:
        """The part of what is read that waits for its second use on chip."""
        return 0.0 if self.persistent is None else 2 - self.predicted.read / self.floor.read

    @property
    def seconds(self) -> float | None:
        """What moving the predicted bytes takes at the memory's bandwidth: a lower estimate, nothing measured."""
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
    """BNKERNELS_PLAN, as the backend reads it."""
    value = os.environ.get("BNKERNELS_PLAN", "")
    if value not in ("", "auto", "two_pass"):
        raise ValueError(f"BNKERNELS_PLAN={value}: expected auto or streaming")
    return value == "two_pass"


def _more(spec: Spec, name: str, epilogue: Epilogue) -> dict[str, Any]:
    """What an epilogue adds to a pass. A ReLU alone moves nothing: the backward knows it from x."""
    tensor = spec.bytes
    if not epilogue.residual:
        return {}
    if name.startswith("forward"):
        return {"more_floor": Traffic(tensor, 0), "more": Traffic(tensor, 0)}
    if not epilogue.relu:
        return {}  # the residual's gradient is the one that comes in
    # Another tensor then, whichever way. torch's operation reads grad and y, and writes it.
    return {"more_floor": Traffic(0, tensor), "more": Traffic(2 * tensor, tensor), "masked": True}


def plan_of(spec: Spec, name: str, device: Device, epilogue: Epilogue) -> PassPlan:
    """How a device runs a pass over an input, and over what its epilogue needs."""
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
