"""The CPU backend with an epilogue (residual addition, ReLU or both): its results, and the ReLU bounds on x that its
backward uses.

ReLU is a contraction, so the forward with an epilogue must meet the plain tolerance plus the rounding of the addition.
Everything else must match to the bit: the plain forward and backward, which test_numerics.py and test_cpu_backend.py
check, composed with torch's addition and ReLU, are the same arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from interpreter import in_subprocess
from test_cpu_backend import EVERY, SCHEDULES, levels, threads
from torch import Tensor

from bnkernels import _ops as ops
from bnkernels.testing import (
    DTYPES,
    Case,
    Epilogue,
    Inputs,
    Outputs,
    assert_within,
    cases,
    expect_fused,
    judge,
    judge_call,
    let_through,
    make_residual,
    same_bits,
    wrongly_masked,
)
from bnkernels.testing.tolerance import accumulate_dtype

FUSIONS = [(False, True), (True, False), (True, True)]  # adds, relu
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
each_dtype = pytest.mark.parametrize("dtype", list(DTYPES))


def name_of(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def fused(i: Inputs, residual: Tensor | None, relu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns y, mean, invstd and relu_bounds. The running statistics of the inputs do not change."""
    if i.training:
        buffers = [None if t is None else t.clone() for t in (i.running_mean, i.running_var, i.num_batches_tracked)]
        return ops.forward_train(i.x, i.weight, i.bias, *buffers, i.momentum, i.eps, residual, relu)
    assert i.running_mean is not None and i.running_var is not None
    return ops.forward_eval(i.x, i.weight, i.bias, i.running_mean, i.running_var, i.eps, residual, relu)


def plain(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    if i.training:
        return ops.forward_train(i.x, i.weight, i.bias, None, None, None, i.momentum, i.eps)[:3]
    assert i.running_mean is not None and i.running_var is not None
    return ops.forward_eval(i.x, i.weight, i.bias, i.running_mean, i.running_var, i.eps)[:3]


def assert_same_values(a: Tensor, b: Tensor, what: str) -> None:
    """Same bits, except for the sign of zeros and NaNs and for NaN payloads."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def backward(i: Inputs, mean: Tensor, invstd: Tensor, relu_bounds: Tensor | None, grad: Tensor) -> list[Tensor]:
    """All gradients, and the gradient of x alone, which needs no sums in inference. relu_bounds None: no ReLU."""
    found = []
    for wanted in ((True, i.weight is not None, True), (True, False, False)):
        results = ops.backward(grad, i.x, i.weight, mean, invstd, i.training, *wanted, relu_bounds)
        found += [t for t in results if t is not None]
    return found


def everything(i: Inputs) -> list[Tensor]:
    """Every result of every epilogue on these inputs."""
    found: list[Tensor] = []
    for adds, relu in FUSIONS:
        y, mean, invstd, relu_bounds = fused(i, make_residual(i) if adds else None, relu)
        found += [y, mean, invstd] + ([] if relu_bounds is None else [relu_bounds])
        if not adds:
            found += backward(i, mean, invstd, relu_bounds, i.grad)
    return found


def check(i: Inputs, context: str) -> None:
    plain_y, mean, invstd = plain(i)
    residual = make_residual(i)
    for adds, relu in FUSIONS:
        what = f"{context}, adds={adds}, relu={relu}"
        added = residual if adds else None
        y, fused_mean, fused_invstd, relu_bounds = fused(i, added, relu)
        assert same_bits(fused_mean, mean), what
        assert same_bits(fused_invstd, invstd), what
        assert y.stride() == plain_y.stride(), what
        if adds and i.x.dtype != accumulate_dtype(i.x.dtype):
            assert_within([judge(y, expect_fused(i, Epilogue(added, relu)))], what)  # torch adds to the rounded y
        else:
            parts = plain_y + residual if adds else plain_y
            assert_same_values(y, torch.relu(parts) if relu else parts, what)
        if adds:
            assert relu_bounds is None, what
            continue
        assert not wrongly_masked(i, y, *relu_bounds).any(), what
        masked = torch.empty_like(i.x).copy_(i.grad.where(let_through(i.x, *relu_bounds), 0))
        ours = backward(i, mean, invstd, relu_bounds, i.grad)
        for a, b in zip(ours, backward(i, mean, invstd, None, masked), strict=True):
            assert_same_values(a, b, what)


# ---- the grid, at every SIMD level ----


def some_cases() -> list[Case]:
    return list(cases("quick"))[3::EVERY]


def digest_of_grid() -> str:
    """One hash over the results of part of the grid, with every NaN made equal. Raises AssertionError on a wrong
    result."""
    digest = hashlib.sha256()
    for case in some_cases():
        inputs = case.inputs()
        check(inputs, str(case))
        for t in everything(inputs):
            digest.update(t.double().nan_to_num(nan=12345.0, posinf=torch.inf, neginf=-torch.inf).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_every_level_is_right_and_all_give_the_same_bits() -> None:
    """Covers the grid's distributions, shapes, layouts and dtypes at every SIMD level."""
    digests = {}
    for level in levels():
        code = "import bnkernels, test_fused_cpu as t\nprint(bnkernels.build_info()['simd'], t.digest_of_grid())"
        answer = in_subprocess(code, BNKERNELS_CPU_SIMD=level)
        assert answer.returncode == 0, answer.stderr
        ran, digests[level] = answer.stdout.split()
        assert ran == level
    assert len(set(digests.values())) == 1, digests


def test_forward_and_backward_are_within_the_tolerance() -> None:
    """Compares with the reference, so that a mistake shared by the plain kernels and the epilogues shows."""
    for case in some_cases():
        i = case.inputs()
        residual = make_residual(i)
        for adds, relu in FUSIONS:
            y, mean, invstd, relu_bounds = fused(i, residual if adds else None, relu)
            assert_within(
                [judge(y, expect_fused(i, Epilogue(residual if adds else None, relu)))],
                f"{case}, adds={adds}, relu={relu}",
            )
            if adds:
                continue
            need = i.weight is not None
            dx, dweight, dbias = ops.backward(
                i.grad, i.x, i.weight, mean, invstd, i.training, True, need, need, relu_bounds
            )
            masked = replace(i, grad=i.grad.where(~(y <= 0), 0))
            assert_within(judge_call(masked, Outputs(dx=dx, dweight=dweight, dbias=dbias)), str(case))


# ---- partition: every remainder, threads, results larger than the cache ----


@each_dtype
@trainings
def test_every_length_of_a_run_and_number_of_columns(dtype: str, training: bool) -> None:
    """Covers overlapping vectors, padded vectors, short runs as columns, and folded rows."""
    for length in [*range(1, 70), 96, 129, 1024, 2049]:
        for shape in ((3, 3, length), (35, length)):
            case = Case("normal", shape, dtype, weight="normal", training=training)
            check(case.inputs(), str(case))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "layout"), SCHEDULES, ids=name_of)
