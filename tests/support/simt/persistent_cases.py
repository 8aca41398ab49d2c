"""Plans of the persistent kernel that tests vary, and shapes that exercise every part of them."""

from __future__ import annotations

import math

import torch

from bnkernels.testing import DTYPES

from .plans import Persistent

PERSISTENT_LAYOUTS = ("channels_first", "channels_last", "packed")

# How the blocks of a group exchange partials: not at all (a single CTA), through distributed shared memory (a cluster),
# or through global memory with a one-shot or two-shot all-reduce.
SINGLE_CTA: dict[str, bool] = {}
CLUSTER = {"cluster": True}
ONE_SHOT: dict[str, bool] = {}
TWO_SHOT = {"two_shot": True}

# Several channel tiles, of which the last is shorter; rows of any alignment, except for packed ones.
SHAPES = {"channels_first": (7, 3, 301), "channels_last": (19, 69, 3), "packed": (61, 6, 12)}
# Realistic packed rows: 49 elements, channel tiles of 16 channels (of 8 in double) and a last one of 8.
SEVENS = (9, 24, 7, 7)


def vector(dtype: torch.dtype) -> int:
    """Elements per vector."""
    return 16 // dtype.itemsize


def plan(
    layout: str,
    shape: tuple[int, ...],
    dtype: str,
    group_size: int = 1,
    groups: int = 1,
    cached_vectors: int = 4,
    two_shot: bool = False,
    block: int = 32,
    threads_c: int = 4,
    tile_channels: int = 4,
    cluster: bool = False,
) -> Persistent:
    """`threads_c` applies to channels-last. For packed it follows from `tile_channels`, and the block grows if
    needed.
    """
    if layout == "channels_first":
        threads_c = 1
    elif layout == "packed":
        inner = math.prod(shape[2:])
        per_vector = vector(DTYPES[dtype])
        assert inner >= per_vector and shape[1] * inner % per_vector == 0
        assert tile_channels * inner % per_vector == 0
        threads_c = tile_channels * inner // per_vector
        block = max(block, math.ceil(threads_c / 32) * 32)
    return Persistent(layout, block, group_size, groups, cached_vectors, threads_c, two_shot, cluster)


def work_tile_vectors(persistent: Persistent, shape: tuple[int, ...], dtype: str) -> int:
    """Vectors per thread, in a work tile of full size."""
    inner = math.prod(shape[2:])
    if persistent.layout == "channels_first":
        per_vector = vector(DTYPES[dtype])
        row = inner // per_vector if inner % per_vector == 0 else math.ceil((inner - 1) / per_vector) + 1
        units, step = shape[0] * row, persistent.block
    else:
        units = shape[0] * (inner if persistent.layout == "channels_last" else 1)
        step = persistent.block // persistent.threads_c
    split = math.ceil(units / persistent.group_size)
    return math.ceil(split / step)
