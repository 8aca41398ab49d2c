"""Generators of test inputs: they produce what their names say, cover what they claim, and are deterministic."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bnkernels.testing import (
    DTYPE_PAIRS,
    DTYPES,
    EPILOGUES,
    FAMILIES,
    GRADS,
    LAYOUTS,
    WEIGHTS,
    Case,
    cases,
    fused_cases,
    guarded,
    lay_out,
    misaligned,
    poisoned_allocations,
    same_bits,
    shapes,
)
from bnkernels.testing.calls import Inputs

testing_cases = sys.modules["bnkernels.testing.cases"]  # `cases` in the package is the function
ROOT = Path(__file__).resolve().parents[2]
QUICK, FULL = list(cases("quick")), list(cases("full"))
SHAPE = (4, 5, 1031)
TENSORS = ("x", "grad", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def rows(t: Tensor) -> Tensor:
    return t.double().movedim(1, 0).reshape(t.shape[1], -1)


def x_of(distribution: str, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> Tensor:
    return rows(Case(distribution, shape, dtype).inputs().x)


def around(mean: float, std: float) -> Callable[[Tensor], bool]:
    return lambda x: bool(((x.mean(1) - mean).abs() < 0.1 * std).all() and ((x.std(1) / std - 1).abs() < 0.1).all())


def constant(*values: float) -> Callable[[Tensor], bool]:
    return lambda x: torch.equal(x, torch.tensor(values).double()[:, None].expand_as(x))


# Properties of each distribution's float32 rows (5, 4124).
PROPERTIES: dict[str, Callable[[Tensor], bool]] = {
    "normal": around(0, 1),
    "offset_1e2": around(1e2, 1),
    "offset_1e4": around(1e4, 1),
    "offset_1e6": around(1e6, 1),
    "offset_neg300": around(-300, 1e-3),
    "offset_1e4_signs": lambda x: x.unique().tolist() == [9999, 10001],
    "zeros": constant(0, 0, 0, 0, 0),
    "constant_tenths": constant(0.1, 0.2, 0.4, 0.8, 1.6),
    "constant_1e7": constant(*[1e7 + 3] * 5),
    "first_1e5": lambda x: bool((x[:, 0] == 1e5).all()) and around(0, 1)(x[:, 1:]),
    "last_1e6": lambda x: bool((x[:, -1] == -1e6).all()) and around(1e3, 1)(x[:, :-1]),
    "ramp_1e3": lambda x: bool((x.diff() > 0).all() and (x[:, 0] == 0).all() and (x[:, -1] > 999).all()),
    "alternating_1e4": lambda x: around(1e4, 1)(x[:, 0::2]) and around(-1e4, 1)(x[:, 1::2]),
    "halves_1e3": lambda x: around(1e3, 1)(x[:, :2062]) and around(-1e3, 1)(x[:, 2062:]),
    "scale_1e-20": around(0, 1e-20),
    "subnormal": lambda x: bool((x != 0).any() and (x.abs() < torch.finfo(torch.float32).smallest_normal).all()),
    "scale_1e18": around(0, 1e18),
    "scale_1e30": around(0, 1e30),
    "cauchy": lambda x: bool((x.abs() <= 1e4).all() and (x.abs().amax(1) > 300).all() and (x.median(1)[0] < 0.1).all()),
    "lognormal": lambda x: bool((x > 0).all() and (x.amax(1) > 100).all() and ((x.log().std(1) - 2).abs() < 0.1).all()),
    "sparse_relu": lambda x: bool((x >= 0).all()) and 0.005 < float((x > 0).double().mean()) < 0.02,
    "float16_limits": lambda x: x.unique().tolist() == [-65504, 65504],
    "float16_top": lambda x: x.unique().tolist() == [59968, 60032],
    "one_nan": lambda x: bool(x.isnan().sum() == 1 and x[2].isnan().any() and x.isinf().sum() == 0),
    "one_inf": lambda x: bool(x.isinf().sum() == 1 and x[2].isinf().any() and x.isnan().sum() == 0),
}


@pytest.mark.parametrize("distribution", list(FAMILIES))
def test_distributions_have_their_properties(distribution: str) -> None:
    assert PROPERTIES[distribution](x_of(distribution)), x_of(distribution)[:, :4]


def test_distributions_fit_their_dtypes() -> None:
    """Distributions out of a dtype's range are left out; the others neither overflow nor vanish in rounding."""
    fitting = {dtype: {n for n, f in FAMILIES.items() if f.fits(DTYPES[dtype])} for dtype in DTYPES}
    assert fitting["float32"] == fitting["float64"] == fitting["bfloat16"] == set(FAMILIES)
    too_large = {"offset_1e6", "constant_1e7", "first_1e5", "last_1e6", "scale_1e18", "scale_1e30"}
    assert set(FAMILIES) - fitting["float16"] == too_large | {"scale_1e-20"}
    for dtype, names in fitting.items():
        for name in names - {"one_nan", "one_inf"}:
            x = x_of(name, dtype)
            assert x.isfinite().all() and (name == "zeros" or (x != 0).any()), (name, dtype)


