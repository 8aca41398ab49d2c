"""Plans of the resident path that tests vary, and the shapes that make each of their parts matter."""

from __future__ import annotations

import math

import torch

from bnkernels.testing import DTYPES

from .plans import Resident

RESIDENT_LAYOUTS = ("channels_first", "channels_last", "packed")

# How the blocks of a group tell each other what they found: not at all, through each other's shared memory, or through
# global memory, joined by each for itself or divided among them.
ALONE: dict[str, bool] = {}
CLUSTER = {"cluster": True}
EACH: dict[str, bool] = {}
DIVIDED = {"divided": True}

# Several slabs, of which the last is shorter; rows that start and end anywhere, but for packed ones.
SHAPES = {"channels_first": (7, 3, 301), "channels_last": (19, 69, 3), "packed": (61, 6, 12)}
# As packed rows come in practice: 49 elements, slabs of 16 channels (of 8 in double) and a last one of 8.
SEVENS = (9, 24, 7, 7)


def vector(dtype: torch.dtype) -> int:
    """Elements of a window."""
    return 16 // dtype.itemsize


def plan(
    layout: str,
    shape: tuple[int, ...],
    dtype: str,
    members: int = 1,
    groups: int = 1,
    kept: int = 4,
    divided: bool = False,
    block: int = 32,
    lanes: int = 4,
    slab_channels: int = 4,
    cluster: bool = False,
) -> Resident:
    """`lanes` is for channels-last; those of packed follow from `slab_channels`, and may ask for a larger block."""
    if layout == "channels_first":
        lanes = 1
    elif layout == "packed":
        inner = math.prod(shape[2:])
        per_vector = vector(DTYPES[dtype])
        assert inner >= per_vector and shape[1] * inner % per_vector == 0
        assert slab_channels * inner % per_vector == 0
        lanes = slab_channels * inner // per_vector
        block = max(block, math.ceil(lanes / 32) * 32)
    return Resident(layout, block, members, groups, kept, lanes, divided, cluster)


def share_windows(resident: Resident, shape: tuple[int, ...], dtype: str) -> int:
    """Windows of a thread, in a share of full size."""
    inner = math.prod(shape[2:])
    if resident.layout == "channels_first":
        per_vector = vector(DTYPES[dtype])
        row = inner // per_vector if inner % per_vector == 0 else math.ceil((inner - 1) / per_vector) + 1
        units, step = shape[0] * row, resident.block
    else:
        units = shape[0] * (inner if resident.layout == "channels_last" else 1)
        step = resident.block // resident.lanes
    chunk = math.ceil(units / resident.members)
    return math.ceil(chunk / step)
