"""The ops of SyncBatchNorm in one process, which computes the rows of simulate_ranks ranks in a loop.

Values, over the same inputs as BatchNorm in one process; registration, fakes and mutation; argument checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hardware import LARGE
from op_arguments import SYNC_OPS as OPS
from op_arguments import (
    Arguments,
    combine_arguments,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bnkernels import _ops as ops
from bnkernels import testing
from bnkernels.check.ranks import call_in_ranks
from bnkernels.testing import Case, Inputs, Outputs, assert_within, cases, judge_call, same_bits


def simulate_ranks(inputs: Inputs, bounds: list[int]) -> Outputs:
    """call_in_ranks(). Each rank's parameter gradients are its exchanged sums, rounded to the parameters' dtype."""
    outputs = call_in_ranks(inputs, bounds)
    assert outputs.mean is not None and outputs.invstd is not None
    for start, end in pairwise(bounds):
        row, *of_rank = ops.sync_grad_sums(
            inputs.grad[start:end], inputs.x[start:end], inputs.weight, outputs.mean, outputs.invstd, True, True
        )
        of_bias, of_weight = row.view(2, -1)
        for rounded, exact in zip(of_rank, (of_weight, of_bias)):
            limits = torch.finfo(rounded.dtype)
            assert rounded.numel() == (exact.numel() if inputs.weight is not None or rounded is of_rank[1] else 0)
            if rounded.numel() > 0:  # rounded once or twice
                exact = exact.to(rounded.dtype)
                torch.testing.assert_close(rounded, exact, rtol=limits.eps, atol=limits.tiny, equal_nan=True)
    return outputs


def splits(n: int) -> list[list[int]]:
    """One rank; three ranks with uneven batches; ranks without data first, in the middle and last."""
    return [[0, n], [0, n // 3, n - 1, n], [0, 0, n // 2, n // 2, n, n]]


def test_adversarial_inputs(device: str) -> None:
    """The quick grid of training cases, split in three ways, each output within tolerance."""
    judged = 0
    for case in cases("quick"):
        if not case.training or math.prod(case.shape) > 20_000:
            continue
        inputs = case.inputs(device)
        bounds = splits(case.shape[0])[judged % 3]
        assert_within(judge_call(inputs, simulate_ranks(inputs, bounds)), f"{case} {bounds}")
        judged += 1
    assert judged > 200


@pytest.mark.parametrize("changes", [{"momentum": None}, {"num_batches_tracked": None}, {"eps": 1e-30}], ids=str)
def test_settings(changes: Arguments, device: str) -> None:
    inputs = replace(Case.parse("scale_1e-20/9x5x7/float32/contiguous/normal/normal/train").inputs(device), **changes)
    for bounds in splits(9):
        assert_within(judge_call(inputs, simulate_ranks(inputs, bounds)), str(changes))


@LARGE
def test_many_ranks(device: str) -> None:
    """600 ranks with one sample each, two values per channel, and more channels than one CTA combines."""
    inputs = Case.parse("offset_1e4/600x300x2/float32/contiguous/normal/normal/train").inputs(device)
    assert_within(judge_call(inputs, simulate_ranks(inputs, list(range(601)))), "many")


def test_combine_follows_the_order_of_ranks(device: str) -> None:
    """Rows are combined sequentially by Chan's formula in double: another order would give other bits."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(9, 7, generator=generator, dtype=torch.float64) + 0.5
    rows[:, -1] = torch.randint(0, 50, (9,), generator=generator)
    mean, m2, n = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0.0
    for row in rows:
        count = row[-1].item()
        if count:
            delta, fraction = row[:3] - mean, count / (n + count)
            update = (mean + delta * fraction, m2 + (row[3:6] + delta * delta * n * fraction))
            mean, m2 = update if n else (row[:3], row[3:6])
            n += count
    combined = ops.sync_combine(rows.to(device), None, None, None, 0.1, 1e-5, torch.float64)
    exact = 0 if device == "cpu" else 4 * 2.0**-53  # CUDA contracts multiply and add to FMA
    torch.testing.assert_close(combined[0].cpu(), mean, rtol=exact, atol=0)
    torch.testing.assert_close(combined[1].cpu(), (m2 / n + 1e-5).sqrt().reciprocal(), rtol=4 * 2.0**-53, atol=0)
    assert combined[2].item() == n


