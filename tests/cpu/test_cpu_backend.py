"""The CPU backend: its SIMD levels, its partition into blocks, splits and tiles, and its threads.

test_numerics.py covers what holds on every backend. These tests cover what this backend adds: the same bits at every
SIMD level, for every number of threads and on every call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from interpreter import in_subprocess
from torch import Tensor

from bnkernels import _ops as ops
from bnkernels.testing import Case, Inputs, Outputs, assert_within, cases, judge_call, lay_out, same_bits

EVERY = 10  # cases of the quick grid, for the tests that run the grid once per SIMD level


def run(i: Inputs) -> Outputs:
    """Forward and backward through the compiled ops, without the Python layers above them."""
    running_mean, running_var, count = (
        None if t is None else t.clone() for t in (i.running_mean, i.running_var, i.num_batches_tracked)
    )
    if i.training:
        y, mean, invstd, _ = ops.forward_train(
            i.x, i.weight, i.bias, running_mean, running_var, count, i.momentum, i.eps
        )
    else:
        y, mean, invstd, _ = ops.forward_eval(i.x, i.weight, i.bias, running_mean, running_var, i.eps)
    need_weight = i.weight is not None
    dx, dweight, dbias = ops.backward(i.grad, i.x, i.weight, mean, invstd, i.training, True, need_weight, need_weight)
    return Outputs(y, mean, invstd, running_mean, running_var, count, dx, dweight, dbias)


def tensors(outputs: Outputs) -> dict[str, Tensor]:
    return {name: t for name, t in vars(outputs).items() if isinstance(t, Tensor)}


def assert_same_bits(a: Outputs, b: Outputs, what: str) -> None:
    for name, t in tensors(a).items():
        assert same_bits(t, tensors(b)[name]), f"{name}: {what}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- SIMD levels ----


def levels() -> list[str]:
    """Every SIMD level of this build and processor, as reported by the library."""
    answer = in_subprocess("import bnkernels; bnkernels.build_info()", BNKERNELS_CPU_SIMD="none such")
    assert answer.returncode != 0
    assert "BNKERNELS_CPU_SIMD=none such: this build and processor have " in answer.stderr
    return answer.stderr.strip().rpartition(" have ")[2].split(", ")


def digest_of_grid() -> str:
    """One hash over the results of the grid, with every NaN made equal. Raises AssertionError beyond the tolerance."""
    digest = hashlib.sha256()
    for case in list(cases("quick"))[::EVERY]:
        inputs = case.inputs()
        outputs = run(inputs)
        assert_within(judge_call(inputs, outputs), str(case))
        for t in tensors(outputs).values():
            # The sign and payload of a NaN depend on the instruction.
            digest.update(t.double().nan_to_num(nan=12345.0, posinf=torch.inf, neginf=-torch.inf).numpy().tobytes())
    return digest.hexdigest()


def assert_conversions_exact() -> None:
    """to_opmath over every 16-bit pattern; from_opmath over ties, neighbours of ties, subnormals and overflow."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x.reshape(1, 1, -1)
        one, zero = torch.ones(1), torch.zeros(1)
        y, *_ = ops.forward_eval(x, None, None, zero, 0.75 * one, 0.25)  # invstd is exactly 1
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.nan_to_num(0.0), x.nan_to_num(0.0)), f"{dtype} in runs"

        bits = torch.arange(2**16, dtype=torch.int64) << 16
        wide = torch.cat(
            [bits, bits + 0x7FFF, bits + 0x8000, bits + 0x8001, bits + 0x1000, bits + 0x0FFF, bits + 0x3000]
        )
        wide = wide.to(torch.int32).view(torch.float32)
        wide = wide[wide.isfinite()]
        ones = torch.ones(2, wide.numel(), dtype=dtype)
        zeros = torch.zeros_like(wide)
        y, *_ = ops.forward_eval(ones, wide, None, zeros, zeros + 0.75, 0.25)
        assert torch.equal(y[0], wide.to(dtype)), f"{dtype} in columns"
        assert torch.equal(y[1], wide.to(dtype)), f"{dtype} in columns"


