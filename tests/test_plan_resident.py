"""The plan of the resident path, and the choice between the two, checked by arithmetic for any problem and device.

What a plan promises is what the kernels rely on: blocks that wait for each other run at the same time, shared memory is
enough, every element has one owner. And it is what users are told: bytes. Both are worked out again in plan_model.py.
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
    chunk_sizes,
    owners,
    slabs_of_groups,
    step,
    units_not_kept,
)

from bench import shapes
from bnkernels.explain.devices import Limits

MAX_GRID = 2**31 - 1
ADDRESSABLE = 2**57  # bytes
WARP = 32
# Registers of a multiprocessor, of every device since compute capability 7.0, and those that two blocks of 256 threads
# leave for each thread.
REGISTERS = 64 * 1024
# The largest blocks, two of which share the registers: resident_threads() in csrc/plan.h.
THREADS = {"channels_first": 256, "channels_last": 192, "packed": 192}
PARTIAL_DOUBLES = {"forward_train": 3, "backward_train": 2}

extreme = st.one_of(st.integers(1, 300), st.integers(1, 2**20), st.integers(1, 2**40))
dtypes = st.sampled_from(sorted(BYTES))
devices = st.sampled_from(sorted(DEVICES))
passes = st.sampled_from(TRAINING)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Of any size: each extent up to 2^40, all together up to the address space."""
    problem = Problem(draw(extreme), draw(extreme), draw(extreme), draw(dtypes), draw(st.booleans()))
    assume(problem.bytes <= ADDRESSABLE)
    return problem


@st.composite
def layers(draw: st.DrawFn) -> Problem:
    """Of the sizes that networks have, in either layout: where the resident path is taken."""
    batch, channels = draw(st.integers(1, 512)), draw(st.integers(1, 4096))
    pixels = draw(st.integers(1, 128)) * draw(st.integers(1, 128))
    dtype, aligned = draw(dtypes), draw(st.booleans())
    if draw(st.booleans()):
        return Problem(batch * pixels, channels, 1, dtype, aligned)
    return Problem(batch, channels, pixels, dtype, aligned)


any_problem = st.one_of(layers(), problems())


def blocks_beside(resident: dict[str, Any], limits: Limits) -> int:
    """Blocks of a resident kernel that one multiprocessor holds at a time, by all that limits it."""
    threads = resident["block"]
    shared = resident["shared_bytes"] + resident["shared_overhead"] + limits.shared_reserved
    return min(
        limits.max_threads_per_multiprocessor // threads,
        limits.max_blocks_per_multiprocessor,
        limits.shared_per_multiprocessor // shared,
        REGISTERS // (REGISTERS // (2 * THREADS[resident["walk"]["layout"]]) * threads),
    )