def test_results_are_written_completely(device: str) -> None:
    """Results do not depend on what the allocated memory held before."""
    inputs = Case.parse("normal/6x33x3/float32/contiguous/normal/normal/train").inputs(device)
    expected = simulate_ranks(inputs, [0, 2, 6])
    with testing.poisoned_allocations():
        poisoned = simulate_ranks(inputs, [0, 2, 6])
    for name in vars(expected):
        assert same_bits(getattr(expected, name), getattr(poisoned, name)), name


# Registration


each_op = pytest.mark.parametrize(("op", "arguments"), OPS.values(), ids=OPS)
INPUTS = {
    "plain": ((4, 3, 5, 2), torch.float32, "contiguous"),
    "channels_last": ((4, 3, 5, 2), torch.bfloat16, "channels_last"),
    "2-D": ((4, 3), torch.float64, "contiguous"),
    "sliced": ((4, 3, 5), torch.float16, "sliced"),
    "no batch": ((0, 3, 5), torch.float32, "contiguous"),
}


@each_op
@pytest.mark.parametrize(("shape", "dtype", "layout"), INPUTS.values(), ids=INPUTS)
def test_opcheck(
    op: Any, arguments: Callable[..., Arguments], shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str
) -> None:
    """Schema (mutation, aliasing), fake tensors, and tracing with static and dynamic shapes."""
    x = testing.lay_out(torch.randn(shape, device=device).to(dtype), layout)
    torch.library.opcheck(op, tuple(arguments(x).values()))


OPTIONAL: dict[str, Arguments] = {
    "combine": {"running_mean": None, "running_var": None, "num_batches_tracked": None},
    "combine_functional": {"running_mean": None, "running_var": None, "num_batches_tracked": None},
    "normalize": {"weight": None, "bias": None},
    "grad_sums": {"weight": None, "need_bias": False},
    "grad_input": {"weight": None},
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_opcheck_without_optional_arguments(name: str, device: str) -> None:
    op, arguments = OPS[name]
    x = torch.randn(4, 3, 5, device=device)
    torch.library.opcheck(op, tuple(arguments(x, **OPTIONAL[name]).values()))


@each_op
def test_fakes_have_the_strides_of_real_outputs(op: Any, arguments: Callable[..., Arguments], device: str) -> None:
    for shape in ((4, 3), (4, 3, 5, 2), (4, 1, 5, 2), (4, 3, 1, 1), (2, 3, 4, 3, 2)):
        for name, layout in testing.LAYOUTS.items():
            if not layout.applies(shape):
                continue
            given = arguments(testing.lay_out(torch.randn(shape, device=device), name))
            real = op(*given.values())
            with FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in given.values()))
            for r, f in zip(*([t] if isinstance(t, Tensor) else t for t in (real, fake))):
                assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device), name


def test_functional_op(device: str) -> None:
    """It returns the bits that the in-place op writes."""
    given = combine_arguments(torch.randn(4, 3, device=device), momentum=None)
    before = {name: t.clone() for name, t in given.items() if isinstance(t, Tensor)}
    *found, mean, var, count = ops.sync_combine_functional(*given.values())
    assert all(same_bits(given[name], t) for name, t in before.items())
    expected = ops.sync_combine(*given.values())
    assert all(same_bits(a, b) for a, b in zip(found, expected))
    for name, updated in (("running_mean", mean), ("running_var", var), ("num_batches_tracked", count)):
        assert same_bits(given[name], updated) and not same_bits(given[name], before[name])
        assert given[name]._version == 1


# Argument errors: each raises, and no argument is written


def bad(op: str, match: str, error: type[Exception] = RuntimeError, **changes: Callable[[Tensor], Any]) -> Any:
    return pytest.param(op, changes, error, match, id=f"{op} {'+'.join(changes)} {match[:24]}")