def assert_nan_stays_nan() -> None:
    """For float32 coefficients that are NaN: of either sign, quiet or signaling, and with payloads that rounding would
    carry.

    Covers the vector code (y and dx, in runs, in short runs and in columns) and the scalar code (dweight).
    """
    payloads = (1, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x3FFFFF, 0x400000, 0x40FFFF, 0x7F8000, 0x7FFFFF)
    bits = torch.tensor([sign + 0x7F800000 + payload for sign in (0, 0x80000000) for payload in payloads])
    nan = bits.to(torch.int32).view(torch.float32)
    some = torch.ones(2 * len(nan))
    some[::2] = nan
    one, zero, expected = torch.ones(len(some)), torch.zeros(len(some)), some.isnan()
    assert expected.sum() == len(nan)
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((2, len(some), 35), (2, len(some), 3), (3, len(some))):
            x = torch.ones(shape, dtype=dtype)
            where = expected.view(1, -1, *(1,) * (len(shape) - 2)).expand(shape)
            for weight, bias, mean, var in (
                (some, zero, zero, one),
                (one, some, zero, one),
                (one, zero, some, one),
                (one, zero, zero, some),
            ):
                y, *_ = ops.forward_eval(x, weight, bias, mean, var, 1e-5)
                assert torch.equal(y.isnan(), where), f"y, {dtype}, {shape}"
            of_weight = one.to(dtype)
            dx, dweight, dbias = ops.backward(x, x, of_weight, some, one, True, True, True, True)
            assert dx is not None and dweight is not None and dbias is not None
            assert torch.equal(dx.isnan(), where), f"dx, {dtype}, {shape}"
            assert dweight.dtype == dtype and torch.equal(dweight.isnan(), expected), f"dweight, {dtype}, {shape}"
            assert dbias.isfinite().all()
        for value in nan:  # one channel is a run of any length, including runs shorter than a vector
            y, *_ = ops.forward_eval(torch.ones(5, 1, 3, dtype=dtype), None, value[None], zero[:1], one[:1], 1e-5)
            assert y.isnan().all(), f"{dtype}, one channel"


def test_every_level_is_within_the_tolerance_and_gives_the_same_bits() -> None:
    digests = {}
    names = levels()
    assert names[-1] == "baseline"
    for level in names:
        code = (
            "import bnkernels, test_cpu_backend as t\n"
            "t.assert_conversions_exact()\n"
            "t.assert_nan_stays_nan()\n"
            "print(bnkernels.build_info()['simd'], t.digest_of_grid())"
        )
        answer = in_subprocess(code, BNKERNELS_CPU_SIMD=level)
        assert answer.returncode == 0, answer.stderr
        ran, digests[level] = answer.stdout.split()
        assert ran == level
    assert len(set(digests.values())) == 1, digests


# ---- threads ----