@settings(max_examples=600, deadline=None)
@given(any_problem, passes, devices)
def test_limits_hold(problem: Problem, pass_: str, device: str) -> None:
    limits = DEVICES[device]
    resident = problem.plan(pass_, limits)["resident"]
    if resident is None:
        return
    block, grid = resident["block"], resident["grid"]
    assert WARP <= block <= 256 and block % WARP == 0
    assert grid == resident["groups"] * resident["members"] and 1 <= grid <= MAX_GRID
    # Shared memory is what is kept, and what the kernel takes for itself.
    assert resident["shared_bytes"] == VECTOR_BYTES * block * resident["kept"] * TENSORS_READ[pass_]
    assert resident["shared_bytes"] + resident["shared_overhead"] <= limits.shared_per_block
    # Members wait for each other: in a cluster those of each group run at the same time, else all blocks of the launch.
    beside, members = blocks_beside(resident, limits), resident["members"]
    assert (resident["group"] == "block") == (members == 1)
    if resident["group"] == "cluster":
        # A second wave of groups would cost as much as the first. There is none, as a cluster lies within 16
        # multiprocessors.
        assert 2 <= members <= limits.max_cluster
        whole, rest = divmod(limits.multiprocessors, 16)
        assert resident["groups"] <= whole * (16 * beside // members) + rest * beside // members
    elif resident["group"] == "block":
        assert grid <= beside * limits.multiprocessors
    else:  # and something is left for who else waits
        assert grid <= beside * (limits.multiprocessors - limits.multiprocessors // 16)
    assert 1 <= resident["join_lanes"] <= WARP and resident["join_lanes"] & (resident["join_lanes"] - 1) == 0


@settings(max_examples=600, deadline=None)
@given(any_problem, passes, devices)
def test_shares_cover_the_problem(problem: Problem, pass_: str, device: str) -> None:
    resident = problem.plan(pass_, DEVICES[device])["resident"]
    if resident is None:
        return
    walk, block = resident["walk"], resident["block"]
    units = problem.units(walk["layout"])
    assert walk["chunks"] == resident["members"] and 1 <= resident["groups"] <= walk["slabs"]
    assert all(size >= 1 for count, size in chunk_sizes(problem, walk) if count)
    assert sum(count * size for count, size in chunk_sizes(problem, walk)) == units
    assert (walk["slabs"] - 1) * walk["slab_channels"] < problem.channels <= walk["slabs"] * walk["slab_channels"]
    columns = walk["slab_channels"] * problem.inner
    if walk["layout"] == "channels_first":
        assert walk["lanes"] == walk["slab_channels"] == 1 and walk["windows"] == problem.windows
        assert walk["step_rows"] * walk["windows"] + walk["step_windows"] == block
    elif walk["layout"] == "channels_last":
        assert problem.inner == 1 and walk["lanes"] in (1, 2, 4, 8)
        assert columns == walk["lanes"] * problem.vector
    else:  # whole channels are whole vectors, which hold elements of two channels at most, and every row begins on one
        assert problem.aligned and problem.inner >= problem.vector
        assert columns == walk["lanes"] * problem.vector and walk["slab_channels"] <= 64
        assert problem.channels * problem.inner % problem.vector == 0
    assert walk["lanes"] <= block
    # What is kept is at most all, and at least a sixteenth: the sample that sums are centred on.
    windows = ceil_div(walk["chunk_size"], step(walk, block))
    assert 0 < resident["kept"] <= windows
    assert resident["kept"] * 16 >= windows
    if problem.dtype == "float64":
        assert windows <= 128
    # Walkers count a share's windows, and resident kernels their slabs, in 32 bits; both step past the end once.
    assert walk["chunk_size"] <= 2**30 and walk["slabs"] <= 2**30


@settings(max_examples=600, deadline=None)
@given(any_problem, passes, devices)
@example(Problem(2**18, 1, 2, "bfloat16"), "forward_train", "t4")  # rows of a quarter of a vector, not all kept
@example(Problem(1, 2**55, 2, "bfloat16"), "forward_train", "h200")
@example(Problem(2**28, 2**28, 1, "bfloat16"), "backward_train", "b200")
@example(Problem(1, 1, 2**56, "bfloat16"), "backward_train", "t4")
def test_bytes(problem: Problem, pass_: str, device: str) -> None:
    plan = problem.plan(pass_, DEVICES[device])
    tensors = TENSORS_READ[pass_]
    floor = {"read": tensors * problem.bytes, "written": problem.bytes}
    assert plan["floor"] == floor
    assert plan["predicted"]["written"] == problem.bytes
    if plan["path"] == "streaming":
        assert plan["reason"] == "not_resident"
        assert plan["predicted"]["read"] == 2 * floor["read"]
        assert plan["exchanged"] == {"read": 0, "written": 0}
        return
    assert plan["reason"] is None
    resident = plan["resident"]
    again = units_not_kept(problem, resident) * problem.inner * BYTES[problem.dtype]
    if resident["walk"]["layout"] == "channels_first":  # windows, each with its part of a row
        again //= problem.windows
    assert plan["predicted"]["read"] == floor["read"] + tensors * again * problem.channels
    assert floor["read"] <= plan["predicted"]["read"] < 2 * floor["read"]  # which the streaming path reads

    # Every member of a virtual cluster stores a partial of each channel; all, or one for each channel, read them.
    members = resident["members"]
    virtual = resident["group"] == "virtual_cluster"
    stored = PARTIAL_DOUBLES[pass_] * 8 * problem.channels * members if virtual else 0
    if resident["divided"]:
        told = 2 * 8 * problem.channels if pass_ == "backward_train" else 0
        assert virtual
        assert plan["exchanged"] == {"read": stored + told * members, "written": stored + told}
    else:
        assert plan["exchanged"] == {"read": stored * members, "written": stored}


@settings(max_examples=200, deadline=None)
@given(any_problem, st.sampled_from(sorted(TENSORS_READ)), devices)
def test_a_plan_is_a_function(problem: Problem, pass_: str, device: str) -> None:
    """The same arguments give the same plan, whatever was asked in between."""
    first = problem.plan(pass_, DEVICES[device])
    Problem(3, 5, 7, "float64").plan("backward_train", DEVICES["t4"])
    assert problem.plan(pass_, DEVICES[device]) == first


@settings(max_examples=200, deadline=None)
@given(any_problem, devices)
def test_inference_streams(problem: Problem, device: str) -> None:
    forward = problem.plan("forward_eval", DEVICES[device])
    assert forward["path"] == "streaming" and forward["reason"] == "no_reduction"
    assert forward["predicted"] == forward["floor"]
    assert forward["floor"] == {"read": problem.bytes, "written": problem.bytes}
    backward = problem.plan("backward_eval", DEVICES[device])
    assert backward["floor"]["read"] == 2 * problem.bytes
    assert backward["predicted"]["read"] == 3 * problem.bytes  # grad_y is read for the sums, and for grad_x


@settings(max_examples=300, deadline=None)
@given(any_problem, passes, devices)
def test_without_cooperative_launch_no_block_waits_for_another(problem: Problem, pass_: str, device: str) -> None:
    """But for those of a hardware cluster; and without clusters, there are none."""
    limits = replace(DEVICES[device], cooperative_launch=False)
    for allowed in (limits, replace(limits, max_cluster=0)):
        plan = problem.plan(pass_, allowed)
        if plan["path"] == "resident":
            assert plan["resident"]["group"] in (("block", "cluster") if allowed.max_cluster else ("block",))
            assert not plan["resident"]["divided"]
        else:
            assert plan["reason"] == "no_cooperation"


@pytest.mark.parametrize("shared", [0, 1024, 8 * 1024, 16 * 1024])
def test_too_little_shared_memory_streams(shared: int) -> None:
    limits = replace(DEVICES["h200"], shared_per_multiprocessor=shared, shared_per_block=shared)
    for pass_ in TRAINING:
        plan = Problem(256, 64, 112 * 112, "bfloat16").plan(pass_, limits)
        assert plan["path"] == "streaming" and plan["reason"] == "not_resident"


# Ownership, element by element: devices scaled down so that small problems have several groups, members and rounds, and
# do not fit.


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
    """The windows of all threads are a partition of the tensor, wherever in its vector an unaligned one starts."""
    phase = 0 if problem.aligned else data.draw(st.integers(0, problem.vector - 1))
    plan = problem.plan(pass_, limits)
    shares = [plan["streaming"]] if plan["resident"] is None else [plan["streaming"], plan["resident"]]
    elements = problem.outer * problem.channels * problem.inner
    for part in shares:
        count = owners(problem, part["walk"], part["block"], phase)
        assert set(count.values()) == {1} and set(count) == set(range(elements))
    if plan["resident"] is not None:
        taken = slabs_of_groups(plan["resident"])
        assert set(taken.values()) == {1} and len(taken) == plan["resident"]["walk"]["slabs"]


def test_small_problems_reach_every_kind_of_plan() -> None:
    """The test above means something: its problems and devices make plans of every layout, size of group and rest."""
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
                resident = problem.plan(pass_, limits)["resident"]
                if resident is not None:
                    rest = units_not_kept(problem, resident) > 0
                    several = resident["groups"] < resident["walk"]["slabs"]
                    seen |= {(resident["walk"]["layout"], what) for what in ("any", rest and "rest") if what}
                    seen |= {(resident["group"],), ("rounds" if several else "once",)}
    assert {("block",), ("cluster",), ("virtual_cluster",), ("rounds",), ("once",)} <= seen
    assert {
        (layout, what) for layout in ("channels_first", "channels_last", "packed") for what in ("any", "rest")
    } <= seen


# What the design promises


@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("pass_", TRAINING)
@pytest.mark.parametrize("layer", shapes.resnet50(), ids=lambda layer: layer.name)
def test_resnet50_channels_first_is_at_the_floor(layer: shapes.LayerShape, pass_: str, batch: int) -> None:
    problem = Problem(batch, layer.channels, layer.height * layer.width, "bfloat16")
    plan = problem.plan(pass_, DEVICES["h200"])
    assert plan["path"] == "resident"
    assert plan["predicted"] == plan["floor"]


@pytest.mark.parametrize("layer", shapes.resnet50(), ids=lambda layer: layer.name)
def test_no_blocks_are_idle_round_after_round(layer: shapes.LayerShape) -> None:
    """Where groups take several slabs one after the other, few blocks of those that fit are left out."""
    limits, pixels = DEVICES["h200"], layer.height * layer.width
    for batch in (32, 256):
        for outer, inner in ((batch, pixels), (batch * pixels, 1)):
            for pass_ in TRAINING:
                problem = Problem(outer, layer.channels, inner, "bfloat16")
                resident = problem.plan(pass_, limits)["resident"]
                if resident is None or resident["groups"] == resident["walk"]["slabs"]:
                    continue
                blocks = blocks_beside(resident, limits) * (limits.multiprocessors - limits.multiprocessors // 16)
                assert resident["groups"] * resident["members"] >= 0.75 * blocks


@pytest.mark.parametrize("pass_", TRAINING)
def test_more_slabs_than_a_kernel_counts_are_streamed(pass_: str) -> None:
    few, many = (Problem(1, channels, 2, "float32", aligned=False) for channels in (2**30, 2**30 + 1))
    assert few.plan(pass_, DEVICES["h200"])["path"] == "resident"
    assert many.plan(pass_, DEVICES["h200"])["path"] == "streaming"


@pytest.mark.parametrize("pass_", TRAINING)
def test_longer_rows_than_a_kernel_counts_are_streamed(pass_: str) -> None:
    """Their elements are counted in 32 bits. No device keeps enough of such a row yet: this one has memory for it."""
    limits = replace(DEVICES["h200"], shared_per_multiprocessor=1 << 32, shared_per_block=1 << 32)
    for inner, path in ((1 << 30, "resident"), ((1 << 30) + 8, "streaming")):
        assert Problem(1, 1, inner, "bfloat16").plan(pass_, limits)["path"] == path
