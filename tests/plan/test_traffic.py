"""Bytes that every BatchNorm layer of ResNet-50 moves: the counted bytes match the plan and stay near the floor.

tests/support/simt/traffic.py prints the table of docs/traffic.md; these tests check its figures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from simt import traffic
from simt.common import Servers, requested
from simt.traffic import Cell

pytest_plugins = ["simt.fixtures"]

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "traffic.md"
NEAR = 1.02


@pytest.fixture(scope="module")
def cells(servers: Servers) -> list[Cell]:
    return list(traffic.cells(servers("plain")))


def test_every_layer_is_listed(cells: list[Cell]) -> None:
    assert len(cells) == 12 * 2 * 2 * 2
    for batch in traffic.BATCHES:
        for layout in traffic.LAYOUTS:
            for direction in traffic.DIRECTIONS:
                here = [one for one in cells if (one.batch, one.layout, one.direction) == (batch, layout, direction)]
                assert sum(one.layer.count for one in here) == 53


def test_counted_bytes_match_what_the_plan_predicted(cells: list[Cell]) -> None:
    """Counted bytes equal the prediction exactly, for the layer's tensors and for the exchange between blocks."""
    for one in cells:
        read, written = one.small_plan.predicted
        assert one.counted == (read + one.asked_twice, written), one
        if one.small_plan.path == "persistent":
            assert one.exchanged == one.small_plan.exchanged, one


def test_persistent_layers_are_one_launch(cells: list[Cell]) -> None:
    for one in cells:
        assert one.launches == (1 if one.small_plan.path == "persistent" else 3), one
        if one.layout == "channels_first":
            assert one.plan.path == one.small_plan.path == "persistent", one


def test_channels_first_is_at_the_floor(cells: list[Cell]) -> None:
    """Each tensor is read once or written once, as planned for the H200 and as counted, all other traffic included."""
    for one in cells:
        if one.layout != "channels_first":
            continue
        assert one.plan.predicted == one.plan.floor, one
        assert sum(one.counted) + sum(one.exchanged) <= NEAR * sum(one.small_plan.floor), one
        if one.plan.layout != "packed":
            # The excess comes from vectors that two rows share.
            inputs = traffic.inputs_of(one.layer, 1)
            tensor = inputs.x.numel() * inputs.x.element_size()
            reads = one.plan.floor[0] // one.plan.floor[1]
            assert reads * requested(inputs, False, 0, 0) + tensor <= NEAR * (reads + 1) * tensor, one


def test_channels_last_is_at_the_floor_where_a_channel_tile_fits(cells: list[Cell]) -> None:
    """And traffic never exceeds the two-pass path's."""
    fit = 0
    for one in cells:
        if one.layout != "channels_last":
            continue
        for plan in (one.plan, one.small_plan):
            tensors = plan.floor[0] // plan.floor[1]
            assert sum(plan.floor) <= sum(plan.predicted) <= sum(plan.floor) + plan.floor[0], one
            # Everything is cached if all blocks together can hold a channel tile of 64 channels, which is eight vectors
            # wide.
            rows = one.batch * one.layer.height * one.layer.width // (1 if plan is one.plan else traffic.SCALE)
            limits = traffic.H200 if plan is one.plan else traffic.SMALL
            blocks = 2 * (limits.multiprocessors - limits.multiprocessors // 16)
            shared = limits.shared_per_multiprocessor // 2 - limits.shared_reserved - 12 * 1024
            row_vectors = shared // (16 * 256 * tensors) // 4 * 4
            fits = rows <= blocks * row_vectors * (256 // 8)
            fit += fits
            if fits:
                assert sum(plan.predicted) <= NEAR * sum(plan.floor), one
        if one.small_plan.predicted == one.small_plan.floor:
            assert one.counted == one.small_plan.floor, one
    assert fit > 48


def test_scratch_memory_is_small(cells: list[Cell]) -> None:
    """The bound is the one that docs/traffic.md states."""
    assert max(one.plan.exchanged[1] for one in cells) < 3.1e6


def test_the_page_matches_the_computation(cells: list[Cell]) -> None:
    assert DOCUMENT.read_text() == traffic.page(cells), "run: python tests/support/simt/traffic.py > docs/traffic.md"
