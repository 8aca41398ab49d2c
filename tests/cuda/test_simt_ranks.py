"""The kernels for a batch spread over several ranks, on the host: compared with the reference, under every seed, build
and grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simt.common import BUILDS_AND_PAIRS, LAYOUTS, Servers, assert_same, judge, make
from simt.ranks import call
from simt.server import Failure, How, Server

from bnkernels.testing import Case

pytest_plugins = ["simt.fixtures"]

# Ranks of 2, 0, 2 and 1 samples; channels over more than one warp, rows of
# any alignment.
SHAPES = {"channels_first": (5, 37, 21), "channels_last": (5, 37, 3)}
BOUNDS = (0, 2, 2, 4, 5)
# No 16-bit parameters: each rank's gradients would be rounded to 16 bits before they are summed.
WIDE = [each for each in BUILDS_AND_PAIRS if "16" not in each.values[1][1]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, pair", WIDE)
def test_seeds_change_no_bit(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    """The order of threads, blocks and waves does not matter, no access is out of bounds, and no two accesses race."""
    inputs = make(SHAPES[layout], pair)
    # Fewer blocks than channels or work tiles.
    how = How(block=64, splits=2, finalize_block=32, grid=2, seeds=range(10))
    run = call(servers(name), inputs, BOUNDS, how, channels_last=layout == "channels_last")
    judge(inputs, run, (layout, pair))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grids_change_no_bit(plain: Server, layout: str) -> None:
    last = layout == "channels_last"
    inputs = make(SHAPES[layout], ("float32", "float32"))
    how = How(block=64, splits=3, finalize_block=32)
    first = call(plain, inputs, BOUNDS, how, channels_last=last)
    judge(inputs, first, layout)
    for schedule, grid, at_a_time in (("in_order", 1, 0), ("reverse", 2, 0), ("stall_one", None, 1), ("seeded", 3, 2)):
        other = replace(how, schedule=schedule, grid=grid, at_a_time=at_a_time)
        assert_same(first, call(plain, inputs, BOUNDS, other, channels_last=last), other)


def test_blocks(plain: Server) -> None:
    """The combine kernels use no shared memory: every block size gives the same bits."""
    inputs = replace(make((3, 140, 2), ("float32", "float32")), momentum=None)
    how = How(block=32, finalize_block=128)
    first = call(plain, inputs, (0, 1, 3), how, channels_last=False)
    judge(inputs, first, how)
    for block in (32, 96, 256):
        assert_same(
            first, call(plain, inputs, (0, 1, 3), replace(how, finalize_block=block), channels_last=False), block
        )


@pytest.mark.parametrize("distribution", ["offset_1e4", "halves_1e3", "one_nan", "constant_1e7", "scale_1e18"])
def test_adversarial(plain: Server, distribution: str) -> None:
    inputs = Case(distribution, (6, 9, 17)).inputs()
    judge(inputs, call(plain, inputs, (0, 1, 4, 6), How(), channels_last=False), distribution)


def test_optional_arguments(plain: Server) -> None:
    full = make((4, 5, 7), ("float32", "float32"))
    for changes in ({"weight": None}, {"bias": None}, {"running_mean": None}, {"running_var": None}):
        inputs = replace(full, **changes)
        judge(inputs, call(plain, inputs, (0, 1, 4), How(), channels_last=False), changes)


@pytest.mark.parametrize(("values", "moved"), [(0, False), (1, False), (2, True)])
def test_too_little_data(plain: Server, values: int, moved: bool) -> None:
    """Fewer than two values in all leave the running statistics unchanged; no values at all give zeros."""
    rows = torch.zeros(3, 2 * 4 + 1, dtype=torch.float64)
    rows[1] = torch.tensor([*range(1, 5), *[0.25] * 4, values])
    given = [("rows", "in", rows)]
    given += [(name, "out", torch.empty(4)) for name in ("mean", "invstd")]
    given += [(name, "inout", torch.full((4,), 7.0)) for name in ("running_mean", "running_var")]
    given.append(("count", "out", torch.empty(1, dtype=torch.float64)))
    options = {"ranks": 3, "momentum": 0.5, "eps": 1.0}
    found = plain.step("sync_combine", torch.empty(1, 4), given, options, How(), channels_last=True).results
    assert found["count"].item() == values
    expected = torch.arange(1.0, 5) if values else torch.zeros(4)
    assert torch.equal(found["mean"], expected)
    assert (found["invstd"] > 0).all() == bool(values)
    for name in ("running_mean", "running_var"):
        assert torch.equal(found[name], torch.full((4,), 7.0)) == (not moved)


def test_a_row_too_few_is_a_fault(plain: Server) -> None:
    """The kernel needs exactly the bounds that the ops check."""
    given = [("rows", "in", torch.zeros(2, 9, dtype=torch.float64))]
    given += [(name, "out", torch.empty(4)) for name in ("mean", "invstd")]
    given.append(("count", "out", torch.empty(1, dtype=torch.float64)))
    options = {"ranks": 3, "momentum": 0.5, "eps": 1.0}
    with pytest.raises(Failure, match=r"out of bounds: read of 8 bytes at byte \d+ of 'rows', which has 144"):
        plain.step("sync_combine", torch.empty(1, 4), given, options, How(), channels_last=True)