# One shape per schedule: blocks owned by a thread, shared splits, one channel, few channels, folded rows, several
# blocks of columns, short runs as columns, splits of unequal size, blocks of several channels of several tiles, more
# blocks than the cache holds.
SCHEDULES = [
    ((3, 70, 56, 57), "contiguous"),
    ((20, 6, 46, 47), "contiguous"),
    ((1, 6, 70_001), "contiguous"),
    ((4, 64, 28, 28), "contiguous"),
    ((8, 130, 7, 7), "contiguous"),
    ((3, 3, 301, 303), "contiguous"),
    ((2, 1, 400, 411), "contiguous"),
    ((1, 3, 700_001), "contiguous"),
    ((5000, 40, 3), "contiguous"),
    ((40, 2048, 2, 2), "contiguous"),
    ((6, 64, 56, 56), "channels_last"),
    ((2, 2100, 9, 9), "channels_last"),
    ((9, 3, 111, 111), "channels_last"),
    ((70_003, 5), "contiguous"),
    ((1999, 100), "contiguous"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("shape", "layout"), SCHEDULES, ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else v)
def test_bits_do_not_depend_on_threads_or_repetition(shape: tuple[int, ...], layout: str, dtype: str) -> None:
    inputs = Case("offset_1e2", shape, dtype, layout=layout).inputs()
    with threads(1):
        alone = run(inputs)
    assert_within(judge_call(inputs, alone), str(shape))
    for count in (2, 3, 7):
        with threads(count):
            assert_same_bits(alone, run(inputs), f"{count} threads")
            assert_same_bits(alone, run(inputs), f"{count} threads, again")


def test_calls_from_several_python_threads() -> None:
    # More work than one thread takes alone, from several Python threads at once.
    import concurrent.futures

    inputs = Case("normal", (8, 64, 28, 28), "float32").inputs()
    expected = run(inputs)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(lambda _: run(inputs), range(8)):
            assert_same_bits(expected, outputs, "concurrent calls")


# ---- partition: every remainder ----


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_length_of_a_run(dtype: str) -> None:
    lengths = [*range(1, 70), 95, 96, 97, 127, 129, 1023, 1024, 1025, 2047, 2048, 2049, 4100]
    for length in lengths:
        case = Case("offset_1e2", (3, 3, length), dtype)
        inputs = case.inputs()
        assert_within(judge_call(inputs, run(inputs)), str(case))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_number_of_columns(dtype: str) -> None:
    for columns in [*range(1, 70), 95, 96, 97, 127, 129, 1023, 1025, 2049]:
        for rows in (2, 33, 70):
            case = Case("offset_1e2", (rows, columns), dtype)
            inputs = case.inputs()
            assert_within(judge_call(inputs, run(inputs)), str(case))


@pytest.mark.parametrize("rows", [2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1025, 8193])
def test_every_number_of_rows(rows: int) -> None:
    for shape in ((rows, 7), (rows, 33), (rows, 5, 2)):
        case = Case("ramp_1e3", shape, "float32")
        inputs = case.inputs()
        assert_within(judge_call(inputs, run(inputs)), str(case))


@pytest.mark.parametrize("runs", [2, 3, 31, 32, 33, 63, 64, 65, 66, 67, 97, 127, 128, 129, 130, 255, 257, 513])
def test_every_number_of_runs(runs: int) -> None:
    """A tile is two runs and a split is 32 tiles; the last of either may be partial."""
    case = Case("ramp_1e3", (runs, 3, 700), "float32")
    inputs = case.inputs()
    assert_within(judge_call(inputs, run(inputs)), str(case))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_past_the_cache_at_every_alignment(dtype: str, layout: str) -> None:
    # Over 32 MB in all, so that results use streaming stores; 49 and 63 elements, so that runs and rows start at any
    # alignment.
    shape = (500, 384, 7, 7) if layout == "contiguous" else (150, 63, 33, 33)
    x, grad = (lay_out(torch.randn(shape).to(getattr(torch, dtype)), layout) for _ in range(2))
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    outputs = run(Inputs(x, grad, weight, bias, None, None, None, True, 0.1, 1e-5))
    some = [0, 1, shape[1] // 2, shape[1] - 1]
    few = Inputs(x[:, some], grad[:, some], weight[some], bias[some], None, None, None, True, 0.1, 1e-5)
    assert outputs.y is not None and outputs.dx is not None
    assert_within(judge_call(few, Outputs(y=outputs.y[:, some], dx=outputs.dx[:, some])), str(shape))
    # A rough check elsewhere: unwritten or misplaced elements would stand out.
    native = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    dx = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, *native[1:], True, 1e-5, [True, False, False]
    )[0]
    tolerance = 1e-3 if dtype == "float32" else 0.1
    assert (outputs.y.float() - native[0].float()).abs().max() < tolerance
    assert (outputs.dx.float() - dx.float()).abs().max() < tolerance


def test_layouts_agree_to_rounding_and_offsets_to_the_bit() -> None:
    for layout in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(4, 70, 9, 9).to(dtype)
            plain = ops.forward_train(lay_out(x, layout), None, None, None, None, None, 0.1, 1e-5)
            moved = ops.forward_train(
                lay_out(x, layout.replace("contiguous", "") + ("_" if "_" in layout else "") + "offset"),
                *(None,) * 5,
                0.1,
                1e-5,
            )
            for a, b in zip(plain, moved):
                assert same_bits(a, b)


# ---- overflow of float inside a tile ----


@pytest.mark.parametrize("distribution", ["scale_1e18", "scale_1e30", "one_inf", "one_nan", "subnormal", "scale_1e-20"])
@pytest.mark.parametrize("shape", [(4, 40, 33), (300, 70), (200, 3), (2, 2, 5000)], ids=str)
def test_tiles_beyond_float(distribution: str, shape: tuple[int, ...]) -> None:
    inputs = Case(distribution, shape, "float32").inputs()
    assert_within(judge_call(inputs, run(inputs)), f"{distribution} {shape}")


def test_sums_of_the_gradient_beyond_float() -> None:
    for shape in ((4, 40, 33), (300, 70)):
        inputs = Case("normal", shape, "float32").inputs()
        # Every tile's sum of |g| overflows float; the channel's own sum is moderate because the signs alternate.
        signs = torch.ones(inputs.x.shape)
        signs[1::2] = -1
        huge = replace(inputs, grad=3e38 * signs)
        outputs = run(huge)
        assert outputs.dbias is not None and outputs.dweight is not None
        expected = huge.grad.double().movedim(1, 0).reshape(shape[1], -1).sum(1)
        assert torch.equal(outputs.dbias.double(), expected)


@pytest.mark.parametrize("shape", [(4, 40, 33), (300, 70)], ids=str)
def test_a_tiny_eps_is_not_drowned_by_underflow(shape: tuple[int, ...]) -> None:
    # The squares of 1e-22 underflow float. With an eps that small they still determine the variance.
    inputs = replace(Case("normal", shape, "float32").inputs(), eps=1e-44)
    inputs = replace(inputs, x=inputs.x * 1e-22, weight=None, bias=None)
    outputs = run(inputs)
    rows = inputs.x.double()
    dims = [d for d in range(rows.dim()) if d != 1]
    var = rows.var(dim=dims, correction=0)
    assert outputs.invstd is not None
    torch.testing.assert_close(outputs.invstd.double(), (var + 1e-44).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 40, 33), (300, 70), (2, 3, 5000)], ids=str)
