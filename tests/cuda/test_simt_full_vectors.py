"""The kernels' loops over full vectors, run thread by thread on the host (tests/support/simt).

Where rows begin and end on 16-byte vectors, tiles of vectors need no predicates (visit_tiles in
csrc/cuda/device/visit_vectors.cuh). Every kernel goes through such tiles here, followed by others, under 20 seeds and
the sanitizers. Most shapes of the other files have too many partial vectors to reach these loops.
"""

from __future__ import annotations

import math

import pytest
from simt.common import BUILDS_AND_PAIRS, SEEDS, Servers, judge, make
from simt.persistent_cases import PERSISTENT_LAYOUTS, SINGLE_CTA, TWO_SHOT, plan, vector, work_tile_vectors
from simt.plans import Persistent
from simt.server import How

from bnkernels.testing import DTYPES

pytest_plugins = ["simt.fixtures"]

# The vectors of the largest tile, kStatisticsTile.
TILE = 8
BLOCK = 32

# Rows of 33 vectors of 16-bit elements, which end between two threads; and channel tiles that use all threads along C.
TWO_PASS_SHAPES = {"channels_first": (8, 3, 264), "channels_last": (140, 16)}
PERSISTENT_SHAPES = {"channels_first": (7, 3, 304), "channels_last": (25, 64, 3), "packed": (61, 6, 12)}
CACHED, ALL = 4, 32


def row_vectors(layout: str, shape: tuple[int, ...], dtype: str) -> int:
    """Vectors per thread of the two-pass kernels, in a channel tile of one split."""
    vectors = math.prod(shape) // shape[1] // (vector(DTYPES[dtype]) if layout == "channels_first" else 1)
    threads_c = 1 if layout == "channels_first" else shape[1] // vector(DTYPES[dtype])
    return vectors * threads_c // BLOCK


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", TWO_PASS_SHAPES)
@pytest.mark.parametrize("name, pair", BUILDS_AND_PAIRS)
def test_two_pass(servers: Servers, pair: tuple[str, str], layout: str, training: bool, name: str) -> None:
    shape = TWO_PASS_SHAPES[layout]
    assert row_vectors(layout, shape, pair[0]) >= TILE
    inputs = make(shape, pair, training)
    how = How(block=BLOCK, splits=1, finalize_block=64, grid=2, seeds=SEEDS[name])
    judge(inputs, servers(name).call(inputs, how, channels_last=layout == "channels_last"), (shape, pair))


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("name, pair", BUILDS_AND_PAIRS)
def test_persistent(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    """Tiles that are cached, tiles that are not, and a partial last tile."""
    shape = PERSISTENT_SHAPES[layout]
    inputs = make(shape, pair)

    def run(persistent: Persistent) -> None:
        how = How(persistent=persistent, seeds=SEEDS[name])
        judge(inputs, servers(name).call(inputs, how, channels_last=layout == "channels_last"), persistent)

    alone = plan(layout, shape, pair[0], 1, 2, cached_vectors=CACHED, block=BLOCK, **SINGLE_CTA)
    assert work_tile_vectors(alone, shape, pair[0]) >= CACHED + 4
    run(alone)
    # Everything that two CTAs hold is cached.
    both = plan(layout, shape, pair[0], 2, 1, cached_vectors=ALL, block=BLOCK, **TWO_SHOT)
    assert 4 <= work_tile_vectors(both, shape, pair[0]) <= ALL
    run(both)
