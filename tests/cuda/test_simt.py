"""The CUDA kernels and their launch sequences, run thread by thread on the host (tests/support/simt) and compared with
the reference.

Every variant runs under 20 seeds with the same bits, and under a few seeds with AddressSanitizer and UBSan, and with
ThreadSanitizer. Every barrier is needed, and neither grid nor schedule changes a bit. test_simt_inputs.py covers inputs
and alignments, test_simt_memory.py the bytes moved, and test_simt_faults.py that the host execution detects faults.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from simt.common import (
    BARRIER_BUILDS,
    BUILDS_AND_PAIRS,
    FIRST,
    LAST,
    LAYOUTS,
    PAIRS,
    PAIRS_BUT_FEW_SLOW,
    SEEDS,
    Servers,
    assert_same,
    judge,
    make,
)
from simt.server import SCHEDULES, Failure, How, Run, Server

from bnkernels.testing import Inputs

pytest_plugins = ["simt.fixtures"]

# --- every variant, many seeds, three builds -------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, pair", BUILDS_AND_PAIRS)
def test_seeds_change_no_bit(servers: Servers, pair: tuple[str, str], layout: str, training: bool, name: str) -> None:
    """The order of threads, blocks and waves does not matter, no access is out of bounds, and no two accesses race."""
    for shape in FIRST if layout == "channels_first" else LAST:
        inputs = make(shape, pair, training)
        # Fewer blocks than work tiles: each block takes several and reuses its shared memory.
        how = How(block=64, splits=2, finalize_block=64, grid=2, seeds=SEEDS[name])
        run = servers(name).call(inputs, how, channels_last=layout == "channels_last")
        judge(inputs, run, (shape, pair))


# --- every barrier is needed -----------------------------------------------------------------------------------------


def uncached(server: Server, inputs: Inputs, how: How, last: bool, launch: int) -> Run:
    """Runs the forward or the backward with how.without applied to one of its launches."""
    sound = server.call(inputs, replace(how, without=None, seeds=range(1)), channels_last=last)
    if launch < 3:
        return server.forward_train(inputs, how, channels_last=last)
    mean, invstd = sound.outputs.mean, sound.outputs.invstd
    assert mean is not None and invstd is not None and how.without is not None
    how = replace(how, without=(launch - 3, how.without[1]))
    return server.backward(inputs, mean, invstd, how, channels_last=last)


@pytest.mark.parametrize("name", BARRIER_BUILDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS[:2] + PAIRS[-1:])
def test_every_barrier_is_needed(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    """Removing any barrier of any kernel must change a bit under some seed, or read NaN from shared memory; and
    ThreadSanitizer must report the race under every seed."""
    last = layout == "channels_last"
    # Every block has several work tiles or channel groups, and work for each of its warps.
    inputs = make((2, 69, 301), pair)
    how = How(block=64, splits=5 if last else 2, finalize_block=64, grid=2, seeds=range(1 if name == "tsan" else 40))
    met = [launch.barriers for launch in servers(name).call(inputs, how, channels_last=last).launches]
    assert [len(barriers) for barriers in met] == [2, 2, 0, 2, 2, 0]
    for launch, barriers in enumerate(met):
        for barrier in barriers:
            without = replace(how, without=(launch, barrier))
            if name == "tsan":
                with pytest.raises(Failure, match="ThreadSanitizer: data race"):
                    uncached(servers(name), inputs, without, last, launch)
            else:
                with pytest.raises(AssertionError, match=r"differs|beyond the tolerance"):
                    judge(inputs, uncached(servers(name), inputs, without, last, launch), barrier)


# --- the execution does not change results ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_grids_residency_and_schedules_change_no_bit(plain: Server, pair: tuple[str, str], layout: str) -> None:
    last = layout == "channels_last"
    for shape in FIRST if not last else LAST:
        inputs = make(shape, pair)
        how = How(block=64, splits=3, finalize_block=64)
        first = plain.call(inputs, how, channels_last=last)
        judge(inputs, first, (shape, how))
        for schedule in SCHEDULES:
            for grid, at_a_time in ((None, 0), (1, 0), (2, 0), (3, 2), (None, 1)):
                other = replace(how, schedule=schedule, grid=grid, at_a_time=at_a_time, seeds=range(2))
                assert_same(first, plain.call(inputs, other, channels_last=last), (shape, other))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_blocks_and_splits(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """Down to one warp per block and up to more splits than there is work. Each plan's results are reproducible and
    within the tolerance."""
    last = layout == "channels_last"
    for shape in FIRST if not last else LAST:
        for training in (True, False):
            inputs = make(shape, pair, training)
            for block in (32, 64, 96, 256):
                for splits in (1, 2, 7, 1000):
                    how = How(block=block, splits=splits, finalize_block=32 if splits == 2 else 256, grid=5)
                    judge(inputs, plain.call(inputs, how, channels_last=last), (shape, how))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_plans_for_devices(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """plan_two_pass's own choices, from a device with one multiprocessor to one with many."""
    last = layout == "channels_last"
    inputs = make((4, 19, 23, 23), pair)
    for device in ((1, 1024), (16, 1536), (132, 2048)):
        how = How(device=device, at_a_time=8)
        judge(inputs, plain.call(inputs, how, channels_last=last), how)


# --- the server itself -----------------------------------------------------------------------------------------------


def test_too_small_a_tensor_is_a_fault(plain: Server) -> None:
    """A fault reported by run_kernels reaches the test: here a weight vector one element short."""
    inputs = make(FIRST[0], ("float32", "float32"))
    assert inputs.weight is not None
    short = replace(inputs, weight=inputs.weight[:-1].clone())
    with pytest.raises(Failure, match=r"out of bounds: read of 4 bytes at byte 16 of 'weight', which has 16; .*\.cuh:"):
        plain.call(short, How(), channels_last=False)
    judge(inputs, plain.call(inputs, How(), channels_last=False), "the server goes on")
