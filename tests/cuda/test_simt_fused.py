"""The kernels with an epilogue, and their backward through a ReLU, run thread by thread on the host
(tests/support/simt).

They meet the requirements that test_simt*.py and test_simt_persistent*.py set for the plain kernels: 20 seeds with the
same bits in every build, full and partial vectors, any alignment, cached and uncached work tiles, the tolerance, and
the bytes moved. test_simt_relu_bounds.py covers the exact ReLU bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from simt.common import (
    BUILDS,
    BUILDS_AND_PAIRS,
    FIRST,
    LAST,
    LAYOUTS,
    PAIRS,
    PAIRS_BUT_FEW_SLOW,
    SANITIZERS,
    SEEDS,
    Servers,
    assert_same,
    make,
)
from simt.epilogues import assert_fused
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
from simt.server import How, Launch, Run, Server

from bnkernels.testing import DTYPES, FAMILIES, Case, Epilogue, Inputs, make_residual

pytest_plugins = ["simt.fixtures"]

EPILOGUES: dict[str, Callable[[Inputs], Epilogue]] = {
    "relu": lambda inputs: Epilogue(relu=True),
    "residual": lambda inputs: Epilogue(make_residual(inputs)),
    "residual_relu": lambda inputs: Epilogue(make_residual(inputs), relu=True),
}
# Rows of full vectors, with full tiles before partial ones (test_simt_full_vectors.py).
WHOLE = {"channels_first": (8, 3, 264), "channels_last": (140, 16)}
PERSISTENT_FULL = {"channels_first": (7, 3, 304), "channels_last": (25, 64, 3), "packed": (61, 6, 12)}
VECTORS = ("weight", "bias", "mean", "invstd", "relu_low", "relu_high", "grad_weight", "grad_bias")
TENSORS = ("x", "residual", "y", "grad_y", "grad_x")


def call(server: Server, inputs: Inputs, how: How, kind: str, last: bool | None = None) -> Run:
    """Runs and checks the forward and, after a ReLU alone, the backward. With the persistent kernel each is one
    launch.
    """
    epilogue = EPILOGUES[kind](inputs)
    if last is None:
        assert how.persistent is not None
        last = how.persistent.layout == "channels_last"
    run = server.call(inputs, how, channels_last=last, epilogue=epilogue)
    forward, backward = (1, 1) if how.persistent is not None else (3 if inputs.training else 1, 3)
    assert len(run.launches) == forward + (backward if kind == "relu" else 0)
    assert_fused(inputs, epilogue, run.outputs, run.results, (kind, how))
    return run


# --- every variant, 20 seeds, three builds ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, pair", BUILDS_AND_PAIRS)
def test_seeds_change_no_bit(servers: Servers, name: str, pair: tuple[str, str], layout: str, training: bool) -> None:
    """The two-pass path, through partial and full vectors, with weights of both signs and 0."""
    last = layout == "channels_last"
    for shape in (*(FIRST if not last else LAST), WHOLE[layout]):
        whole = shape == WHOLE[layout]
        inputs = make(shape, pair, training, "normal" if whole else "mixed")
        how = How(block=32 if whole else 64, splits=1 if whole else 2, finalize_block=64, grid=2, seeds=SEEDS[name])
        for kind in EPILOGUES:
            call(servers(name), inputs, how, kind, last)


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("name, pair", BUILDS_AND_PAIRS)
def test_persistent_seeds_change_no_bit(servers: Servers, name: str, pair: tuple[str, str], layout: str) -> None:
    """A single CTA, and groups that exchange in each way, with two or more channel tiles each."""
    shape = SHAPES[layout]
    inputs = make(shape, pair, weight="mixed")
    ways = ((1, 2, SINGLE_CTA), (3, 1, CLUSTER), (3, 1, ONE_SHOT), (2, 2, TWO_SHOT))
    for number, (group_size, groups, way) in enumerate(ways):
        how = How(persistent=plan(layout, shape, pair[0], group_size, groups, **way), seeds=SEEDS[name])
        for kind in EPILOGUES if number == 0 and name == "plain" else ("relu", "residual_relu"):
            call(servers(name), inputs, how, kind)
    # Full vectors: cached tiles, uncached tiles and a partial last tile; then everything cached.
    shape = PERSISTENT_FULL[layout]
    inputs = make(shape, pair)
    for group_size, cached_vectors, way in ((1, 4, SINGLE_CTA), (2, 32, TWO_SHOT)):
        persistent = plan(layout, shape, pair[0], group_size, 2, cached_vectors=cached_vectors, **way)
        row_vectors = work_tile_vectors(persistent, shape, pair[0])
        assert row_vectors >= cached_vectors + 4 if cached_vectors == 4 else 4 <= row_vectors <= cached_vectors
        for kind in EPILOGUES if name == "plain" else ("relu", "residual_relu"):
            call(servers(name), inputs, How(persistent=persistent, seeds=SEEDS[name]), kind)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
def test_persistent_warps_change_no_bit(servers: Servers, layout: str, name: str) -> None:
    """Warps of a block meet only at barriers. No barrier is needed between a channel tile's ReLU bounds and the next
    channel tile's values."""
    shape = SEVENS if layout == "packed" else SHAPES[layout]
    inputs = make(shape, ("bfloat16", "float32"), weight="mixed")
    for way in (CLUSTER, TWO_SHOT):
        persistent = plan(layout, shape, "bfloat16", 2, 1, block=96, tile_channels=16, **way)
        call(servers(name), inputs, How(persistent=persistent, seeds=SEEDS[name]), "relu")