def of(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.ones(shape, dtype=dtype, device=device or x.device)


DOUBLE = torch.float64
X = (4, 3, 5)
BAD = [
    bad("statistics", "at least 2 dimensions|2 or more", x=of(3)),
    bad("statistics", "eps must be positive", ValueError, eps=lambda x: 0.0),
    bad("combine", "from each rank", rows=of(7, dtype=DOUBLE)),
    bad("combine", "from each rank", rows=of(3, 7)),
    bad("combine", "from each rank", rows=of(3, 8, dtype=DOUBLE)),
    bad("combine", "from each rank", rows=of(0, 7, dtype=DOUBLE)),
    bad("combine", "from each rank", rows=of(3, 1, dtype=DOUBLE)),
    bad("combine", "should contain 3 elements not 4", running_mean=of(4)),
    bad("combine", "should contain 3 elements not 2", running_var=of(2)),
    bad("combine", "dtype", running_mean=of(3, dtype=DOUBLE)),
    bad("combine", "on the input's device", running_mean=of(3, device="meta")),
    bad("combine", "both be None", ValueError, running_mean=lambda x: None),
    bad("combine", "one dtype", dtype=lambda x: torch.bfloat16, running_mean=of(3, dtype=torch.bfloat16)),
    bad("combine", "one int64 value", num_batches_tracked=of(1)),
    bad("combine", "needs num_batches_tracked", num_batches_tracked=lambda x: None, momentum=lambda x: None),
    bad("combine", "eps must be positive", ValueError, eps=lambda x: -1.0),
    bad("combine", "not implemented for", NotImplementedError, dtype=lambda x: torch.int64),
    bad("normalize", "should contain 3 elements not 4", mean=of(4)),
    bad("normalize", "dtype", invstd=of(3, dtype=DOUBLE)),
    bad("normalize", "on the input's device", weight=of(3, device="meta")),
    bad("normalize", "weight should contain 3", weight=of(2)),
    bad("normalize", "bias should contain 3", bias=of(2)),
    bad("normalize", "one dtype", x=lambda x: x.bfloat16(), weight=of(3, dtype=torch.bfloat16)),
    bad("normalize", "one dtype", x=lambda x: x.half(), bias=of(3, dtype=torch.half)),
    bad("grad_sums", "gradient of shape", grad=of(4, 3, 6)),
    bad("grad_sums", "gradient of dtype", grad=of(*X, dtype=DOUBLE)),
    bad("grad_sums", "should contain 3 elements not 1", mean=of(1)),
    bad("grad_sums", "weight should contain 3", weight=of(4)),
    bad("grad_input", "gradient of shape", grad=of(4, 3)),
    bad("grad_input", "should contain 3 elements not 5", invstd=of(5)),
    bad("grad_input", "weight should contain 3", weight=of(4)),
    bad("grad_input", "row of 6 doubles", rows=of(3, 7, dtype=DOUBLE)),
    bad("grad_input", "row of 6 doubles", rows=of(3, 6)),
    bad("grad_input", "row of 6 doubles", rows=of(0, 6, dtype=DOUBLE)),
    bad("grad_input", "rows on", rows=of(3, 6, dtype=DOUBLE, device="meta")),
    bad("grad_input", "count as one double", count=of(2, dtype=DOUBLE)),
    bad("grad_input", "count as one double", count=of(1)),
    bad("grad_input", "count as one double", count=of(1, dtype=DOUBLE, device="meta")),
]


@pytest.mark.parametrize(("op", "changes", "error", "match"), BAD)
def test_bad_arguments(
    op: str, changes: dict[str, Callable[[Tensor], Any]], error: type[Exception], match: str, device: str
) -> None:
    call, arguments = OPS[op]
    x = torch.randn(X, device=device)
    given = arguments(x)
    given |= {name: make(x) for name, make in changes.items()}
    before = {name: t.clone() for name, t in given.items() if isinstance(t, Tensor) and not t.is_meta}
    with pytest.raises(error, match=match):
        call(*given.values())
    assert all(same_bits(given[name], t) for name, t in before.items())