def test_extreme_values_in_float16() -> None:
    assert x_of("float16_limits", "float16").abs().unique().item() == torch.finfo(torch.float16).max
    assert 0 < x_of("subnormal", "float16").abs().max() < torch.finfo(torch.float16).smallest_normal


def grad_of(grad: str, shape: tuple[int, ...] = (4, 5, 31, 3)) -> Inputs:
    return Case("normal", shape, "float64", grad=grad).inputs()


def test_gradients_have_their_properties() -> None:
    g = {name: rows(grad_of(name).grad) for name in GRADS}
    x = rows(grad_of("normal").x)
    xhat = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert around(0, 1)(rows(grad_of("normal", SHAPE).grad))
    assert (g["ones"] == 1).all() and (g["float16_max"] == 65504).all()
    torch.testing.assert_close(g["xhat"], xhat)
    torch.testing.assert_close(g["one_plus_xhat"], 0.5 * (1 + xhat))
    assert 0 < (g["near_one"] - 1).abs().max() < 1e-3
    assert (g["one_hot"].sum(1) == 1).all() and ((g["one_hot"] != 0).sum(1) == 1).all()
    assert grad_of("expanded").grad.stride() == (0, 0, 0, 0)
    pooled = grad_of("pooled").grad
    assert pooled.stride()[2:] == (0, 0) and pooled.unique().numel() == 20
    assert not torch.equal(g["normal"], x), "x and its gradient are independent"


def test_weights_have_their_properties() -> None:
    w = {name: Case("normal", (2, 100), "float64", weight=name).inputs() for name in WEIGHTS}
    present = {name: (i.weight is not None, i.bias is not None) for name, i in w.items()}
    partial = {"none": (False, False), "weight_only": (True, False), "bias_only": (False, True)}
    assert present == {name: partial.get(name, (True, True)) for name in WEIGHTS}
    for name, value in (("zero", 0.0), ("minus_one", -1.0), ("w_1e-20", 1e-20), ("w_1e4", 1e4)):
        weight = w[name].weight
        assert weight is not None and (weight == value).all()
    mixed = w["mixed"].weight
    assert mixed is not None and {0.0, -1.0, 1e-20, 1e4} < set(mixed.tolist())


def test_running_statistics_by_mode() -> None:
    """Training starts from arbitrary statistics; inference has statistics near the data's, finite for any data."""
    for distribution in FAMILIES:
        inputs = Case(distribution, (4, 5, 31), training=False).inputs()
        assert inputs.running_mean is not None and inputs.running_var is not None
        assert inputs.running_mean.isfinite().all() and inputs.running_var.isfinite().all()
        assert (inputs.running_var >= 0).all()
    near = Case("offset_1e4", SHAPE, training=False).inputs().running_mean
    assert near is not None and ((near - 1e4).abs() < 1).all() and (near != 1e4).any()


