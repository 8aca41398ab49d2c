"""The persistent kernels on the host: alignments, values, and optional arguments."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from simt.common import PAIRS, PAIRS_BUT_FEW_SLOW, SANITIZERS, SEEDS, Servers, assert_same, judge, make
from simt.persistent_cases import PERSISTENT_LAYOUTS, SEVENS, SHAPES, plan, work_tile_vectors
from simt.plans import Limits, Persistent
from simt.server import How, Run, Server

from bnkernels.testing import DTYPES, FAMILIES, Case, Inputs, cases

pytest_plugins = ["simt.fixtures"]

TENSORS = ("x", "y", "grad_y", "grad_x")
VECTORS = ("weight", "bias", "mean", "invstd", "running_mean", "running_var", "grad_weight", "grad_bias")


def call(server: Server, inputs: Inputs, how: How) -> Run:
    assert how.persistent is not None
    run = server.call(inputs, how, channels_last=how.persistent.layout == "channels_last")
    assert len(run.launches) == 2
    return run


# --- alignments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_alignments(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """Each tensor at every distance from a vector boundary, alone and with all others at different distances."""
    elements = 16 // DTYPES[pair[0]].itemsize
    shape = SHAPES[layout]
    inputs = make(shape, pair)
    how = How(persistent=plan(layout, shape, pair[0], 2, 2, two_shot=True), seeds=range(2))
    aligned = call(plain, inputs, how)
    for shift in range(1, elements):
        for tensor in TENSORS + VECTORS:
            other = replace(how, misaligned={tensor: shift})
            run = call(plain, inputs, other)
            judge(inputs, run, other)
            # The alignment of x determines how rows are cut into vectors, and with it the order of the sums.
            if tensor != "x":
                assert_same(aligned, run, other)
        together = {tensor: (shift * (i + 1)) % elements for i, tensor in enumerate(TENSORS + VECTORS)}
        for misaligned in (together, dict.fromkeys(together, shift)):
            other = replace(how, misaligned=misaligned)
            judge(inputs, call(plain, inputs, other), other)


@pytest.mark.parametrize("name", SANITIZERS)
@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_alignments_under_sanitizers(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    elements = 16 // DTYPES[pair[0]].itemsize
    inputs = make(SHAPES[layout], pair)
    persistent = plan(layout, SHAPES[layout], pair[0], 2, 2)
    for shift in range(1, elements):
        misaligned = {tensor: (shift * (i + 1)) % elements for i, tensor in enumerate(TENSORS + VECTORS)}
        how = How(persistent=persistent, misaligned=misaligned)
        judge(inputs, call(servers(name), inputs, how), how)


@pytest.mark.parametrize("pair", PAIRS)
def test_tails(plain: Server, pair: tuple[str, str]) -> None:
    """Rows, or channels, of every length from one to more than two vectors; the smallest possible problems."""
    elements = 16 // DTYPES[pair[0]].itemsize
    for length in range(1, 2 * elements + 2):
        for shift in {0, 1, elements - 1}:
            misaligned = {"x": shift, "y": shift, "grad_y": shift}
            shapes = [("channels_last", (5, length)), ("channels_last", (2, length))]
            if length > 1:
                shapes += [("channels_first", (3, 2, length)), ("channels_first", (1, 1, length))]
            if length >= elements and shift == 0:
                shapes += [("packed", (2, 2 * elements, length)), ("packed", (2, elements, length))]
            for layout, shape in shapes:
                for group_size in (1, 2):
                    persistent = plan(layout, shape, pair[0], group_size, threads_c=2, tile_channels=elements)
                    how = How(persistent=persistent, misaligned=misaligned)
                    judge(make(shape, pair), call(plain, make(shape, pair), how), (shape, how))
    for layout, shape in (("packed", (2, 1, 16)), ("packed", (3, 1, 32)), ("channels_last", (9, 1))):
        persistent = plan(layout, shape, pair[0], 2, tile_channels=1, threads_c=1)
        judge(make(shape, pair), call(plain, make(shape, pair), How(persistent=persistent)), shape)
    # With one vector of work, a group of two becomes one block; there is no idle second block.
    persistent = plan("channels_first", (1, 1, elements), pair[0], 2, tile_channels=1, threads_c=1)
    run = plain.call(make((1, 1, elements), pair), How(persistent=persistent), channels_last=False)
    assert [launch.grid for launch in run.launches] == [1, 1]


# --- values ----------------------------------------------------------------------------------------------------------

# Four multiprocessors, on each of which two blocks of 256 threads cache 16 vectors per thread forward and 8 backward.
SMALL = Limits(4, 512, 8, shared_per_multiprocessor=2 * (78 << 10), shared_per_block=78 << 10)


@pytest.mark.parametrize("pair", PAIRS)
def test_adversarial_cases(plain: Server, pair: tuple[str, str]) -> None:
    """The quick grid of bnkernels.testing on a small device: every distribution of values, gradients and weights."""
    persistent = count = 0
    for case in cases("quick"):
        if (case.dtype, case.parameters) != pair or math.prod(case.shape) > 50_000 or not case.training:
            continue
        last = len(case.shape) == 2 or case.layout.startswith("channels_last")
        inputs = case.inputs()
        run = plain.call(inputs, How(limits=SMALL), channels_last=last)
        judge(inputs, run, case)
        persistent += sum(chosen.path == "persistent" for chosen in run.plans)
        count += len(run.plans)
    assert count > 60 and persistent == count


# Distributions whose cached and reloaded parts differ, or almost; or whose sums, squares or differences overflow.
PARTLY_CACHED = (
    "halves_1e3",
    "ramp_1e3",
    "first_1e5",
    "last_1e6",
    "alternating_1e4",
    "offset_1e4",
    "constant_tenths",
    "constant_1e7",
    "cauchy",
    "sparse_relu",
    "scale_1e18",
    "scale_1e30",
    "float16_limits",
    "float16_top",
    "scale_1e-20",
    "one_nan",
    "one_inf",
)


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_distributions_in_partly_cached_work_tiles(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """An eighth of each work tile is cached: the pivot is the mean of that part alone."""
    shape = {"channels_first": (6, 3, 301), "channels_last": (130, 19), "packed": (150, 4, 12)}[layout]
    part = 0
    for distribution in PARTLY_CACHED:
        if not FAMILIES[distribution].fits(DTYPES[pair[0]]):
            continue
        for weight in ("normal", "w_1e4") if distribution == "halves_1e3" else ("normal",):
            inputs = Case(distribution, shape, *pair, weight=weight).inputs()
            for group_size, cached_vectors in ((1, 4), (2, 4), (1, 8)):
                persistent = plan(layout, shape, pair[0], group_size, cached_vectors=cached_vectors)
                while 8 * persistent.cached_vectors < work_tile_vectors(persistent, shape, pair[0]):
                    persistent = replace(persistent, cached_vectors=persistent.cached_vectors + 4)
                part += persistent.cached_vectors < work_tile_vectors(persistent, shape, pair[0])
                judge(inputs, call(plain, inputs, How(persistent=persistent)), (distribution, weight, persistent))
    assert part >= 10


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_overflow_in_every_part(plain: Server, dtype: str, layout: str) -> None:
    """Finite values whose sum or squares overflow float, in the cached part and in the uncached part."""
    shape = {"channels_first": (8, 2, 301), "channels_last": (130, 8), "packed": (150, 2, 12)}[layout]
    cached_vectors = 24 if dtype == "float32" else 8
    persistent = plan(layout, shape, dtype, 2, cached_vectors=cached_vectors, tile_channels=2)
    ordinary = Case("offset_1e2", shape, dtype, dtype).inputs()
    for value in (1e20, 3e38):
        for position in (0, 1, shape[0] // 2 - 1, shape[0] // 2, shape[0] - 1):
            x = ordinary.x.clone()
            # All of one sign, so that sums overflow; in one channel only, so that its neighbours must not change.
            x[position, 0] = torch.tensor(value).to(x.dtype)
            inputs = replace(ordinary, x=x)
            judge(inputs, call(plain, inputs, How(persistent=persistent)), (value, position))
        x = ordinary.x.clone()
        x[:, 1] = value * (1 + 0.01 * torch.randn(x[:, 1].shape).clamp(-1, 1)) * 0.9
        inputs = replace(ordinary, x=x)
        judge(inputs, call(plain, inputs, How(persistent=persistent)), value)


# --- optional arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_shot", [None, False, True], ids=["cta", "one_shot", "two_shot"])
@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
def test_optional_arguments(plain: Server, layout: str, two_shot: bool | None) -> None:
    pair = ("bfloat16", "float32")
    shape = SHAPES[layout]
    last = layout == "channels_last"
    how = How(persistent=plan(layout, shape, pair[0], 1 if two_shot is None else 3, 2, two_shot=bool(two_shot)))
    for weight in ("none", "weight_only", "bias_only"):
        inputs = make(shape, pair, weight=weight)
        judge(inputs, call(plain, inputs, how), weight)
    full = make(shape, pair)
    run = call(plain, full, how)
    running = ("running_mean", "running_var", "num_batches_tracked")
    for present in ((a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)):
        missing = [name for name, there in zip(running, present) if not there]
        inputs = replace(full, **dict.fromkeys(missing))
        other = call(plain, inputs, how)
        judge(inputs, other, missing)
        assert_same(run, other, missing, but=tuple(missing))
    mean, invstd = run.outputs.mean, run.outputs.invstd
    assert mean is not None and invstd is not None
    gradients = ("dx", "dweight", "dbias")
    forward = [field.name for field in fields(run.outputs) if field.name not in gradients]
    for need in ((x, w, b) for x in (True, False) for w in (True, False) for b in (True, False)):
        part = plain.backward(full, mean, invstd, how, channels_last=last, need=need)
        assert [getattr(part.outputs, name) is not None for name in gradients] == list(need)
        if need[0]:
            assert len(part.launches) == 1
            absent = [name for name, needed in zip(gradients, need) if not needed]
            assert_same(run, part, need, but=(*absent, *forward))
        else:  # No tensor of the problem's size is written: the plan is the two-pass path, which is at the floor there.
            judge(full, part, need)


@pytest.mark.parametrize("name", ["plain", "tsan"])
@pytest.mark.parametrize("counted", [0, 4, 10_000])
@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
def test_cumulative_average(servers: Servers, layout: str, counted: int, name: str) -> None:
    """The batch is counted once, after every block has read the count, also in launches with idle blocks."""
    shape = SEVENS if layout == "packed" else SHAPES[layout]
    inputs = make(shape, ("bfloat16", "float32"))
    inputs = replace(inputs, momentum=None, num_batches_tracked=torch.tensor(counted))
    for group_size, groups, two_shot in ((1, 1, False), (1, 3, False), (3, 2, True), (2, 9, False)):
        persistent = plan(layout, shape, "bfloat16", group_size, groups, two_shot=two_shot, tile_channels=16)
        how = How(persistent=persistent, seeds=SEEDS[name])
        run = call(servers(name), inputs, how)
        judge(inputs, run, how)
        # One access for each channel and CTA that writes its running statistics, and one for the count.
        assert run.launches[0].read["num_batches_tracked"] >= (inputs.x.shape[1] + 1) * 8
        assert run.launches[0].written["num_batches_tracked"] == 8


def test_backward_of_inference_is_two_pass(plain: Server) -> None:
    """The persistent plan is requested, but grad_x of inference needs no reduction."""
    shape = SHAPES["channels_first"]
    inputs = make(shape, ("float32", "float32"), training=False)
    run = plain.call(inputs, How(persistent=Persistent("channels_first", 32)), channels_last=False)
    judge(inputs, run, shape)
    assert len(run.launches) == 4