def test_a_product_of_invstd_and_weight_beyond_float(shape: tuple[int, ...]) -> None:
    # 1e-30 * 1e-20 underflows to 0 in float32, but y is 1e-20.
    inputs = Case("scale_1e30", shape, "float32").inputs()
    assert inputs.weight is not None
    inputs = replace(inputs, weight=inputs.weight * 1e-20, bias=None)
    assert_within(judge_call(inputs, run(inputs)), str(shape))


# ---- state ----


@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
@pytest.mark.parametrize("shape", [(16, 5, 8, 8), (64, 5), (1024, 70)], ids=str)
def test_running_statistics_and_counter_to_the_bit(shape: tuple[int, ...], dtypes: tuple[str, str]) -> None:
    # Alternating integers center + width and center - width: every sum is exact, and so is the sum of any even number
    # of elements, so the float64 formulas have one possible result.
    center, width = (torch.randint(1, 9, (1, shape[1], *(1,) * (len(shape) - 2))) for _ in range(2))
    sign = 1 - 2 * (torch.arange(shape[-1]) % 2) if len(shape) > 2 else 1 - 2 * (torch.arange(shape[0]) % 2)[:, None]
    x = (center + sign * width).expand(shape).to(getattr(torch, dtypes[0])).contiguous()
    dtype = getattr(torch, dtypes[1])
    n = x.numel() // shape[1]
    mean_before, var_before = torch.randn(shape[1]).to(dtype), torch.rand(shape[1]).to(dtype)
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.double().mean(dims)
    squares = (x.double() - mean.view(1, -1, *(1,) * (x.dim() - 2))).square().sum(dims)
    for momentum, factor in ((0.1, 0.1), (None, 1 / 8), (0.0, 0.0), (1.0, 1.0)):
        running_mean, running_var = mean_before.clone(), var_before.clone()
        count = torch.tensor(7)
        ops.forward_train(x, None, None, running_mean, running_var, count, momentum, 1e-5)
        assert count.item() == 8
        old = mean_before.double()
        assert torch.equal(running_mean, (old + factor * (mean - old)).to(dtype)), momentum
        old = var_before.double()
        assert torch.equal(running_var, (old + factor * (squares / (n - 1) - old)).to(dtype)), momentum


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_parameters_are_rounded_once(dtype: torch.dtype) -> None:
    """Rounds float64 to nearest: for values next to a tie, rounding through float32 first would land on the tie.

    The tolerance allows a backend to round twice (tolerance.py); this one does not.
    """
    ulp = torch.finfo(dtype).eps * 1024
    half, little = ulp / 2, 2.0**-20
    # Both sides of 1024 + ulp, which is odd: with two roundings, ties go to its even neighbours.
    near = torch.tensor([1024 + half + little, 1024 + 2 * ulp - half - little], dtype=torch.float64)
    near = torch.cat([near, -near])
    expected = (near.sign() * (1024 + ulp)).to(dtype)
    assert not (near.float().to(dtype) == expected).any()

    # Sums of three values, each in its own SIMD lane. x, invstd: 1; mean: 0.
    parts = torch.tensor([[1024, half, little], [1024 + 2 * ulp, -half, -little]])
    grad = torch.zeros(1, 4, 64, dtype=dtype)
    grad[0, :, [0, 33, 50]] = torch.cat([parts, -parts]).to(dtype)
    one, zero = torch.ones(4), torch.zeros(4)
    for training in (True, False):
        gradients = ops.backward(grad, torch.ones_like(grad), one.to(dtype), zero, one, training, False, True, True)
        for sums in gradients[1:]:
            assert sums is not None and sums.dtype == dtype
            assert torch.equal(sums, expected), training

    # Two values whose mean and unbiased variance are both `to`: the running statistics move there from `old`.
    for old, to, target in ((1024.0, 2048.0, near[0]), (1024 + 2 * ulp, 512.0, near[1])):
        width = (to / 2) ** 0.5
        x = torch.tensor([to - width, to + width], dtype=dtype)[:, None].repeat(1, 3)
        running_mean, running_var = (torch.full((3,), old, dtype=dtype) for _ in range(2))
        momentum = float((target - old) / (to - old))
        ops.forward_train(x, None, None, running_mean, running_var, None, momentum, 1e-5)
        assert (running_mean == 1024 + ulp).all() and (running_var == 1024 + ulp).all(), old


def test_outputs_that_are_not_wanted_change_nothing_in_the_others() -> None:
    inputs = Case("offset_1e2", (5, 9, 35), "float32").inputs()
    assert inputs.weight is not None
    _, mean, invstd, _ = ops.forward_train(inputs.x, inputs.weight, inputs.bias, None, None, None, 0.1, 1e-5)
    for training in (True, False):
        whole = ops.backward(inputs.grad, inputs.x, inputs.weight, mean, invstd, training, True, True, True)
        for mask in range(1, 8):
            wanted = [bool(mask & bit) for bit in (1, 2, 4)]
            some = ops.backward(inputs.grad, inputs.x, inputs.weight, mean, invstd, training, *wanted)
            for asked, part, full in zip(wanted, some, whole):
                assert same_bits(part, full) if asked else part is None
