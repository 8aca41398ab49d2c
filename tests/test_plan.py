"""The launch plan of the CUDA streaming path, checked by arithmetic alone, for any problem and device.

That each element is visited exactly once by the threads of such a plan is shown by the host execution (tests/simt);
here are the properties that this rests on, at sizes that nothing could execute.
"""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnkernels import ops

VECTOR = {"float64": 2, "float32": 4, "float16": 8, "bfloat16": 8}
DEVICES = {"T4": (40, 1024), "A100": (108, 2048), "L4": (58, 1536), "H200": (132, 2048), "H200 1/7": (16, 2048)}
MAX_GRID = 2**31 - 1
ADDRESSABLE = 2**57  # elements: more than any address space in use holds

sizes = st.one_of(st.integers(1, 300), st.integers(1, 2**20), st.integers(1, 2**45))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@settings(max_examples=400, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from(sorted(VECTOR)), st.booleans(), st.sampled_from(sorted(DEVICES)))
@example(880_801, 3, 1, "bfloat16", True, "H200")  # rows beyond 65,535 blocks
@example(2, 70_000, 4, "float32", True, "A100")  # channels beyond 65,535 blocks
@example(1, 1, 2**40, "float16", False, "H200")  # one row longer than 32 bits count
@example(2, 2**36, 1, "float32", True, "T4")  # more slabs than a grid may have blocks
def test_plan_covers_the_problem_within_limits(
    outer: int, channels: int, inner: int, dtype: str, aligned: bool, device: str
) -> None:
    if outer * channels * inner > ADDRESSABLE:
        return
    vector = VECTOR[dtype]
    plan = ops.streaming_plan(outer, channels, inner, dtype, aligned, *DEVICES[device])

    # The hardware's and the kernels' limits.
    for block in (plan["block"], plan["finish_block"]):
        assert 32 <= block <= 256 and block % 32 == 0
    assert 1 <= plan["grid"] <= MAX_GRID and 1 <= plan["finish_grid"] <= MAX_GRID
    assert plan["grid"] <= plan["slabs"] * plan["chunks"]
    for lanes, most in ((plan["lanes"], 8), (plan["finish_lanes"], 32)):
        assert 1 <= lanes <= most and lanes & (lanes - 1) == 0

    # Chunks cover the slab, and none is empty.
    if inner == 1:
        units = outer
        assert plan["slabs"] * plan["lanes"] * vector >= channels
        assert (plan["slabs"] - 1) * plan["lanes"] * vector < channels
    else:
        units = outer * plan["windows"]
        assert plan["slabs"] == channels and plan["lanes"] == 1
        # A row is covered wherever it starts: at any element of a vector, or on a boundary if all rows do.
        starts = 1 if aligned and inner % vector == 0 else vector
        assert plan["windows"] == max(ceil_div(start + inner, vector) for start in range(starts))
        assert plan["step_rows"] * plan["windows"] + plan["step_windows"] == plan["block"]
        assert plan["step_windows"] < plan["windows"]
    assert plan["chunks"] * plan["chunk_size"] >= units
    if dtype == "float64":  # no thread adds up more than 128 vectors one after the other
        assert plan["chunk_size"] * plan["lanes"] <= 128 * plan["block"]
    assert (plan["chunks"] - 1) * plan["chunk_size"] < units


@given(st.sampled_from(sorted(VECTOR)), st.sampled_from(sorted(DEVICES)))
def test_few_channels_fill_the_device(dtype: str, device: str) -> None:
    """Few large channels are split, in both layouts, until every multiprocessor has a block."""
    multiprocessors, threads = DEVICES[device]
    for outer, channels, inner in ((32, 64, 112 * 112), (32 * 112 * 112, 64, 1), (8, 3, 224 * 224)):
        plan = ops.streaming_plan(outer, channels, inner, dtype, True, multiprocessors, threads)
        assert plan["grid"] >= multiprocessors