def test_bits_do_not_depend_on_threads(shape: tuple[int, ...], layout: str, dtype: str) -> None:
    """One shape per schedule."""
    inputs = Case("normal", shape, dtype, layout=layout).inputs()
    with threads(1):
        alone = everything(inputs)
    for count in (2, 7):
        with threads(count):
            for a, b in zip(alone, everything(inputs), strict=True):
                assert same_bits(a, b), f"{count} threads"
    with threads(2):
        check(inputs, str(shape))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((4, 20, 230, 229), "contiguous"), ((64, 64, 33, 33), "channels_last"), ((70_000, 63), "contiguous")],
    ids=name_of,
)
def test_results_past_the_cache(shape: tuple[int, ...], layout: str, dtype: str) -> None:
    """Results larger than the caches use streaming stores, between overlapping vectors; every element must be right."""
    inputs = Case("normal", shape, dtype, layout=layout, grad_layout=layout).inputs()
    check(inputs, str(shape))
    check(Case("normal", shape, dtype, layout=layout, grad_layout=layout, training=False).inputs(), str(shape))


# ---- non-finite values ----


@each_dtype
@trainings
@pytest.mark.parametrize("shape", [(4, 6, 33), (70, 6), (5, 6, 3)], ids=name_of)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_element_that_is_not_finite(value: float, shape: tuple[int, ...], training: bool, dtype: str) -> None:
    """NaN stays NaN through a ReLU and passes the gradient; an infinity is masked by its sign."""
    inputs = Case("normal", shape, dtype, weight="minus_one", training=training).inputs()
    weight = torch.ones(6, dtype=accumulate_dtype(inputs.x.dtype))
    weight[1::2] = -1
    inputs = replace(inputs, weight=weight, bias=torch.zeros_like(weight))
    inputs.x[1, :4] = value
    check(inputs, str(shape))
    y, *_ = fused(inputs, None, True)
    if training or value != value:
        assert y[1, :4].isnan().all()
    else:
        positive = (weight[:4] * value > 0).view(-1, *(1,) * (y.dim() - 2))
        assert torch.equal(y[1, :4] > 0, positive.expand(y[1, :4].shape))


