"""The tolerance detects wrong algorithms and wrong constants, and accepts right ones in plain float32 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bnkernels import reference
from bnkernels.testing import (
    DTYPES,
    FAMILIES,
    REPORT_FROM,
    Case,
    ErrorReport,
    Expectation,
    Inputs,
    K,
    Outputs,
    assert_within,
    calls,
    judge,
    judge_call,
)

Statistics = Callable[[Tensor], tuple[Tensor, Tensor]]
SHAPE = (4, 5, 1031)  # n = 4124 = 4 * 1031 per channel


def tree(rows: Tensor) -> Tensor:
    """Pairwise sum of each row, in the rows' dtype."""
    while rows.shape[1] > 1:
        if rows.shape[1] % 2:
            rows = torch.nn.functional.pad(rows, (0, 1))
        rows = rows[:, 0::2] + rows[:, 1::2]
    return rows[:, 0]


def two_pass(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Corrected two-pass (Chan, Golub & LeVeque 1983)."""
    n = rows.shape[1]
    mean = tree(rows) / n
    centred = rows - mean[:, None]
    return mean, (tree(centred.square()) / n - (tree(centred) / n).square()).clamp_min(0)


def welford(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Welford in chains of at most 64, combined in pairs by Chan's formula."""
    chains = math.ceil(rows.shape[1] / 64)
    count = torch.zeros(chains, dtype=rows.dtype)
    mean, m2 = (
        torch.zeros(rows.shape[0], chains, dtype=rows.dtype),
        torch.zeros(rows.shape[0], chains, dtype=rows.dtype),
    )
    for start in range(0, rows.shape[1], chains):
        value = rows[:, start : start + chains]
        here = slice(0, value.shape[1])
        count[here] += 1
        delta = value - mean[:, here]
        mean[:, here] += delta / count[here]
        m2[:, here] += delta * (value - mean[:, here])
    while count.numel() > 1:
        if count.numel() % 2:
            count = torch.nn.functional.pad(count, (0, 1))
            mean, m2 = (torch.nn.functional.pad(t, (0, 1)) for t in (mean, m2))
        a, b = count[0::2], count[1::2]
        delta = mean[:, 1::2] - mean[:, 0::2]
        count = a + b
        mean = mean[:, 0::2] + delta * (b / count)
        m2 = m2[:, 0::2] + m2[:, 1::2] + delta.square() * (a * b / count)
    return mean[:, 0], m2[:, 0] / rows.shape[1]


def one_pass(rows: Tensor) -> tuple[Tensor, Tensor]:
    """E[x^2] - E[x]^2, which must fail."""
    mean = tree(rows) / rows.shape[1]
    return mean, (tree(rows.square()) / rows.shape[1] - mean.square()).clamp_min(0)


def first_as_pivot(rows: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over x - x[0]: accurate if x[0] is near the mean."""
    mean, var = one_pass(rows - rows[:, :1])
    return mean + rows[:, 0], var


def in_float64(statistics: Statistics) -> Statistics:
    def wide(rows: Tensor) -> tuple[Tensor, Tensor]:
        return statistics(rows.double())

    return wide


def backend(
    inputs: Inputs,
    statistics: Statistics,
    *,
    biased_by: int = 0,
    eps: float | None = None,
    momentum: float | None = None,
    divisor: int = 0,
) -> Outputs:
    """A whole call in float32 with the given statistics and faults."""
    i = inputs
    rows, grad = (t.float().movedim(1, 0).reshape(t.shape[1], -1) for t in (i.x, i.grad))
    n = rows.shape[1]
    mean, var = statistics(rows)
    invstd = (1 / torch.sqrt(var * (n / (n - biased_by)) + (i.eps if eps is None else eps))).float()
    mean, var32 = mean.float(), var.float()
    w = torch.ones(rows.shape[0]) if i.weight is None else i.weight.float()
    b = torch.zeros(rows.shape[0]) if i.bias is None else i.bias.float()
    xhat = (rows - mean[:, None]) * invstd[:, None]
    y = xhat * w[:, None] + b[:, None]
    dbias, dweight = tree(grad), tree(grad * xhat)
    m = n - divisor
    dx = (w * invstd)[:, None] * (grad - (dbias / m)[:, None] - xhat * (dweight / m)[:, None])
    assert i.running_mean is not None and i.running_var is not None and i.momentum is not None
    f = i.momentum if momentum is None else momentum
    running_mean = i.running_mean.float() + f * (mean - i.running_mean.float())
    running_var = i.running_var.float() + f * (var32 * (n / (n - 1)) - i.running_var.float())

    def shaped(t: Tensor) -> Tensor:
        return reference.from_channel_rows(t, i.x.shape).to(i.x.dtype)

    parameter = i.running_mean.dtype
    return Outputs(
        y=shaped(y),
        mean=mean,
        invstd=invstd,
        running_mean=running_mean.to(parameter),
        running_var=running_var.to(parameter),
        num_batches_tracked=None if i.num_batches_tracked is None else i.num_batches_tracked + 1,
        dx=shaped(dx),
        dweight=dweight.to(parameter),
        dbias=dbias.to(parameter),
    )


def worst(case: Case, statistics: Statistics, **faults: float) -> dict[str, float]:
    inputs = case.inputs()
    error_reports = judge_call(inputs, backend(inputs, statistics, **faults))  # type: ignore[arg-type]
    return {v.quantity: v.ratio for v in error_reports}


# float32 sums of squares and variances of these overflow: see test_overflow_of_the_arithmetic.
OVERFLOWING = ("scale_1e18", "scale_1e30")
FITTING = [
    name for name, distribution in FAMILIES.items() if distribution.fits(torch.float32) and name not in OVERFLOWING
]


@pytest.mark.parametrize("distribution", FITTING)
@pytest.mark.parametrize(
    "statistics", [welford, two_pass, in_float64(two_pass)], ids=["welford", "two_pass", "float64"]
)
def test_stable_algorithms_pass(distribution: str, statistics: Statistics) -> None:
    """With room to spare: K covers long chains and rare inputs."""
    for grad, weight, dtype in (
        ("normal", "normal", "float32"),
        ("xhat", "w_1e4", "float32"),
        ("ones", "none", "bfloat16"),
    ):
        ratios = worst(Case(distribution, SHAPE, dtype, "float32", grad=grad, weight=weight), statistics)
        assert max(ratios.values()) < REPORT_FROM / K, ratios


@pytest.mark.parametrize("distribution", ["normal", "offset_1e4", "first_1e5", "constant_tenths", "ramp_1e3", "cauchy"])
def test_stable_algorithms_pass_at_length(distribution: str) -> None:
    """At n = 250,007, the size K was calibrated for."""
    for statistics in (welford, two_pass):
        assert max(worst(Case(distribution, (1, 3, 250_007)), statistics).values()) < REPORT_FROM / K


@pytest.mark.parametrize("distribution", ["offset_1e4", "offset_1e6", "offset_neg300", "offset_1e4_signs"])
def test_one_pass_variance_fails(distribution: str) -> None:
    ratios = worst(Case(distribution, SHAPE), one_pass)
    assert min(ratios[name] for name in ("y", "dx", "invstd")) > 1 and ratios["running_var"] > 100, ratios
    assert ratios["mean"] < 1, "its mean is accurate: the tolerance distinguishes the outputs"


def test_one_pass_variance_passes_without_cancellation() -> None:
    """So the failures above come from cancellation, not from the harness."""
    assert max(worst(Case("normal", SHAPE), one_pass).values()) < 1


def test_pivot_fails_if_it_is_an_outlier() -> None:
    assert worst(Case("first_1e5", SHAPE), first_as_pivot)["y"] > 10
    assert max(worst(Case("offset_1e4", SHAPE), first_as_pivot).values()) < 1


@pytest.mark.parametrize(
    ("fault", "quantities"),
    [
        ({"biased_by": 1}, ("y", "invstd", "dx")),  # n - 1 instead of n
        ({"eps": 2e-5}, ("y", "invstd", "dx")),
        ({"momentum": 0.1001}, ("running_mean", "running_var")),
        ({"divisor": 1}, ("dx",)),
    ],
    ids=str,
)
def test_wrong_constants_fail(fault: dict[str, float], quantities: tuple[str, ...]) -> None:
    """Each constant of the formula, slightly off, fails its own outputs and no others."""
    ratios = worst(Case("normal", (4, 5, 31)), two_pass, **fault)
    beyond = {name for name, ratio in ratios.items() if ratio > 1}
    assert beyond.issuperset(quantities), ratios
    assert not beyond - {*quantities, "dweight"}, ratios


def spoil(outputs: Outputs, name: str, change: Callable[[Tensor], Tensor]) -> Outputs:
    return replace(outputs, **{name: change(getattr(outputs, name).clone())})


@pytest.mark.parametrize("name", ["y", "dx", "mean", "invstd", "running_mean", "running_var", "dweight", "dbias"])
@pytest.mark.parametrize("wrong", [1.001, math.nan, math.inf])
def test_one_wrong_element_fails(name: str, wrong: float) -> None:
    """In any output and at any position; the error report names it."""
    inputs = Case("normal", (4, 5, 31)).inputs()
    good = backend(inputs, two_pass)
    assert_within(judge_call(inputs, good), "unchanged")
    index = (2, 3, 17) if name in ("y", "dx") else (3,)

    def change(t: Tensor) -> Tensor:
        t[index] = t[index] * wrong
        return t

    first = judge_call(inputs, spoil(good, name, change))[0]
    assert first.quantity == name and first.index == index and not first.ok
    assert math.isnan(first.got) or first.got == pytest.approx(first.expected * wrong, rel=1e-4)
    with pytest.raises(AssertionError, match=rf"the-case: 1 of 9 outputs(.|\n)*{name}\[{', '.join(map(str, index))}\]"):
        assert_within(judge_call(inputs, spoil(good, name, change)), "the-case")


def test_wrong_count_fails() -> None:
    inputs = Case("normal", (4, 5, 31)).inputs()
    good = backend(inputs, two_pass)
    first = judge_call(inputs, spoil(good, "num_batches_tracked", lambda t: t + 1))[0]
    assert first.quantity == "num_batches_tracked" and not first.ok


@pytest.mark.parametrize("distribution", ["one_nan", "one_inf"])
def test_nan_must_stay_in_its_channel(distribution: str) -> None:
    inputs = Case(distribution, (4, 5, 31)).inputs()
    good = backend(inputs, two_pass)
    assert_within(judge_call(inputs, good), distribution)
    channel = 2  # the middle one

    def leak(t: Tensor) -> Tensor:
        t[:, channel + 1] = math.nan
        return t

    def hide(t: Tensor) -> Tensor:
        return t.nan_to_num(0.0)

    for name in ("y", "dx"):
        for change, ratio in ((leak, math.inf), (hide, math.inf)):
            error_report = judge_call(inputs, spoil(good, name, change))[0]
            assert error_report.quantity == name and error_report.ratio == ratio


def error_report_of(got: float, expected: float, dtype: torch.dtype, scale: float = 1.0) -> ErrorReport:
    value = torch.tensor([expected], dtype=torch.float64)
    return judge(torch.tensor([got], dtype=dtype), Expectation("y", value, torch.full_like(value, scale), 2.0**-24))


@pytest.mark.parametrize(
    ("got", "expected", "ok"),
    [
        (math.inf, 65520.0, True),  # rounds to infinity
        (math.inf, 1e6, True),
        (-math.inf, -1e6, True),
        (-math.inf, 1e6, False),
        (math.inf, 65000.0, False),  # does not
        (65504.0, 65504.0, True),
        (65504.0, 1e6, False),  # saturation is not rounding
        (math.nan, 1e6, False),
        (math.inf, math.nan, True),  # not finite, like the reference
        (math.nan, -math.inf, True),
        (1.0, math.nan, False),
        (1.0, math.inf, False),
    ],
)
def test_overflow_of_the_output(got: float, expected: float, ok: bool) -> None:
    assert error_report_of(got, expected, torch.float16).ok == ok


def test_overflow_of_the_arithmetic() -> None:
    """At 1e30 z the variance is 1e60: float32 statistics give invstd 0, which the tolerance rejects."""
    case = Case("scale_1e30", SHAPE, weight="none")
    assert worst(case, two_pass)["y"] > 1
    assert max(worst(case, in_float64(two_pass)).values()) < 1


def test_gradual_underflow() -> None:
    """The mean of subnormal data rounds to a multiple of 2^-149. Sums with large gradients show that error, which no
    algorithm can avoid; flushing the data to zero must fail."""
    case = Case("subnormal", (4, 5, 31), grad="float16_max", weight="none")
    inputs = case.inputs()
    assert max(worst(case, in_float64(two_pass)).values()) < 1
    flushed = backend(replace(inputs, x=torch.zeros_like(inputs.x)), two_pass)
    ratios = {v.quantity: v.ratio for v in judge_call(inputs, flushed)}
    assert ratios["y"] > 1, ratios


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_rounded_reference_passes(dtype: str) -> None:
    """A perfect result passes by the rounding of its dtype alone, without K, for every distribution and weight."""
    for name, distribution in FAMILIES.items():
        if not distribution.fits(DTYPES[dtype]):
            continue
        for weight in ("normal", "w_1e-20", "w_1e4", "none"):
            for training in (True, False):
                i = Case(name, (4, 5, 31), dtype, weight=weight, training=training).inputs()
                f = reference.forward(
                    i.x, i.weight, i.bias, i.running_mean, i.running_var, None, training, i.momentum, i.eps
                )
                b = reference.backward(i.grad, i.x, i.weight, f.mean, f.invstd, training)
                assert f.running_mean is not None and f.running_var is not None
                t = DTYPES[dtype]
                outputs = Outputs(
                    y=f.y.to(t),
                    mean=f.mean.to(t),
                    invstd=f.invstd.to(t),
                    running_mean=f.running_mean.to(t),
                    running_var=f.running_var.to(t),
                    dx=b.dx.to(t),
                    dweight=b.dweight.to(t),
                    dbias=b.dbias.to(t),
                )
                error_reports = judge_call(i, outputs)
                assert len(error_reports) == 8 and error_reports[0].ratio == 0, (name, weight, str(error_reports[0]))


def test_one_ulp_too_many_fails() -> None:
    """If nothing accumulates (scale 0), an output may be rounded once."""
    for dtype in DTYPES.values():
        eps = torch.finfo(dtype).eps
        assert error_report_of(1.5, 1.5 + 0.5 * eps, dtype, scale=0.0).ok
        assert not error_report_of(1.5, 1.5 + 1.7 * eps, dtype, scale=0.0).ok


def test_bound_formula() -> None:
    """K u_acc scale + 1.05 u_out |ref| + tiny, evaluated."""
    v = error_report_of(3.0, 2.0, torch.bfloat16, scale=5.0)
    assert v.bound == pytest.approx(32 * 2.0**-24 * 5 + 1.05 * 2.0**-8 * 2 + torch.finfo(torch.bfloat16).tiny)
    assert v.ratio == pytest.approx((1 - 1.05 * 2.0**-8 * 2) / (32 * 2.0**-24 * 5))


def test_wrong_shape_raises() -> None:
    with pytest.raises(AssertionError, match=r"y: shape \(1,\), expected \(2,\)"):
        judge(torch.zeros(1), Expectation("y", torch.zeros(2).double(), torch.zeros(2).double(), 2.0**-24))


def test_blocks_of_channels_do_not_change_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Case("normal", (4, 5, 31)).inputs()
    outputs = spoil(backend(inputs, two_pass), "dx", lambda t: t.index_fill(1, torch.tensor(3), 0.0))
    whole = judge_call(inputs, outputs)
    monkeypatch.setattr(calls, "_ELEMENTS_AT_ONCE", 4 * 31 * 2)
    blocks = judge_call(inputs, outputs)
    assert blocks[0] == whole[0] and whole[0].index[1] == 3
    assert [(v.quantity, v.ratio) for v in blocks] == [(v.quantity, v.ratio) for v in whole]
