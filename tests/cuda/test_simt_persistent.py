"""The persistent kernels, run thread by thread on the host (tests/support/simt): the execution does not change the
results.

Every variant runs under 20 seeds with the same bits, and under a few seeds with AddressSanitizer and UBSan, and with
ThreadSanitizer. Every barrier is needed, schedules and the number of groups change no bit, and plans of every kind stay
within the tolerance. test_simt_persistent_inputs.py covers inputs and alignments, test_simt_groups.py groups whose CTAs
wait for each other.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from simt.common import (
    BARRIER_BUILDS,
    BUILDS,
    BUILDS_AND_PAIRS,
    PAIRS,
    PAIRS_BUT_FEW_SLOW,
    SEEDS,
    UNORDERED,
    Servers,
    assert_same,
    judge,
    make,
)
from simt.persistent_cases import (
    CLUSTER,
    ONE_SHOT,
    PERSISTENT_LAYOUTS,
    SEVENS,
    SHAPES,
    SINGLE_CTA,
    TWO_SHOT,
    plan,
    work_tile_vectors,
)
from simt.plans import Persistent
from simt.server import SCHEDULES, Failure, How, Run, Server

from bnkernels.testing import Inputs

pytest_plugins = ["simt.fixtures"]


def call(server: Server, inputs: Inputs, persistent: Persistent, how: How | None = None) -> Run:
    """Forward and backward, each one launch with the number of blocks that the plan gives."""
    how = replace(how or How(), persistent=persistent)
    run = server.call(inputs, how, channels_last=persistent.layout == "channels_last")
    assert len(run.launches) == 2
    for launch in run.launches:
        assert launch.block == persistent.block
        assert launch.grid <= persistent.group_size * persistent.groups
    return run


# --- every variant, many seeds, three builds -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("name, pair", BUILDS_AND_PAIRS)
def test_seeds_change_no_bit(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    """A single CTA, and groups that exchange in each way, with two or more channel tiles each."""
    shape = SHAPES[layout]
    inputs = make(shape, pair)
    for group_size, groups, way in ((1, 2, SINGLE_CTA), (3, 1, CLUSTER), (3, 1, ONE_SHOT), (2, 2, TWO_SHOT)):
        persistent = plan(layout, shape, pair[0], group_size, groups, **way)
        judge(inputs, call(servers(name), inputs, persistent, How(seeds=SEEDS[name])), persistent)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
def test_several_warps_change_no_bit(servers: Servers, layout: str, name: str) -> None:
    """Blocks whose warps meet only at barriers."""
    shape = SEVENS if layout == "packed" else SHAPES[layout]
    inputs = make(shape, ("bfloat16", "float32"))
    for way in (CLUSTER, TWO_SHOT):
        persistent = plan(layout, shape, "bfloat16", 2, 1, block=96, tile_channels=16, **way)
        judge(inputs, call(servers(name), inputs, persistent, How(seeds=SEEDS[name])), persistent)


# --- every barrier is needed -----------------------------------------------------------------------------------------


def run_one(server: Server, inputs: Inputs, saved: Run | None, how: How) -> Run:
    """The forward, or the backward if `saved` holds a forward's results."""
    last = how.persistent is not None and how.persistent.layout == "channels_last"
    if saved is None:
        return server.forward_train(inputs, how, channels_last=last)
    mean, invstd = saved.outputs.mean, saved.outputs.invstd
    assert mean is not None and invstd is not None
    return server.backward(inputs, mean, invstd, how, channels_last=last)


def complaint(server: Server, inputs: Inputs, saved: Run | None, how: How) -> str:
    """How a dropped barrier shows, or an empty string if it does not."""
    try:
        judge(inputs, run_one(server, inputs, saved, how), "")
    except AssertionError as failure:
        return str(failure)
    return ""


@pytest.mark.parametrize("name", BARRIER_BUILDS)
@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_barrier_is_needed(servers: Servers, direction: str, layout: str, name: str) -> None:
    """Removing any barrier that a kernel reaches must change a bit under some seed, read NaN from shared memory or from
    unwritten partials, hang a group, or touch shared memory of a cluster's block outside its lifetime. Except for
    the last of these, ThreadSanitizer must also report the race under every seed.

    Some plan must show it: the barrier after a reduction may be the group's barrier as well.
    """
    pair = ("bfloat16", "float32")
    shape = SEVENS if layout == "packed" else SHAPES[layout]
    inputs = replace(make(shape, pair), momentum=None)  # a cumulative average reads the count
    met: set[str] = set()
    missed: set[str] = set()
    for group_size, way in ((1, SINGLE_CTA), (3, CLUSTER), (3, ONE_SHOT), (3, TWO_SHOT)):
        persistent = plan(layout, shape, pair[0], group_size, 1, block=96, tile_channels=8, **way)
        sound = call(servers(name), inputs, persistent)
        saved = sound if direction == "backward" else None
        here = sound.launches[direction == "backward"].barriers
        met |= set(here)
        for barrier in here:
            how = How(persistent=persistent, without=(0, barrier), seeds=range(1 if name == "tsan" else 40))
            seen = complaint(servers(name), inputs, saved, how)
            assert not seen or re.search("data race|differs|beyond the tolerance|fault", seen), seen
            if re.search(UNORDERED if name == "tsan" else ".", seen):
                missed.add(barrier)
    # Two in a block's reduction (a packed channel tile has its own), two of a grid group, one after the second, two of
    # a cluster, and one after the on-chip exchange.
    assert len(met) == (10 if layout == "packed" else 8)
    assert missed == met, met - missed