@pytest.mark.parametrize("shape", [(4, 40, 33), (300, 70)], ids=name_of)
def test_masked_sums_beyond_float(shape: tuple[int, ...]) -> None:
    """Tiles that are summed again in double apply the ReLU mask again."""
    inputs = Case("normal", shape, "float32").inputs()
    signs = torch.ones(shape)
    signs[1::2] = -1
    check(replace(inputs, grad=3e38 * signs), str(shape))


# ---- the ReLU bounds ----


def coefficients(dtype: torch.dtype) -> Iterator[tuple[float, float, float, float]]:
    """running_mean, running_var, weight, bias: both signs, all-pass and none-pass, underflow and overflow."""
    largest = torch.finfo(dtype).max
    for weight in (1.0, -1.0, 0.3, -2.7, 0.0, 1e-8, -1e-8, 1e-40, 1e30, -1e30):
        for bias in (0.0, 0.4, -0.4, -1.3e-7, 3e-8, 1e4, -1e4, torch.inf, -torch.inf, torch.nan):
            for mean, var in ((0.0, 1.0), (0.37, 0.81), (-1e3, 1e-4), (0.9 * largest, 1.0), (1.0, 1e30), (0.1, 0.0)):
                yield mean, var, weight, bias


def edge_cases(dtype: torch.dtype, relu_bounds: Tensor) -> Tensor:
    """(n, C): the values of x at which a channel's bounds could be wrong. All values of a 16-bit dtype, otherwise those
    around the bounds."""
    channels = relu_bounds.shape[1]
    if dtype.itemsize == 2:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        return bits.view(dtype)[:, None].expand(-1, channels)
    ends = [relu_bounds.to(dtype)]
    for _ in range(4):
        ends = [torch.nextafter(ends[0], torch.tensor(-torch.inf, dtype=dtype)), *ends]
        ends = [*ends, torch.nextafter(ends[-1], torch.tensor(torch.inf, dtype=dtype))]
    info = torch.finfo(dtype)
    anywhere = torch.tensor([0.0, 1, -1, info.max, info.min, info.tiny, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    return torch.cat([*ends, anywhere[:, None].expand(-1, channels)])


@pytest.mark.parametrize("in_runs", [False, True], ids=["columns", "runs"])
@each_dtype
def test_relu_bounds_hold_exactly_the_positive_outputs(dtype: str, in_runs: bool) -> None:
    """Covers every value of the 16-bit dtypes and the neighbourhood of the bounds of the others, including a float16 y
    that is positive before rounding and 0 after it."""
    kind = DTYPES[dtype]
    accumulate = accumulate_dtype(kind)
    mean, var, weight, bias = torch.tensor(list(coefficients(accumulate)), dtype=accumulate).T.contiguous()

    def results(x: Tensor) -> tuple[Tensor, Tensor]:
        if in_runs:
            x = x.T.unsqueeze(0).contiguous()
        inputs = Inputs(x, x, weight, bias, mean, var, None, False, None, 1e-5)
        y, _, _, relu_bounds = fused(inputs, None, True)
        wrong = wrongly_masked(inputs, y, *relu_bounds)
        assert not wrong.any(), (x[wrong][:5], y[wrong][:5], wrong.nonzero()[:5])
        return y, relu_bounds

    _, relu_bounds = results(torch.zeros(2, mean.numel(), dtype=kind))
    for part in edge_cases(kind, relu_bounds).split(8192):
        _, again = results(part.contiguous())
        assert same_bits(again, relu_bounds)


def test_an_output_that_rounds_to_zero_is_not_positive() -> None:
    """1e-8 rounds to 0 in float16, so its gradient is 0."""
    inputs = Case("normal", (40, 3), "float16", training=False).inputs()
    one = torch.ones(3)
    inputs = replace(inputs, weight=1e-8 * one, bias=0 * one, running_mean=0 * one, running_var=one)
    y, mean, invstd, relu_bounds = fused(inputs, None, True)
    assert (inputs.x > 0).any()
    assert not y.any()
    assert not any(t.any() for t in backward(inputs, mean, invstd, relu_bounds, inputs.grad))


def test_many_channels() -> None:
    """All threads search bounds in parallel; every channel must have its own."""
    inputs = Case("normal", (33, 5001), "float32").inputs()
    with threads(3):
        check(inputs, "many channels")
