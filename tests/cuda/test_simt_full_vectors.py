"""The kernels' loops over whole vectors, run thread by thread on the host (tests/support/simt).

Where rows begin and end on vectors of 16 bytes, tiles of vectors are visited without looking at them (visit_tiles, in
csrc/cuda/device/visit_vectors.cuh). Every kernel goes through such tiles here, with others behind them, under 20 seeds
and the sanitizers; most shapes of the other files are cut too often to come there.
"""

from __future__ import annotations

import math

import pytest
from simt.common import BUILDS_AND_PAIRS, SEEDS, Servers, judge, make
from simt.persistent_cases import ALONE, DIVIDED, RESIDENT_LAYOUTS, plan, vector, work_tile_vectors
from simt.plans import Persistent
from simt.server import How

from bnkernels.testing import DTYPES

pytest_plugins = ["simt.fixtures"]

# The vectors of the largest tile, kStatisticsTile.
TILE = 8
BLOCK = 32

# Rows of 33 vectors of 16-bit elements, which end between two threads; and channel tiles of all lanes.
STREAMING = {"channels_first": (8, 3, 264), "channels_last": (140, 16)}
RESIDENT = {"channels_first": (7, 3, 304), "channels_last": (25, 64, 3), "packed": (61, 6, 12)}
KEPT, ALL = 4, 32


def row_vectors(layout: str, shape: tuple[int, ...], dtype: str) -> int:
    """Of a thread of the streaming kernels, in a channel tile of one split."""
    vectors = math.prod(shape) // shape[1] // (vector(DTYPES[dtype]) if layout == "channels_first" else 1)
    threads_c = 1 if layout == "channels_first" else shape[1] // vector(DTYPES[dtype])
    return vectors * threads_c // BLOCK


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", STREAMING)
@pytest.mark.parametrize("name, pair", BUILDS_AND_PAIRS)
def test_streaming(servers: Servers, pair: tuple[str, str], layout: str, training: bool, name: str) -> None:
    shape = STREAMING[layout]
    assert row_vectors(layout, shape, pair[0]) >= TILE
    inputs = make(shape, pair, training)
    how = How(block=BLOCK, splits=1, finalize_block=64, grid=2, seeds=SEEDS[name])
    judge(inputs, servers(name).call(inputs, how, channels_last=layout == "channels_last"), (shape, pair))


@pytest.mark.parametrize("layout", RESIDENT_LAYOUTS)
@pytest.mark.parametrize("name, pair", BUILDS_AND_PAIRS)
def test_resident(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    """Tiles that are kept, tiles that are not, and a last one that is no whole tile."""
    shape = RESIDENT[layout]
    inputs = make(shape, pair)

    def run(persistent: Persistent) -> None:
        how = How(persistent=persistent, seeds=SEEDS[name])
        judge(inputs, servers(name).call(inputs, how, channels_last=layout == "channels_last"), persistent)

    alone = plan(layout, shape, pair[0], 1, 2, cached_vectors=KEPT, block=BLOCK, **ALONE)
    assert work_tile_vectors(alone, shape, pair[0]) >= KEPT + 4
    run(alone)
    # All that two have is kept.
    both = plan(layout, shape, pair[0], 2, 1, cached_vectors=ALL, block=BLOCK, **DIVIDED)
    assert 4 <= work_tile_vectors(both, shape, pair[0]) <= ALL
    run(both)
