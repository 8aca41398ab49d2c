"""The persistent kernel's plan, and the choice between it and the two-pass path, checked by arithmetic for any problem
and device.

The kernels rely on these properties: blocks that wait for each other are co-resident, shared memory suffices, and every
element has one owner. The predicted bytes are reported to users. plan_model.py recomputes both independently.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from plan_model import (
    BYTES,
    DEVICES,
    TENSORS_READ,
    TRAINING,
    VECTOR_BYTES,
    Problem,
    ceil_div,
    channel_tiles_of_groups,
    owners,
    split_sizes,
    step,
    units_not_cached,
)

from bench import shapes
from bnkernels.explain.devices import Limits

MAX_GRID = 2**31 - 1
ADDRESSABLE = 2**57  # bytes
WARP = 32
# Registers of a multiprocessor on every device since compute capability 7.0, and the registers per thread when two
# blocks of 256 threads share them.
REGISTERS = 64 * 1024
# The largest block size at which two blocks share the registers: persistent_threads() in csrc/plan/plan.h.
THREADS = {"channels_first": 256, "channels_last": 192, "packed": 192}
PARTIAL_DOUBLES = {"forward_train": 3, "backward_train": 2}

extreme = st.one_of(st.integers(1, 300), st.integers(1, 2**20), st.integers(1, 2**40))
dtypes = st.sampled_from(sorted(BYTES))
devices = st.sampled_from(sorted(DEVICES))
passes = st.sampled_from(TRAINING)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Problems of any size: each extent up to 2^40, the tensor up to the address space."""
    problem = Problem(draw(extreme), draw(extreme), draw(extreme), draw(dtypes), draw(st.booleans()))
    assume(problem.bytes <= ADDRESSABLE)
    return problem


@st.composite
def layers(draw: st.DrawFn) -> Problem:
    """Problems of realistic layer sizes in both layouts, for which the persistent kernel is chosen."""
    batch, channels = draw(st.integers(1, 512)), draw(st.integers(1, 4096))
    pixels = draw(st.integers(1, 128)) * draw(st.integers(1, 128))
    dtype, aligned = draw(dtypes), draw(st.booleans())
    if draw(st.booleans()):
        return Problem(batch * pixels, channels, 1, dtype, aligned)
    return Problem(batch, channels, pixels, dtype, aligned)


any_problem = st.one_of(layers(), problems())


def blocks_per_multiprocessor(persistent: dict[str, Any], limits: Limits) -> int:
    """Blocks of a persistent kernel that one multiprocessor holds at once, by every resource limit."""
    threads = persistent["block"]
    shared = persistent["shared_bytes"] + persistent["shared_overhead"] + limits.shared_reserved
    return min(
        limits.max_threads_per_multiprocessor // threads,
        limits.max_blocks_per_multiprocessor,
        limits.shared_per_multiprocessor // shared,
        REGISTERS // (REGISTERS // (2 * THREADS[persistent["partition"]["layout"]]) * threads),
    )