# --- the execution does not change results ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_groups_and_schedules_change_no_bit(plain: Server, pair: tuple[str, str], layout: str) -> None:
    shape = SHAPES[layout]
    inputs = make(shape, pair)
    for group_size, way in ((1, SINGLE_CTA), (3, CLUSTER), (2, ONE_SHOT), (5, TWO_SHOT)):
        persistent = plan(layout, shape, pair[0], group_size, **way)
        first = call(plain, inputs, persistent)
        judge(inputs, first, persistent)
        for groups in (1, 2, 3, 50):
            for schedule in SCHEDULES:
                other = replace(persistent, groups=groups)
                how = How(schedule=schedule, seeds=range(3))
                assert_same(first, call(plain, inputs, other, how), (schedule, other))


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_every_kind_of_plan(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """Blocks of 1 to 8 warps, groups of 1 to 5, every exchange, and all, most, or an eighth of a work tile cached."""
    shape = SHAPES[layout]
    inputs = make(shape, pair)
    all_cached = partly_cached = least_cached = 0
    for block in (32, 64, 96, 160, 256):
        for group_size in (1, 2, 3, 4, 5):
            for cached_vectors in (4, 6, 8, 24):
                way = (SINGLE_CTA, TWO_SHOT, CLUSTER, TWO_SHOT, ONE_SHOT)[group_size - 1]
                persistent = plan(layout, shape, pair[0], group_size, 2, cached_vectors, block=block, **way)
                judge(inputs, call(plain, inputs, persistent), persistent)
                row_vectors = work_tile_vectors(persistent, shape, pair[0])
                all_cached += row_vectors <= cached_vectors
                partly_cached += cached_vectors < row_vectors
                least_cached += 4 * cached_vectors < row_vectors
    assert all_cached > 0 and partly_cached > 0
    # Down to an eighth.
    tall = {"channels_first": (26, 3, 301), "channels_last": (250, 69), "packed": (155, 6, 12)}[layout]
    inputs = make(tall, pair)
    for group_size, way in ((1, SINGLE_CTA), (2, TWO_SHOT)):
        persistent = plan(layout, tall, pair[0], group_size, 2, **way)
        while work_tile_vectors(persistent, tall, pair[0]) > 8 * persistent.cached_vectors:
            persistent = replace(persistent, cached_vectors=persistent.cached_vectors + 4)
        least_cached += 4 * persistent.cached_vectors < work_tile_vectors(persistent, tall, pair[0])
        judge(inputs, call(plain, inputs, persistent), persistent)
    assert least_cached > 0


@pytest.mark.parametrize("pair", PAIRS)
def test_threads_c(plain: Server, pair: tuple[str, str]) -> None:
    """Channels-last channel tiles of 1, 2, 4 and 8 vectors; packed tiles of every number of channels that fits,
    including numbers of threads along C that do not divide the block."""
    inputs = make((23, 69), pair)
    for threads_c in (1, 2, 4, 8):
        for group_size, way in ((1, SINGLE_CTA), (3, CLUSTER), (3, TWO_SHOT)):
            persistent = plan("channels_last", (23, 69), pair[0], group_size, 2, threads_c=threads_c, **way)
            judge(inputs, call(plain, inputs, persistent), persistent)
    rests = set()
    for inner, channels in ((8, 5), (9, 24), (12, 6), (15, 16), (49, 16)):
        shape = (7, channels, inner)
        inputs = make(shape, pair)
        elements = 16 // inputs.x.element_size()
        for tile_channels in range(1, channels + 1):
            threads_c = tile_channels * inner // elements
            if tile_channels * inner % elements != 0 or threads_c > 256:
                continue
            for block in (32, 256):
                way = TWO_SHOT if block == 256 else CLUSTER
                persistent = plan("packed", shape, pair[0], 2, 2, block=block, tile_channels=tile_channels, **way)
                judge(inputs, call(plain, inputs, persistent), persistent)
                rests.add(persistent.block % persistent.threads_c)
    assert len(rests) > 5


def test_a_plan_that_no_launch_can_have_is_a_fault(plain: Server) -> None:
    inputs = make((7, 3, 301), ("float32", "float32"))
    with pytest.raises(Failure, match=r"invalid launch: .* bytes of dynamic shared memory"):
        call(plain, inputs, plan("channels_first", (7, 3, 301), "float32", cached_vectors=500))
