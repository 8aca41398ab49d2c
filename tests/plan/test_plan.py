"""Properties of the two-pass launch plan, checked by arithmetic for any problem and device.

The host execution (tests/support/simt) shows that the threads of a plan visit each element exactly once. These tests
check the properties that this relies on, at sizes that cannot be executed. test_plan_persistent.py covers the
persistent kernel and the choice between the two.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plan_model import BYTES, DEVICES, TENSORS_READ, TRAINING, Problem

from bnkernels import _ops as ops

MAX_GRID = 2**31 - 1
ADDRESSABLE = 2**57  # bytes: larger than any address space in use

sizes = st.one_of(st.integers(1, 300), st.integers(1, 2**20), st.integers(1, 2**45))
dtypes = st.sampled_from(sorted(BYTES))
devices = st.sampled_from(sorted(DEVICES))


@settings(max_examples=400, deadline=None)
@given(sizes, sizes, sizes, dtypes, st.booleans(), devices)
@example(880_801, 3, 1, "bfloat16", True, "h200")  # more rows than 65,535 blocks
@example(2, 70_000, 4, "float32", True, "a100")  # more channels than 65,535 blocks
@example(1, 1, 2**40, "float16", False, "h200")  # one row longer than 32 bits can count
@example(2, 2**36, 1, "float32", True, "t4")  # more channel tiles than the maximum grid size
def test_two_pass_covers_the_problem_within_limits(
    outer: int, channels: int, inner: int, dtype: str, aligned: bool, device: str
) -> None:
    problem = Problem(outer, channels, inner, dtype, aligned)
    if problem.bytes > ADDRESSABLE:
        return
    plan = problem.plan("forward_eval", DEVICES[device])["two_pass"]
    partition = plan["partition"]

    # Limits of the hardware and of the kernels.
    for block in (plan["block"], plan["finalize_block"]):
        assert 32 <= block <= 256 and block % 32 == 0
    assert 1 <= plan["grid"] <= MAX_GRID and 1 <= plan["finalize_grid"] <= MAX_GRID
    assert plan["grid"] <= partition["channel_tiles"] * partition["splits"]
    for threads_c, most in ((partition["threads_c"], 8), (plan["finalize_threads_c"], 32)):
        assert 1 <= threads_c <= most and threads_c & (threads_c - 1) == 0

    # The splits cover the channel tile, and none is empty.
    assert partition["layout"] == ("channels_last" if inner == 1 else "channels_first")
    units = problem.units(partition["layout"])
    if inner == 1:
        assert partition["channel_tiles"] * partition["threads_c"] * problem.vector >= channels
        assert (partition["channel_tiles"] - 1) * partition["threads_c"] * problem.vector < channels
    else:
        assert partition["channel_tiles"] == channels and partition["threads_c"] == 1
        assert partition["row_vectors"] == problem.row_vectors
        assert partition["step_rows"] * partition["row_vectors"] + partition["step_vectors"] == plan["block"]
        assert partition["step_vectors"] < partition["row_vectors"]
    assert partition["splits"] * partition["split_size"] >= units
    assert partition["split_size"] <= 2**30  # 32-bit counters
    if dtype == "float64":  # no thread accumulates more than 128 vectors sequentially
        assert partition["split_size"] * partition["threads_c"] <= 128 * plan["block"]
    assert (partition["splits"] - 1) * partition["split_size"] < units


@given(dtypes, devices)
def test_few_channels_fill_the_device(dtype: str, device: str) -> None:
    """Few large channels are split until every multiprocessor has a block, in both layouts."""
    limits = DEVICES[device]
    for outer, channels, inner in ((32, 64, 112 * 112), (32 * 112 * 112, 64, 1), (16, 3, 224 * 224)):
        plan = Problem(outer, channels, inner, dtype).plan("forward_train", limits)["two_pass"]
        assert plan["grid"] >= limits.multiprocessors


# The Python binding


ARGUMENTS: dict[str, Any] = {
    "outer": 8,
    "channels": 4,
    "inner": 9,
    "dtype": "float32",
    "pass_": "forward_train",
    "aligned": True,
    **DEVICES["h200"].arguments(),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"outer": 0}, "expected outer to be at least 1, but got 0"),
        ({"channels": -3}, "expected channels to be at least 1, but got -3"),
        ({"inner": 0}, "expected inner to be at least 1, but got 0"),
        ({"dtype": "int8"}, "expected dtype to be float64, float32, float16 or bfloat16, but got int8"),
        ({"pass_": "sideways"}, "expected pass_ to be forward_train, .* but got sideways"),
        ({"multiprocessors": 0}, "expected multiprocessors to be at least 1, but got 0"),
        ({"shared_per_block": -1}, "expected shared_per_block to be at least 0, but got -1"),
        (
            {"outer": 2**40, "channels": 2**40},
            r"at most 36028797018963968 elements \(2\^57 bytes\), but got 1099511627",
        ),
        ({"outer": 2**62, "channels": 2**62, "inner": 2**62}, "elements"),
    ],
)
def test_errors(wrong: dict[str, Any], message: str) -> None:
    ops.plan(**ARGUMENTS)
    with pytest.raises(ValueError, match=message):
        ops.plan(**{**ARGUMENTS, **wrong})


@pytest.mark.parametrize("missing", sorted(DEVICES["h200"].arguments()))
def test_every_limit_must_be_given(missing: str) -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        ops.plan(**{name: value for name, value in ARGUMENTS.items() if name != missing})


def test_limits_of_a_missing_device() -> None:
    with pytest.raises(RuntimeError, match=r"expected a CUDA device below|built for the CPU only"):
        ops.device_limits(10_000)


@pytest.mark.cuda
def test_limits_of_the_current_device() -> None:
    limits = ops.device_limits(0)
    assert set(limits) == set(DEVICES["h200"].arguments())
    assert Problem(8, 4, 9, "float32").plan("forward_train", type(DEVICES["h200"])(**limits))["path"]


@pytest.mark.parametrize("pass_", sorted(TENSORS_READ))
def test_forced_two_pass(pass_: str) -> None:
    plan = Problem(256, 64, 3136, "bfloat16").plan(pass_, DEVICES["h200"], force_two_pass=True)
    assert plan["path"] == "two_pass" and plan["persistent"] is None
    assert plan["reason"] == ("forced" if pass_ in TRAINING else "no_reduction")
