"""CTA groups on the host: schedules, consecutive launches, aborted launches, too few blocks.

Barrier words are never cleared: a launch starts from the state that the previous one left. run_kernels checks them
after each run of the persistent kernel, so every test of that path also covers this.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from simt.common import SEEDS, Servers, assert_same, judge, make
from simt.persistent_cases import CLUSTER, ONE_SHOT, PERSISTENT_LAYOUTS, SHAPES, SINGLE_CTA, TWO_SHOT, plan
from simt.server import SCHEDULES, Failure, How, Server

pytest_plugins = ["simt.fixtures"]

PAIR = ("bfloat16", "float32")
SHAPE = SHAPES["channels_first"]
FORWARD = ("y", "mean", "invstd", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
def test_a_stalled_block_causes_no_deadlock(plain: Server, layout: str, schedule: str) -> None:
    """Large groups, several channel tiles each, and one block, drawn by the seed, that runs as late as possible."""
    shape = SHAPES[layout]
    inputs = make(shape, PAIR)
    for way in (CLUSTER, ONE_SHOT, TWO_SHOT):
        persistent = plan(layout, shape, PAIR[0], 7, 2, **way)
        first = plain.call(inputs, How(persistent=persistent), channels_last=layout == "channels_last")
        judge(inputs, first, persistent)
        how = How(persistent=persistent, schedule=schedule, seeds=range(40))
        assert_same(first, plain.call(inputs, how, channels_last=layout == "channels_last"), (schedule, persistent))


@pytest.mark.parametrize("name", ["plain", "tsan"])
def test_launches_of_different_groups_on_one_workspace(servers: Servers, name: str) -> None:
    """Launches with different group sizes and numbers of groups and barriers, repeatedly: each gives the result of a
    fresh workspace."""
    server = servers(name)
    inputs = make(SHAPE, PAIR)
    plans = [
        plan("channels_first", SHAPE, PAIR[0], group_size, groups, **way)
        for group_size, groups, way in (
            (5, 3, ONE_SHOT),
            (2, 1, TWO_SHOT),
            (3, 2, CLUSTER),
            (3, 2, ONE_SHOT),
            (1, 3, SINGLE_CTA),
            (4, 1, TWO_SHOT),
            (2, 3, ONE_SHOT),
        )
    ]
    fresh = {persistent: server.call(inputs, How(persistent=persistent), channels_last=False) for persistent in plans}
    for order in (plans, plans[::-1], plans * 2):
        for persistent in order:
            for seeds in (range(1), range(1, 4)):
                how = How(persistent=persistent, seeds=seeds, workspace="shared")
                run = server.call(inputs, how, channels_last=False)
                judge(inputs, run, how)
                assert_same(fresh[persistent], run, how)


def test_an_aborted_launch_takes_its_workspace_with_it(plain: Server) -> None:
    """A fault in the middle of a launch leaves barrier words in an arbitrary state. A launch on that workspace hangs,
    gives wrong results, or leaves the words in a wrong state: each is reported. Launches on another workspace are
    correct. (On a GPU, a failed launch ends its context and the workspaces with it.)"""
    inputs = make(SHAPE, PAIR)
    persistent = plan("channels_first", SHAPE, PAIR[0], 3, 1)
    good = plain.call(inputs, How(persistent=persistent), channels_last=False)
    mean, invstd = good.outputs.mean, good.outputs.invstd
    assert mean is not None and invstd is not None
    # The last CTA reads out of bounds, while others may already wait for it or not have arrived.
    short = replace(inputs, grad=inputs.grad[:-1].clone())
    seen = []
    for seed in SEEDS["plain"]:
        one = range(seed, seed + 1)
        how = How(persistent=persistent, seeds=one, workspace=f"aborted{seed}", schedule="stall_one")
        with pytest.raises(Failure, match=r"out of bounds: read of .* of 'grad_y'"):
            plain.backward(short, mean, invstd, how, channels_last=False)
        try:
            again = plain.backward(inputs, mean, invstd, replace(how, schedule="seeded"), channels_last=False)
            assert_same(good, again, how, but=FORWARD)
            seen.append("at rest")
        except Failure as failure:
            kind = re.search("deadlock|differs|blocks differ|barrier word 1 is left", str(failure))
            assert kind, failure
            seen.append(kind[0])
        other = plain.backward(inputs, mean, invstd, replace(how, workspace=f"other{seed}"), channels_last=False)
        assert_same(good, other, how, but=FORWARD)
    # If the last CTA is the stalled one, the others have arrived when it faults.
    assert 0 < seen.count("at rest") < len(seen)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_too_few_co_resident_blocks_are_a_deadlock(plain: Server, schedule: str) -> None:
    """The deadlock that a cooperative launch prevents is detected, and the waiting blocks are named."""
    inputs = make(SHAPE, PAIR)
    persistent = plan("channels_first", SHAPE, PAIR[0], 3, 1)
    how = How(persistent=persistent, schedule=schedule, seeds=range(4))
    judge(inputs, plain.call(inputs, replace(how, co_resident=3), channels_last=False), schedule)
    with pytest.raises(Failure, match=r"deadlock(.|\n)*waiting for (1 more|rank 0) of a group, persistent\.cuh:\d+"):
        plain.call(inputs, replace(how, co_resident=2), channels_last=False)
    # One complete group at once is enough.
    single = replace(persistent, group_size=1, groups=3)
    judge(inputs, plain.call(inputs, replace(how, persistent=single, co_resident=1), channels_last=False), schedule)
    # This always holds for clusters, which start when all their blocks fit and wait for no other cluster.
    clusters = replace(persistent, groups=3, cluster=True)
    for co_resident in (3, 4, 6):
        run = plain.call(inputs, replace(how, persistent=clusters, co_resident=co_resident), channels_last=False)
        judge(inputs, run, schedule)
    with pytest.raises(Failure, match=r"invalid launch: .* clusters of 3"):
        plain.call(inputs, replace(how, persistent=clusters, co_resident=2), channels_last=False)