def digest(chosen: list[Case]) -> str:
    found = hashlib.sha256()
    for case in chosen:
        inputs = case.inputs()
        found.update(str(case).encode())
        for name in TENSORS:
            t = getattr(inputs, name)
            if t is not None:
                found.update(f"{name}{t.shape}{t.stride()}{t.storage_offset()}".encode())
                found.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


SAMPLE = "from tests.numerics.test_testing import QUICK, digest; print(digest(QUICK[::7]), len(QUICK))"


def test_deterministic_across_processes() -> None:
    """Names, bits, strides and offsets do not depend on Python's hash seed and the number of threads."""
    printed = set()
    for seed, threads in (("1", "1"), ("2", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, "-c", SAMPLE], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        printed.add(run.stdout.strip())
    assert printed == {f"{digest(QUICK[::7])} {len(QUICK)}"}


def test_names_reproduce_cases() -> None:
    for case in {*QUICK, *FULL, *cases("huge"), *fused_cases("full")}:
        assert Case.parse(str(case)) == case
    case = Case("one_nan", (3, 4), "float16", "float32", "offset", "transposed", "xhat", "mixed", False, 12)
    assert str(case) == "one_nan/3x4/float16+float32/offset+transposed/xhat/mixed/eval+12"
    assert Case.parse(str(case)) == case
    case = Case("normal", (2, 4), training=False, epilogue="add+relu")
    assert str(case) == "normal/2x4/float32/contiguous/normal/normal/eval/add+relu"


@pytest.mark.parametrize("tier", ["quick", "full"])
def test_every_epilogue_with_every_dtype(tier: str) -> None:
    """In training and inference; in the full tier with each distribution too. Plain cases have no epilogue."""
    fused = list(fused_cases(tier))
    met = {(c.epilogue, c.dtype, c.parameters, c.training) for c in fused}
    assert met == {(e, *pair, t) for e in EPILOGUES[1:] for pair in DTYPE_PAIRS for t in (True, False)}
    if tier == "full":
        distributions = {(c.distribution, c.dtype, c.parameters) for c in fused if c.epilogue == "relu" and c.training}
        assert distributions == pairs_that_fit()
    assert not any(case.epilogue for case in cases(tier))
    assert list(fused_cases("huge")) == []


def test_seeds_dtypes_and_layouts() -> None:
    """Another seed gives other values; another dtype rounds the same values, and another layout rearranges them."""
    base = Case("normal", (4, 3, 5, 7), "float64")
    x = base.inputs().x
    assert not torch.equal(Case("normal", (4, 3, 5, 7), "float64", seed=1).inputs().x, x)
    assert torch.equal(Case("normal", (4, 3, 5, 7), "float32").inputs().x, x.float())
    assert torch.equal(Case("normal", (4, 3, 5, 7), "float64", layout="channels_last").inputs().x, x)
    assert not torch.equal(x[:, 0], x[:, 1])


def test_long_rows_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows repeat beyond a period, so that cases of over 2^31 elements are made in seconds; shorter rows do not."""
    assert max(case.elements_per_channel for case in FULL) <= testing_cases._PERIOD
    monkeypatch.setattr(testing_cases, "_PERIOD", 101)
    x = rows(Case("normal", (4, 3, 59)).inputs().x)
    assert torch.equal(x[:, :101], x[:, 101:202]) and torch.equal(x[:, :34], x[:, 202:])
    assert len(x[:, :101].unique()) > 300


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("normal/2x4/float32/contiguous/normal/normal", "of 7 or 8 fields, but .* has 6"),
        ("nope/2x4/float32/contiguous/normal/normal/train", "unknown distribution 'nope': expected one of normal,"),
        ("normal/2x4/int8/contiguous/normal/normal/train", "unknown dtype"),
        (
            "normal/2x4/float32+float16/contiguous/normal/normal/train",
            "float32 inputs do not support float16 parameters",
        ),
        ("normal/2x4/float32/sideways/normal/normal/train", "unknown layout"),
        ("normal/2x4/float32/channels_last/normal/normal/train", "does not apply to shape"),
        ("normal/2x4/float32/contiguous/nope/normal/train", "unknown gradient"),
        ("normal/2x4/float32/contiguous/normal/nope/train", "unknown weight"),
        ("normal/2x4/float32/contiguous/normal/normal/test", "train or eval"),
        (
            "normal/2x4/float32/contiguous/normal/normal/train/gelu",
            "unknown epilogue 'gelu': expected one of relu, add, add",
        ),
        ("normal/2xfour/float32/contiguous/normal/normal/train", "expected integers"),
        ("normal/1x4/float32/contiguous/normal/normal/train", "at least 2 values"),
        ("normal/4/float32/contiguous/normal/normal/train", "expected"),
        ("offset_1e6/2x4/float16/contiguous/normal/normal/train", "cannot represent"),
    ],
)
def test_invalid_names_raise(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case.parse(name)


def pairs_that_fit() -> set[tuple[str, str, str]]:
    return {(f, d, p) for f in FAMILIES for d, p in DTYPE_PAIRS if FAMILIES[f].fits(DTYPES[d])}


@pytest.mark.parametrize("training", [True, False])
def test_quick_covers(training: bool) -> None:
    """Each of these sets, in training and in inference."""
    met = [c for c in QUICK if c.training == training]
    assert {(c.distribution, c.dtype, c.parameters) for c in met} == pairs_that_fit()
    assert {(c.grad, c.dtype, c.parameters) for c in met} == {(g, d, p) for g in GRADS for d, p in DTYPE_PAIRS}
    assert {(c.weight, c.dtype, c.parameters) for c in met} == {(w, d, p) for w in WEIGHTS for d, p in DTYPE_PAIRS}
    layouts = {(s, name) for s in shapes.QUICK for name, layout in LAYOUTS.items() if layout.applies(s)}
    assert layouts <= {(c.shape, c.layout) for c in met}


def test_quick_samples() -> None:
    """Sampled combinations: gradients in layouts other than x's, distributions on every kind of shape."""
    assert {c.grad_layout for c in QUICK if c.grad_layout != c.layout} == set(LAYOUTS)
    assert {(a.layout, a.grad_layout) for a in QUICK} >= {
        ("contiguous", "channels_last"),
        ("channels_last", "contiguous"),
        ("channels_last", "channels_last"),
    }
    for distribution in FAMILIES:
        assert len({c.shape for c in QUICK if c.distribution == distribution}) > 5
    assert max(math.prod(c.shape) for c in QUICK) < 500_000


def test_full_covers() -> None:
    assert {(c.distribution, c.dtype, c.parameters, c.shape) for c in FULL} >= {
        (*pair, shape) for pair in pairs_that_fit() for shape in shapes.QUICK
    }
    large = {(c.shape, c.dtype, c.parameters) for c in FULL}
    assert large >= {(s, d, p) for s in shapes.LARGE for d, p in DTYPE_PAIRS}


def test_shapes_have_their_properties() -> None:
    small = shapes.QUICK
    assert {len(s) for s in small} == {2, 3, 4, 5}
    assert {1, 3, 100} <= {s[1] for s in small}, "channels"
    assert any(math.prod(s) == 2 * s[1] for s in small), "n = 2"
    assert any(s[0] == 1 for s in small) and any(s[2:] == (1, 1) for s in small)
    assert {65_537, 131_071} <= {s[0] for s in shapes.LARGE} and max(s[0] for s in shapes.LARGE) > 880_801
    assert max(s[1] for s in shapes.LARGE) > 65_536
    assert all(math.prod(s) > 2**31 for s in shapes.HUGE)


def test_unknown_tier_raises() -> None:
    with pytest.raises(ValueError, match="unknown tier 'some': expected one of quick, full, huge"):
        list(cases("some"))


LAID_OUT = [(6, 4), (4, 3, 5), (2, 3, 4, 5), (3, 1, 4, 5), (2, 8, 1, 1), (2, 3, 2, 3, 4)]


@pytest.mark.parametrize(
    ("layout", "shape"), [(name, s) for name, layout in LAYOUTS.items() for s in LAID_OUT if layout.applies(s)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = lay_out(values, layout)
    assert torch.equal(t, values) and t.dtype == dtype and t.data_ptr() != values.data_ptr()
    aligned = t.data_ptr() % 16 == 0
    spatial = shape[2:]
    if layout in ("contiguous", "offset"):
        assert t.is_contiguous() and aligned == (layout == "contiguous")
    elif layout in ("channels_last", "channels_last_offset"):
        assert t.movedim(1, -1).is_contiguous() and aligned == (layout == "channels_last")
        if len(shape) == 4:
            assert t.is_contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        assert t.stride(-1) == 2
    elif layout == "channel_slice":
        assert t.stride(0) == (shape[1] + 3) * math.prod(spatial)
    elif layout == "transposed":
        assert t.transpose(-1, -2).is_contiguous()
    else:
        assert layout == "odd_ones" and t.is_contiguous()
        assert all(t.stride(d) == 7 + 2 * d for d, size in enumerate(shape) if size == 1)


def test_offset_layouts_misalign_every_tensor() -> None:
    inputs = Case("normal", (4, 3, 5, 7), "float16", layout="channels_last_offset").inputs()
    for name in TENSORS[:-1]:
        t = getattr(inputs, name)
        assert t.data_ptr() % 4 == 2, name
    assert misaligned(torch.ones(3)).data_ptr() % 16 == 4


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("channels_last", [False, True])
def test_guarded(dtype: torch.dtype, channels_last: bool) -> None:
    def fresh() -> tuple[Tensor, Tensor, Callable[[], bool]]:
        guard = guarded((2, 3, 4), dtype, channels_last=channels_last)
        return guard.tensor, guard.storage, guard.intact

    tensor, storage, intact = fresh()
    assert tensor.isnan().all() and tensor.shape == (2, 3, 4) and tensor.data_ptr() % 16 != 0
    assert (tensor.movedim(1, -1) if channels_last else tensor).is_contiguous()
    tensor.fill_(1.0)
    assert intact(), "writes to the tensor itself are allowed"
    start = tensor.storage_offset()
    for position in (0, start - 1, start + 24, storage.numel() - 1):
        for value in (1.0, math.nan):
            _, storage, intact = fresh()
            storage[position] = value
            assert not intact(), (position, value)
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    assert torch.equal(guarded((2, 3, 4), dtype, values=values, channels_last=channels_last).tensor, values)


def test_poisoned_allocations() -> None:
    before = torch.get_deterministic_debug_mode()
    for _ in range(2):
        with poisoned_allocations():
            for dtype in DTYPES.values():
                assert torch.empty(1000, dtype=dtype).isnan().all()
            assert torch.empty_like(torch.ones(3, 4)).isnan().all()
        assert torch.get_deterministic_debug_mode() == before
    with pytest.raises(KeyError), poisoned_allocations():
        raise KeyError
    assert torch.get_deterministic_debug_mode() == before


def test_same_bits() -> None:
    nan, zero = torch.tensor([math.nan]), torch.tensor([0.0])
    assert same_bits(nan, nan.clone()) and same_bits(None, None)
    assert not same_bits(zero, -zero) and not same_bits(zero, None) and not same_bits(zero, zero.double())
    assert not same_bits(zero, torch.zeros(2)) and same_bits(torch.tensor([3]), torch.tensor([3]))
    assert same_bits(torch.ones(2, 3).t(), torch.ones(3, 2))