@settings(max_examples=600, deadline=None)
@given(any_problem, passes, devices)
def test_limits_hold(problem: Problem, pass_: str, device: str) -> None:
    limits = DEVICES[device]
    persistent = problem.plan(pass_, limits)["persistent"]
    if persistent is None:
        return
    block, grid = persistent["block"], persistent["grid"]
    assert WARP <= block <= 256 and block % WARP == 0
    assert grid == persistent["groups"] * persistent["group_size"] and 1 <= grid <= MAX_GRID
    # Shared memory holds the cached vectors and the kernel's own buffers.
    assert persistent["shared_bytes"] == VECTOR_BYTES * block * persistent["cached_vectors"] * TENSORS_READ[pass_]
    assert persistent["shared_bytes"] + persistent["shared_overhead"] <= limits.shared_per_block
    # The CTAs of a group wait for each other: in a cluster those of one group are co-resident, otherwise all blocks of
    # the launch.
    per_sm, group_size = blocks_per_multiprocessor(persistent, limits), persistent["group_size"]
    assert (persistent["group"] == "cta") == (group_size == 1)
    if persistent["group"] == "cluster":
        # A second wave of groups would cost as much as the first. There is none, since a cluster lies within 16
        # multiprocessors.
        assert 2 <= group_size <= limits.max_cluster
        whole, rest = divmod(limits.multiprocessors, 16)
        assert persistent["groups"] <= whole * (16 * per_sm // group_size) + rest * per_sm // group_size
    elif persistent["group"] == "cta":
        assert grid <= per_sm * limits.multiprocessors
    else:  # some multiprocessors stay free for other waiting kernels
        assert grid <= per_sm * (limits.multiprocessors - limits.multiprocessors // 16)
    assert (
        1 <= persistent["combine_threads_c"] <= WARP
        and persistent["combine_threads_c"] & (persistent["combine_threads_c"] - 1) == 0
    )


@settings(max_examples=600, deadline=None)
@given(any_problem, passes, devices)
def test_work_tiles_cover_the_problem(problem: Problem, pass_: str, device: str) -> None:
    persistent = problem.plan(pass_, DEVICES[device])["persistent"]
    if persistent is None:
        return
    partition, block = persistent["partition"], persistent["block"]
    units = problem.units(partition["layout"])
    assert partition["splits"] == persistent["group_size"] and 1 <= persistent["groups"] <= partition["channel_tiles"]
    assert all(size >= 1 for count, size in split_sizes(problem, partition) if count)
    assert sum(count * size for count, size in split_sizes(problem, partition)) == units
    assert (
        (partition["channel_tiles"] - 1) * partition["tile_channels"]
        < problem.channels
        <= partition["channel_tiles"] * partition["tile_channels"]
    )
    columns = partition["tile_channels"] * problem.inner
    if partition["layout"] == "channels_first":
        assert (
            partition["threads_c"] == partition["tile_channels"] == 1
            and partition["row_vectors"] == problem.row_vectors
        )
        assert partition["step_rows"] * partition["row_vectors"] + partition["step_vectors"] == block
    elif partition["layout"] == "channels_last":
        assert problem.inner == 1 and partition["threads_c"] in (1, 2, 4, 8)
        assert columns == partition["threads_c"] * problem.vector
    else:  # whole channels are whole vectors; a vector holds elements of at most two channels
        assert problem.aligned and problem.inner >= problem.vector
        assert columns == partition["threads_c"] * problem.vector and partition["tile_channels"] <= 64
        assert problem.channels * problem.inner % problem.vector == 0
    assert partition["threads_c"] <= block
    # At most everything is cached, and at least a sixteenth: the sample whose mean is the pivot of the sums.
    row_vectors = ceil_div(partition["split_size"], step(partition, block))
    assert 0 < persistent["cached_vectors"] <= row_vectors
    assert persistent["cached_vectors"] * 16 >= row_vectors
    if problem.dtype == "float64":
        assert row_vectors <= 128
    # Tile iterators count a work tile's vectors in 32 bits, and persistent kernels their channel tiles. Both step past
    # the end once.
    assert partition["split_size"] <= 2**30 and partition["channel_tiles"] <= 2**30


@settings(max_examples=600, deadline=None)
@given(any_problem, passes, devices)
@example(Problem(2**18, 1, 2, "bfloat16"), "forward_train", "t4")  # rows of a quarter of a vector, partly cached
@example(Problem(1, 2**55, 2, "bfloat16"), "forward_train", "h200")
@example(Problem(2**28, 2**28, 1, "bfloat16"), "backward_train", "b200")
@example(Problem(1, 1, 2**56, "bfloat16"), "backward_train", "t4")
def test_bytes(problem: Problem, pass_: str, device: str) -> None:
    plan = problem.plan(pass_, DEVICES[device])
    tensors = TENSORS_READ[pass_]
    floor = {"read": tensors * problem.bytes, "written": problem.bytes}
    assert plan["floor"] == floor
    assert plan["predicted"]["written"] == problem.bytes
    if plan["path"] == "two_pass":
        assert plan["reason"] == "does_not_fit"
        assert plan["predicted"]["read"] == 2 * floor["read"]
        assert plan["exchanged"] == {"read": 0, "written": 0}
        return
    assert plan["reason"] is None
    persistent = plan["persistent"]
    again = units_not_cached(problem, persistent) * problem.inner * BYTES[problem.dtype]
    if persistent["partition"]["layout"] == "channels_first":  # units are vectors here, each a part of a row
        again //= problem.row_vectors
    assert plan["predicted"]["read"] == floor["read"] + tensors * again * problem.channels
    assert floor["read"] <= plan["predicted"]["read"] < 2 * floor["read"]  # the two-pass path reads 2 * floor

    # Every CTA of a grid group stores a partial of each channel. In a one-shot exchange all CTAs read them, in a
    # two-shot exchange one CTA per channel.
    group_size = persistent["group_size"]
    grid_group = persistent["group"] == "grid"
    stored = PARTIAL_DOUBLES[pass_] * 8 * problem.channels * group_size if grid_group else 0
    if persistent["two_shot"]:
        reduced = 2 * 8 * problem.channels if pass_ == "backward_train" else 0
        assert grid_group
        assert plan["exchanged"] == {"read": stored + reduced * group_size, "written": stored + reduced}
    else:
        assert plan["exchanged"] == {"read": stored * group_size, "written": stored}


@settings(max_examples=200, deadline=None)
@given(any_problem, st.sampled_from(sorted(TENSORS_READ)), devices)
def test_plans_depend_on_their_arguments_only(problem: Problem, pass_: str, device: str) -> None:
    """The plan depends only on its arguments, not on earlier calls."""
    first = problem.plan(pass_, DEVICES[device])
    Problem(3, 5, 7, "float64").plan("backward_train", DEVICES["t4"])
    assert problem.plan(pass_, DEVICES[device]) == first


@settings(max_examples=200, deadline=None)
@given(any_problem, devices)
def test_inference_is_two_pass(problem: Problem, device: str) -> None:
    forward = problem.plan("forward_eval", DEVICES[device])
    assert forward["path"] == "two_pass" and forward["reason"] == "no_reduction"
    assert forward["predicted"] == forward["floor"]
    assert forward["floor"] == {"read": problem.bytes, "written": problem.bytes}
    backward = problem.plan("backward_eval", DEVICES[device])
    assert backward["floor"]["read"] == 2 * problem.bytes
    assert backward["predicted"]["read"] == 3 * problem.bytes  # grad_y is read for the sums and again for grad_x


@settings(max_examples=300, deadline=None)
@given(any_problem, passes, devices)
def test_without_cooperative_launch_no_block_waits_for_another(problem: Problem, pass_: str, device: str) -> None:
    """Only the blocks of a cluster wait for each other; without cluster support, none do."""
    limits = replace(DEVICES[device], cooperative_launch=False)
    for allowed in (limits, replace(limits, max_cluster=0)):
        plan = problem.plan(pass_, allowed)
        if plan["path"] == "persistent":
            assert plan["persistent"]["group"] in (("cta", "cluster") if allowed.max_cluster else ("cta",))
            assert not plan["persistent"]["two_shot"]
        else:
            assert plan["reason"] == "no_cooperation"


@pytest.mark.parametrize("shared", [0, 1024, 8 * 1024, 16 * 1024])
def test_too_little_shared_memory_is_two_pass(shared: int) -> None:
    limits = replace(DEVICES["h200"], shared_per_multiprocessor=shared, shared_per_block=shared)
    for pass_ in TRAINING:
        plan = Problem(256, 64, 112 * 112, "bfloat16").plan(pass_, limits)
        assert plan["path"] == "two_pass" and plan["reason"] == "does_not_fit"


# Ownership of each element, on devices scaled down so that small problems need several groups, CTA ranks and rounds,
# and do not fit on chip.


@st.composite
def small_limits(draw: st.DrawFn) -> Limits:
    shared = draw(st.sampled_from([20, 28, 40, 64])) * 1024
    reserved, cluster = draw(st.sampled_from([0, 1024])), draw(st.sampled_from([0, 8]))
    return Limits(draw(st.integers(1, 9)), 1024, 16, 2 * shared, shared, reserved, True, cluster)


@st.composite
def small_problems(draw: st.DrawFn) -> Problem:
    channels = draw(st.integers(1, 70))
    inner = draw(st.one_of(st.just(1), st.integers(2, 64), st.sampled_from([49, 196])))
    outer = draw(st.integers(1, max(1, 20_000 // (channels * inner))))
    return Problem(outer, channels, inner, draw(dtypes), draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(small_problems(), passes, small_limits(), st.data())
def test_every_element_has_one_owner(problem: Problem, pass_: str, limits: Limits, data: st.DataObject) -> None:
    """The vectors of all threads partition the tensor, at any alignment of its start."""
    phase = 0 if problem.aligned else data.draw(st.integers(0, problem.vector - 1))
    plan = problem.plan(pass_, limits)
    shares = [plan["two_pass"]] if plan["persistent"] is None else [plan["two_pass"], plan["persistent"]]
    elements = problem.outer * problem.channels * problem.inner
    for part in shares:
        count = owners(problem, part["partition"], part["block"], phase)
        assert set(count.values()) == {1} and set(count) == set(range(elements))
    if plan["persistent"] is not None:
        taken = channel_tiles_of_groups(plan["persistent"])
        assert set(taken.values()) == {1} and len(taken) == plan["persistent"]["partition"]["channel_tiles"]


def test_small_problems_reach_every_kind_of_plan() -> None:
    """Guards the test above: its problems and devices produce plans of every layout, group size and remainder."""
    seen = set()
    for multiprocessors, kib, cluster in ((1, 64, 0), (2, 20, 0), (9, 64, 0), (9, 64, 8)):
        limits = Limits(multiprocessors, 1024, 16, 2 * kib * 1024, kib * 1024, 0, True, cluster)
        for problem in (
            Problem(40, 10, 49, "float32", aligned=False),
            Problem(300, 64, 1, "float32"),
            Problem(100, 1, 196, "float64", aligned=False),
            Problem(64, 32, 49, "bfloat16"),
            Problem(5_000, 4, 1, "float32"),
            Problem(6, 48, 64, "float16"),
        ):
            for pass_ in TRAINING:
                persistent = problem.plan(pass_, limits)["persistent"]
                if persistent is not None:
                    rest = units_not_cached(problem, persistent) > 0
                    several = persistent["groups"] < persistent["partition"]["channel_tiles"]
                    seen |= {(persistent["partition"]["layout"], what) for what in ("any", rest and "rest") if what}
                    seen |= {(persistent["group"],), ("rounds" if several else "once",)}
    assert {("cta",), ("cluster",), ("grid",), ("rounds",), ("once",)} <= seen
    assert {
        (layout, what) for layout in ("channels_first", "channels_last", "packed") for what in ("any", "rest")
    } <= seen


# Guarantees of the design


@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("pass_", TRAINING)
@pytest.mark.parametrize("layer", shapes.resnet50(), ids=lambda layer: layer.name)
def test_resnet50_channels_first_is_at_the_floor(layer: shapes.LayerShape, pass_: str, batch: int) -> None:
    problem = Problem(batch, layer.channels, layer.height * layer.width, "bfloat16")
    plan = problem.plan(pass_, DEVICES["h200"])
    assert plan["path"] == "persistent"
    assert plan["predicted"] == plan["floor"]


@pytest.mark.parametrize("layer", shapes.resnet50(), ids=lambda layer: layer.name)
def test_no_blocks_are_idle_round_after_round(layer: shapes.LayerShape) -> None:
    """Where groups process several channel tiles sequentially, few of the blocks that fit stay unused."""
    limits, pixels = DEVICES["h200"], layer.height * layer.width
    for batch in (32, 256):
        for outer, inner in ((batch, pixels), (batch * pixels, 1)):
            for pass_ in TRAINING:
                problem = Problem(outer, layer.channels, inner, "bfloat16")
                persistent = problem.plan(pass_, limits)["persistent"]
                if persistent is None or persistent["groups"] == persistent["partition"]["channel_tiles"]:
                    continue
                blocks = blocks_per_multiprocessor(persistent, limits) * (
                    limits.multiprocessors - limits.multiprocessors // 16
                )
                assert persistent["groups"] * persistent["group_size"] >= 0.75 * blocks


@pytest.mark.parametrize("pass_", TRAINING)
def test_more_channel_tiles_than_a_kernel_counts_are_two_pass(pass_: str) -> None:
    few, many = (Problem(1, channels, 2, "float32", aligned=False) for channels in (2**30, 2**30 + 1))
    assert few.plan(pass_, DEVICES["h200"])["path"] == "persistent"
    assert many.plan(pass_, DEVICES["h200"])["path"] == "two_pass"


@pytest.mark.parametrize("pass_", TRAINING)
def test_longer_rows_than_a_kernel_counts_are_two_pass(pass_: str) -> None:
    """The kernel counts a row's elements in 32 bits. No device caches that much of a row yet; the device of this test
    has enough shared memory."""
    limits = replace(DEVICES["h200"], shared_per_multiprocessor=1 << 32, shared_per_block=1 << 32)
    for inner, path in ((1 << 30, "persistent"), ((1 << 30) + 8, "two_pass")):
        assert Problem(1, 1, inner, "bfloat16").plan(pass_, limits)["path"] == path


@pytest.mark.parametrize("pass_", TRAINING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_rows_are_as_long_as_a_vector(dtype: str, pass_: str) -> None:
    """A packed vector holds elements of at most two channels."""
    layouts = set()
    for inner in range(2, 2 * Problem(1, 1, 1, dtype).vector):
        for outer, channels in ((32, 64), (256, 64), (32, 512), (256, 2048)):
            problem = Problem(outer, channels, inner, dtype)
            persistent = problem.plan(pass_, DEVICES["h200"])["persistent"]
            layout = persistent["partition"]["layout"] if persistent else "two_pass"
            assert inner >= problem.vector or layout != "packed", (problem, layout)
            layouts.add(layout)
    assert {"packed", "channels_first"} <= layouts
