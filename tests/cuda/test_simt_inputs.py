"""The kernels on the host: alignments, values, and optional arguments."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from simt.common import (
    FIRST,
    LAST,
    LAYOUTS,
    PAIRS,
    PAIRS_BUT_FEW_SLOW,
    SANITIZERS,
    SEEDS,
    Servers,
    assert_same,
    judge,
    make,
)
from simt.server import How, Server

from bnkernels.testing import DTYPES, cases

pytest_plugins = ["simt.fixtures"]

FORWARD = ("x", "y", "weight", "bias", "mean", "invstd", "running_mean", "running_var", "num_batches_tracked")
BACKWARD = ("x", "grad_y", "grad_x", "weight", "mean", "invstd", "grad_weight", "grad_bias")

# --- alignments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_alignments(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """Each tensor at every distance from a vector boundary, alone and with all others at different distances."""
    last = layout == "channels_last"
    elements = 16 // DTYPES[pair[0]].itemsize
    for shape in FIRST if not last else LAST:
        inputs = make(shape, pair)
        how = How(block=64, splits=2, seeds=range(2))
        aligned = plain.call(inputs, how, channels_last=last)
        for shift in range(1, elements):
            for tensor in dict.fromkeys(FORWARD + BACKWARD):
                other = replace(how, misaligned={tensor: shift})
                run = plain.call(inputs, other, channels_last=last)
                judge(inputs, run, (shape, other))
                # The alignment of x determines how rows are cut into vectors, and with it the order of the sums.
                if tensor != "x":
                    assert_same(aligned, run, other)
            together = {
                tensor: (shift * (i + 1)) % elements for i, tensor in enumerate(dict.fromkeys(FORWARD + BACKWARD))
            }
            for misaligned in (together, dict.fromkeys(together, shift)):
                other = replace(how, misaligned=misaligned)
                judge(inputs, plain.call(inputs, other, channels_last=last), (shape, other))


@pytest.mark.parametrize("name", SANITIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_alignments_under_sanitizers(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    last = layout == "channels_last"
    elements = 16 // DTYPES[pair[0]].itemsize
    inputs = make(FIRST[0] if not last else LAST[0], pair)
    for shift in range(1, elements):
        misaligned = {
            tensor: (shift * (i + 1)) % elements for i, tensor in enumerate(dict.fromkeys(FORWARD + BACKWARD))
        }
        how = How(block=32, splits=2, finalize_block=32, grid=3, misaligned=misaligned)
        judge(inputs, servers(name).call(inputs, how, channels_last=last), how)


@pytest.mark.parametrize("pair", PAIRS)
def test_tails(plain: Server, pair: tuple[str, str]) -> None:
    """Rows, or channels, of every length from one to more than two vectors."""
    elements = 16 // DTYPES[pair[0]].itemsize
    for length in range(1, 2 * elements + 2):
        for shift in {0, 1, elements - 1}:
            how = How(block=32, splits=2, misaligned={"x": shift, "y": shift, "grad_y": shift})
            inputs = make((3, 2, length), pair)
            if length > 1:
                judge(inputs, plain.call(inputs, how, channels_last=False), (length, how))
            inputs = make((5, length), pair)
            judge(inputs, plain.call(inputs, how, channels_last=True), (length, how))


@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_rows_of_every_number_of_vectors(plain: Server, pair: tuple[str, str]) -> None:
    """Each thread visits several vectors and continues on the next row at whatever position its step past the row's end
    reaches.

    In a block of 32 threads a step is 32 vectors modulo the vectors of a row. Covers rows of full vectors, and rows
    that begin and end inside a vector.
    """
    elements = 16 // DTYPES[pair[0]].itemsize
    how = How(block=32, splits=1)
    for count in range(1, 41):
        for cut in (0, 1):
            inputs = make((-(-130 // count), 2, max(1, count * elements - cut)), pair)
            judge(inputs, plain.call(inputs, how, channels_last=False), (count, cut))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_adversarial_cases(plain: Server, pair: tuple[str, str]) -> None:
    """The quick grid of bnkernels.testing: every distribution of values, gradients and weights."""
    count = 0
    for case in cases("quick"):
        if (case.dtype, case.parameters) != pair or math.prod(case.shape) > 50_000:
            continue
        last = len(case.shape) == 2 or case.layout.startswith("channels_last")
        inputs = case.inputs()
        judge(inputs, plain.call(inputs, How(device=(3, 512), at_a_time=8), channels_last=last), case)
        count += 1
    assert count > 50


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_optional_arguments(plain: Server, training: bool, layout: str) -> None:
    last = layout == "channels_last"
    pair = ("bfloat16", "float32")
    how = How(block=32, splits=2)
    shape = FIRST[0] if not last else LAST[0]
    for weight in ("none", "weight_only", "bias_only"):
        inputs = make(shape, pair, training, weight)
        judge(inputs, plain.call(inputs, how, channels_last=last), weight)
    full = make(shape, pair, training)
    if training:
        for missing in ("running_mean", "running_var", "num_batches_tracked"):
            inputs = replace(full, **{missing: None})
            judge(inputs, plain.call(inputs, how, channels_last=last), missing)
    run = plain.call(full, how, channels_last=last)
    mean, invstd = run.outputs.mean, run.outputs.invstd
    assert mean is not None and invstd is not None
    for need in ((x, w, b) for x in (True, False) for w in (True, False) for b in (True, False)):
        part = plain.backward(full, mean, invstd, how, channels_last=last, need=need)
        given = [getattr(part.outputs, name) is not None for name in ("dx", "dweight", "dbias")]
        assert given == list(need)
        but = [name for name, needed in zip(("dx", "dweight", "dbias"), need) if not needed]
        forward = [field.name for field in fields(run.outputs) if field.name not in ("dx", "dweight", "dbias")]
        assert_same(run, part, need, but=(*but, *forward))
        if not any(need):
            assert part.launches == []


@pytest.mark.parametrize("counted", [1, 4, 10_000])
def test_cumulative_average(plain: Server, counted: int) -> None:
    inputs = make((3, 70, 5), ("float16", "float32"))
    inputs = replace(inputs, momentum=None, num_batches_tracked=torch.tensor(counted))
    # Several finalizing blocks must all see the same count.
    how = How(block=32, splits=3, finalize_block=32, grid=8, seeds=SEEDS["plain"])
    judge(inputs, plain.call(inputs, how, channels_last=False), counted)