# --- how a work tile is cached ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_kind_of_plan(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """Blocks of several warps, groups of 1 to 5, and all, most, or a part of a work tile cached."""
    shape = SHAPES[layout]
    inputs = make(shape, pair, weight="mixed")
    all_cached = partly_cached = 0
    for block in (32, 96):
        for group_size in (1, 2, 3, 5):
            for cached_vectors in (4, 24):
                way = {1: SINGLE_CTA, 2: TWO_SHOT, 3: CLUSTER, 5: ONE_SHOT}[group_size]
                persistent = plan(layout, shape, pair[0], group_size, 2, cached_vectors, block=block, **way)
                for kind in ("relu", "residual_relu"):
                    call(plain, inputs, How(persistent=persistent), kind)
                all_cached += work_tile_vectors(persistent, shape, pair[0]) <= cached_vectors
                partly_cached += work_tile_vectors(persistent, shape, pair[0]) > cached_vectors
    assert all_cached > 0 and partly_cached > 0


# --- alignments ------------------------------------------------------------------------------------------------------


def shifted(elements: int) -> list[dict[str, int]]:
    """The residual alone at every distance from a vector boundary, the other tensors at one, and all at different
    distances."""
    some = (1, elements - 1)
    alone = [{"residual": shift} for shift in range(1, elements)]
    alone += [{tensor: 1} for tensor in (*TENSORS, *VECTORS) if tensor != "residual"]
    together = [
        {tensor: (shift * (i + 1)) % elements for i, tensor in enumerate((*TENSORS, *VECTORS))} for shift in some
    ]
    return [*alone, *together, dict.fromkeys((*TENSORS, *VECTORS), 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_alignments(plain: Server, pair: tuple[str, str], layout: str) -> None:
    last = layout == "channels_last"
    for shape in FIRST if not last else LAST:
        inputs = make(shape, pair, weight="mixed")
        how = How(block=64, splits=2, seeds=range(2))
        aligned = {kind: call(plain, inputs, how, kind, last) for kind in ("relu", "residual_relu")}
        for misaligned in shifted(16 // DTYPES[pair[0]].itemsize):
            for kind, sound in aligned.items():
                if kind == "relu" and set(misaligned) == {"residual"}:
                    continue
                run = call(plain, inputs, replace(how, misaligned=misaligned), kind, last)
                # The alignment of x determines how rows are cut into vectors, and with it the order of the sums.
                if "x" not in misaligned:
                    assert_same(sound, run, misaligned)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_full_vectors_except_for_the_residual(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """The two-pass path, in work tiles that contain full tiles."""
    inputs = make(WHOLE[layout], pair)
    how = How(block=32, splits=1, seeds=range(2))
    aligned = call(plain, inputs, how, "residual_relu", layout == "channels_last")
    for shift in range(1, 16 // DTYPES[pair[0]].itemsize):
        other = replace(how, misaligned={"residual": shift})
        assert_same(aligned, call(plain, inputs, other, "residual_relu", layout == "channels_last"), shift)


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS_BUT_FEW_SLOW)
def test_persistent_alignments(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """Partial vectors, and vectors that are full except for the residual."""
    for shape in (SHAPES[layout], PERSISTENT_FULL[layout]):
        inputs = make(shape, pair, weight="mixed")
        how = How(persistent=plan(layout, shape, pair[0], 2, 2, two_shot=True), seeds=range(2))
        aligned = {kind: call(plain, inputs, how, kind) for kind in ("relu", "residual_relu")}
        for misaligned in shifted(16 // DTYPES[pair[0]].itemsize):
            for kind, sound in aligned.items():
                if kind == "relu" and set(misaligned) == {"residual"}:
                    continue
                run = call(plain, inputs, replace(how, misaligned=misaligned), kind)
                if "x" not in misaligned:
                    assert_same(sound, run, misaligned)


@pytest.mark.parametrize("name", SANITIZERS)
@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[-1]])
def test_alignments_under_sanitizers(servers: Servers, pair: tuple[str, str], name: str) -> None:
    elements = 16 // DTYPES[pair[0]].itemsize
    for shift in {1, elements - 1}:
        misaligned = {tensor: (shift * (i + 1)) % elements for i, tensor in enumerate((*TENSORS, *VECTORS))}
        for kind in ("relu", "residual_relu"):
            for layout in LAYOUTS:
                inputs = make((FIRST if layout == "channels_first" else LAST)[0], pair)
                how = How(block=32, splits=2, finalize_block=32, grid=3, misaligned=misaligned)
                call(servers(name), inputs, how, kind, layout == "channels_last")
            for layout in PERSISTENT_LAYOUTS:
                persistent = plan(layout, SHAPES[layout], pair[0], 2, 2)
                inputs = make(SHAPES[layout], pair)
                call(servers(name), inputs, How(persistent=persistent, misaligned=misaligned), kind)


# --- values ----------------------------------------------------------------------------------------------------------

# Weights of each sign and size, and values that overflow sums or are not finite: they affect only their own channel.
VALUES = ("normal", "sparse_relu", "constant_1e7", "scale_1e-20", "scale_1e30", "one_nan", "one_inf")
WEIGHTS = ("normal", "none", "weight_only", "zero", "minus_one", "w_1e-20", "mixed")


def cells(pair: tuple[str, str], shape: tuple[int, ...], training: bool = True) -> list[Inputs]:
    values = [distribution for distribution in VALUES if FAMILIES[distribution].fits(DTYPES[pair[0]])]
    named = [("normal", weight) for weight in WEIGHTS] + [(distribution, "mixed") for distribution in values[1:]]
    return [
        Case(distribution, shape, *pair, weight=weight, training=training).inputs() for distribution, weight in named
    ]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_values_and_weights(plain: Server, pair: tuple[str, str], layout: str, training: bool) -> None:
    last = layout == "channels_last"
    for inputs in cells(pair, (FIRST if not last else LAST)[0], training):
        for kind in EPILOGUES:
            call(plain, inputs, How(block=64, splits=2), kind, last)


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_persistent_values_and_weights(plain: Server, pair: tuple[str, str], layout: str) -> None:
    shape = {"channels_first": (6, 5, 301), "channels_last": (130, 19), "packed": (150, 8, 12)}[layout]
    for inputs in cells(pair, shape):
        for group_size, cached_vectors in ((1, 4), (2, 8)):
            for kind in EPILOGUES:
                call(
                    plain,
                    inputs,
                    How(persistent=plan(layout, shape, pair[0], group_size, cached_vectors=cached_vectors)),
                    kind,
                )


@pytest.mark.parametrize("layout", PERSISTENT_LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_overflow_after_a_relu(plain: Server, dtype: str, layout: str) -> None:
    """The sums of a backward overflow float, in the cached and in the uncached part: the overflow rescale applies the
    ReLU mask as well. Where the ReLU masks every gradient, nothing overflows."""
    shape = {"channels_first": (6, 2, 301), "channels_last": (130, 8), "packed": (150, 2, 12)}[layout]
    inputs = Case("scale_1e30", shape, dtype, dtype).inputs()
    inputs = replace(inputs, grad=1e10 * inputs.grad)
    for bias in (0.0, -1e3):
        shut = replace(inputs, bias=torch.full_like(inputs.bias, bias))
        for group_size, cached_vectors in ((1, 4), (2, 8)):
            persistent = plan(layout, shape, dtype, group_size, cached_vectors=cached_vectors, tile_channels=2)
            run = call(plain, shut, How(persistent=persistent), "relu")
            assert run.outputs.y is not None and bool((run.outputs.y > 0).any()) == (bias == 0)


# --- bytes moved -----------------------------------------------------------------------------------------------------


def moved(launch: Launch) -> dict[str, tuple[int, int]]:
    """Bytes read and written of each tensor that moves any, except for the epilogue's tensors."""
    names = [n for n in launch.read if n not in ("residual", "relu_low", "relu_high")]
    return {n: (launch.read[n], launch.written[n]) for n in names if launch.read[n] or launch.written[n]}


def assert_moves_no_more(plain_run: Run, run: Run, inputs: Inputs, kind: str) -> None:
    """Traffic is the plain kernels', plus the residual read once, the ReLU bounds written once by the forward, and the
    bounds read once by the backward."""
    forward = run.launches[0] if len(run.launches) < 3 else run.launches[2]
    assert forward.read.get("residual", 0) == (0 if kind == "relu" else inputs.x.numel() * inputs.x.element_size())
    saved = inputs.x.shape[1] * (8 if inputs.x.dtype == torch.float64 else 4)
    for name in ("relu_low", "relu_high"):
        assert sum(launch.written.get(name, 0) for launch in run.launches) == (saved if kind == "relu" else 0)
        assert (sum(launch.read.get(name, 0) for launch in run.launches) > 0) == (kind == "relu")
    for before, after in zip(plain_run.launches, run.launches):
        assert moved(before) == moved(after)


@pytest.mark.parametrize("pair", PAIRS)
def test_bytes(plain: Server, pair: tuple[str, str]) -> None:
    """The epilogue adds its residual to the plain kernels' traffic; the gradient of inference through a ReLU reads
    x.
    """
    for layout, shape in WHOLE.items():
        last = layout == "channels_last"
        how = How(block=32, splits=2)
        for training in (True, False):
            inputs = make(shape, pair, training)
            sound = plain.call(inputs, how, channels_last=last)
            all_of_x = inputs.x.numel() * inputs.x.element_size()
            for kind in EPILOGUES:
                run = call(plain, inputs, how, kind, last)
                if training:
                    assert_moves_no_more(sound, run, inputs, kind)
                    continue
                assert run.launches[0].read.get("residual", 0) == (0 if kind == "relu" else all_of_x)
                assert moved(run.launches[0]) == moved(sound.launches[0])
                if kind == "relu":
                    assert [launch.read.get("x", 0) for launch in sound.launches[1:]] == [all_of_x, 0, 0]
                    assert [launch.read.get("x", 0) for launch in run.launches[1:]] == [all_of_x, 0, all_of_x]
    for layout in PERSISTENT_LAYOUTS:
        shape = PERSISTENT_FULL[layout]
        inputs = make(shape, pair)
        persistent = plan(layout, shape, pair[0], 2, 2, cached_vectors=32, two_shot=True)
        assert work_tile_vectors(persistent, shape, pair[0]) <= persistent.cached_vectors
        sound = plain.call(inputs, How(persistent=persistent), channels_last=layout == "channels_last")
        all_of_x = inputs.x.numel() * inputs.x.element_size()
        for kind in EPILOGUES:
            run = call(plain, inputs, How(persistent=persistent), kind)
            assert (run.launches[0].read["x"], run.launches[0].written["y"]) == (all_of_x, all_of_x)
            assert_moves_no_more(sound, run, inputs, kind)
