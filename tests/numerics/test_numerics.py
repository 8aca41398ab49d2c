"""The public API within tolerance of float64 for every distribution, and properties that hold for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hardware import LARGE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bnkernels
from bnkernels import _ops as ops
from bnkernels.check.runner import call, run_case
from bnkernels.testing import (
    DTYPE_PAIRS,
    DTYPES,
    FAMILIES,
    GRADS,
    LAYOUTS,
    WEIGHTS,
    Case,
    Inputs,
    Outputs,
    assert_within,
    cases,
    judge_call,
    same_bits,
    shapes,
)

OUTPUTS = ("y", "running_mean", "running_var", "dx", "dweight", "dbias")
QUICK = list(cases("quick"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
PAIRS = pytest.mark.parametrize(("dtype", "parameters"), DTYPE_PAIRS, ids=["+".join(p) for p in DTYPE_PAIRS])


def check(case: Case, device: str) -> None:
    result = run_case(case, torch.device(device))
    assert not result.problems, f"{case}: {'; '.join(result.problems)}"
    assert_within(list(result.ours), str(case))


def outputs_of(inputs: Inputs) -> Outputs:
    return call(bnkernels.batch_norm, inputs)


def assert_same(a: Outputs, b: Outputs, context: object, names: tuple[str, ...] = OUTPUTS) -> None:
    for name in names:
        assert same_bits(getattr(a, name), getattr(b, name)), f"{context}: {name} has other bits"


@pytest.mark.parametrize("distribution", list(FAMILIES))
@PAIRS
def test_within_tolerance(device: str, distribution: str, dtype: str, parameters: str) -> None:
    """The quick grid by distribution: tolerance, guard bands, poisoned memory, unmodified inputs, repeatable bits."""
    chosen = [c for c in QUICK if (c.distribution, c.dtype, c.parameters) == (distribution, dtype, parameters)]
    assert chosen or not FAMILIES[distribution].fits(DTYPES[dtype])
    for case in chosen:
        check(case, device)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """A case of any shape with at most 8192 elements; sizes near vector widths and tiles are as likely as others."""
    dtype, parameters = draw(st.sampled_from(DTYPE_PAIRS))
    extent = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)))
    shape = tuple(draw(st.lists(extent, min_size=2, max_size=5)))
    while math.prod(shape) > 8192:
        shape = tuple((s + 1) // 2 for s in shape)
    if math.prod(shape) == shape[1]:
        shape = (2, *shape[1:])
    layouts = [name for name, layout in LAYOUTS.items() if layout.applies(shape)]
    return Case(
        draw(st.sampled_from([name for name, distribution in FAMILIES.items() if distribution.fits(DTYPES[dtype])])),
        shape,
        dtype,
        parameters,
        draw(st.sampled_from(layouts)),
        draw(st.sampled_from(layouts)),
        draw(st.sampled_from(list(GRADS))),
        draw(st.sampled_from(list(WEIGHTS))),
        draw(st.booleans()),
        draw(st.integers(0, 9)),
    )


# A parameter instead of the fixture `device`: hypothesis does not reset function-scoped fixtures between examples.
@pytest.mark.parametrize("where", DEVICES)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=any_case())
def test_any_case_within_tolerance(where: str, case: Case) -> None:
    check(case, where)


@pytest.mark.parametrize("where", DEVICES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=any_case(), order=st.integers(0, 999))
def test_channels_are_independent(where: str, case: Case, order: int) -> None:
    """Permuting the channels permutes the results bit for bit: no channel reads a neighbor, and the order of sums does
    not depend on a channel's position."""
    inputs = case.inputs(where)
    permutation = torch.randperm(case.shape[1], generator=torch.Generator().manual_seed(order))
    index = permutation.to(where)

    def moved(t: Tensor | None, dim: int) -> Tensor | None:
        return None if t is None else t.index_select(dim, index)

    # The copies have the memory format that a call gives its own copies: contiguous or channels_last.
    x = torch.empty_like(call_format(inputs.x)).copy_(inputs.x.index_select(1, index))
    grad = inputs.grad.index_select(1, index)
    shuffled = replace(
        inputs,
        x=x,
        grad=grad,
        **{name: moved(getattr(inputs, name), 0) for name in ("weight", "bias", "running_mean", "running_var")},
    )
    plain = replace(inputs, x=torch.empty_like(call_format(inputs.x)).copy_(inputs.x))
    a, b = outputs_of(plain), outputs_of(shuffled)
    for name in OUTPUTS:
        expected = moved(getattr(a, name), 1 if name in ("y", "dx") else 0)
        assert same_bits(getattr(b, name), expected), f"{case}: {name}"


def call_format(x: Tensor) -> Tensor:
    """x, dense in its suggested memory format."""
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


@pytest.mark.parametrize("shape", shapes.QUICK, ids=str)
@PAIRS
def test_layouts_agree(device: str, shape: tuple[int, ...], dtype: str, parameters: str) -> None:
    """Strides with the same suggested memory format give the same bits; on the CPU with any alignment.

    The order of sums may differ between the two memory formats, and on CUDA between alignments, as vectors are 16
    aligned bytes; all are within tolerance (test_within_tolerance).

    """
    for training in (True, False):
        base = Case("offset_1e2", shape, dtype, parameters, training=training)
        made: dict[str, Outputs] = {}
        for layout, arrangement in LAYOUTS.items():
            if not arrangement.applies(shape):
                continue
            inputs = replace(base, layout=layout, grad_layout=layout).inputs(device)
            if device == "cpu" or all(is_aligned(tensor) for tensor in (inputs.x, inputs.grad)):
                made[layout] = outputs_of(inputs)
        for layout, other in made.items():
            like = "channels_last" if layout.startswith("channels_last") else "contiguous"
            assert_same(made[like], other, f"{layout}, training={training}")


def is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_offset", "offset", "sliced"])
def test_bits_do_not_depend_on_gradient_layout(device: str, layout: str) -> None:
    """For x in one memory format, a gradient in any layout gives the bits of a gradient in x's format."""
    base = Case("normal", (3, 20, 5, 7), "bfloat16", "float32", layout)
    expected = outputs_of(base.inputs(device))
    for grad_layout, arrangement in LAYOUTS.items():
        if arrangement.applies(base.shape):
            assert_same(expected, outputs_of(replace(base, grad_layout=grad_layout).inputs(device)), grad_layout)


BITS = [
    Case("cauchy", (8, 64, 14, 14)),
    Case("cauchy", (8, 64, 14, 14), layout="channels_last"),
    Case("cauchy", (2, 5, 2, 3, 5), "float64"),
    Case("cauchy", (65_537, 2), "bfloat16", "float32"),
    Case("cauchy", (1, 3, 250_007), "float16"),
    Case("cauchy", (1, 3, 250_007), layout="channels_last"),
    Case("cauchy", (64, 100), training=False),
]


@pytest.mark.parametrize("case", BITS, ids=str)
def test_bits_do_not_depend_on_threads(case: Case) -> None:
    inputs = case.inputs()
    threads = torch.get_num_threads()
    try:
        given = []
        for count in (1, 2, 3, 8, 1):
            torch.set_num_threads(count)
            given.append(outputs_of(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in given[1:]:
        assert_same(given[0], other, case)


@pytest.mark.cuda
@pytest.mark.parametrize("case", BITS, ids=str)
def test_bits_do_not_depend_on_streams(case: Case) -> None:
    """Also while other streams run the same call."""
    inputs = case.inputs("cuda")
    expected = outputs_of(inputs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    given = []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                given.append(outputs_of(inputs))
    torch.cuda.synchronize()
    for other in given:
        assert_same(expected, other, case)


def scaled(inputs: Inputs, x: float = 1.0, grad: float = 1.0) -> Inputs:
    return replace(inputs, x=inputs.x * x, grad=inputs.grad * grad, eps=inputs.eps * x * x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_powers_of_two_are_exact(device: str, layout: str, dtype: str) -> None:
    """Scaling x and sqrt(eps) by 2^k leaves y unchanged; scaling the gradient by 2^k scales dx by 2^k. No rounding."""
    inputs = Case("lognormal", (5, 33, 7, 3), dtype, layout=layout, weight="normal").inputs(device)
    plain, small, steep = (outputs_of(i) for i in (inputs, scaled(inputs, x=0.25), scaled(inputs, grad=0.5)))
    assert_same(plain, small, "x / 4", ("y", "dweight", "dbias"))
    assert plain.dx is not None and small.dx is not None and steep.dx is not None
    if dtype != "float16":  # float16's subnormals round
        assert same_bits(small.dx, plain.dx * 4) and same_bits(steep.dx, plain.dx / 2)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_negation_is_exact(device: str, dtype: str) -> None:
    """Without a bias, -x gives -y; a negated gradient gives negated gradients."""
    inputs = Case("cauchy", (5, 33, 7, 3), dtype, weight="weight_only").inputs(device)
    plain = outputs_of(inputs)
    turned = outputs_of(replace(inputs, x=-inputs.x))
    assert plain.y is not None and turned.y is not None
    assert torch.equal(turned.y, -plain.y)
    back = outputs_of(replace(inputs, grad=-inputs.grad))
    assert plain.dx is not None and back.dx is not None
    assert torch.equal(back.dx, -plain.dx)


def statistics(name: str, inputs: Inputs) -> Outputs:
    """Calls the ops, which also return the saved statistics."""
    i = inputs
    if i.training:
        running = [t if t is None else t.clone() for t in (i.running_mean, i.running_var, i.num_batches_tracked)]
        y, mean, invstd, _ = ops.forward_train(i.x, i.weight, i.bias, *running, i.momentum, i.eps)
        buffers = Outputs(running_mean=running[0], running_var=running[1], num_batches_tracked=running[2])
    else:
        assert i.running_mean is not None and i.running_var is not None
        y, mean, invstd, _ = ops.forward_eval(i.x, i.weight, i.bias, i.running_mean, i.running_var, i.eps)
        buffers = Outputs()
    dx, dweight, dbias = ops.backward(i.grad, i.x, i.weight, mean, invstd, i.training, True, True, True)
    return replace(buffers, y=y, mean=mean, invstd=invstd, dx=dx, dweight=dweight, dbias=dbias)


@pytest.mark.parametrize("distribution", list(FAMILIES))
@pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0], ids=str)
def test_ops_and_saved_statistics(device: str, distribution: str, momentum: float | None) -> None:
    """The saved mean and invstd, with every momentum, the cumulative average included."""
    for dtype, parameters, layout in (
        ("float64", "float64", "contiguous"),
        ("float32", "float32", "contiguous"),
        ("float32", "float32", "channels_last"),
        ("float16", "float32", "channels_last_offset"),
    ):
        if not FAMILIES[distribution].fits(DTYPES[dtype]):
            continue
        for training in (True, False):
            case = Case(distribution, (6, 20, 5, 7), dtype, parameters, layout, weight="mixed", training=training)
            inputs = replace(case.inputs(device), momentum=momentum)
            error_reports = judge_call(inputs, statistics(distribution, inputs))
            assert len(error_reports) == (9 if training else 6)
            assert_within(error_reports, f"{case} momentum={momentum}")


@pytest.mark.parametrize("distribution", ["one_nan", "one_inf"])
@PAIRS
def test_one_nan_or_inf_reaches_every_statistic(device: str, distribution: str, dtype: str, parameters: str) -> None:
    """Of its channel only, also if a channel is a single tile, which is combined with no other."""
    for shape in ((2, 3, 40), (2, 3, 3000), (70, 3, 35), (2, 3, 5), (5, 3), (70, 40), (40, 3, 3)):
        for layout in ("contiguous", "channels_last"):
            if not LAYOUTS[layout].applies(shape):
                continue
            case = Case(distribution, shape, dtype, parameters, layout)
            inputs = case.inputs(device)
            outputs = statistics(distribution, inputs)
            assert_within(judge_call(inputs, outputs), str(case))
            hit = ~inputs.x.movedim(1, 0).flatten(1).isfinite().all(1)
            assert hit.sum() == 1
            for name in ("mean", "invstd", "running_mean", "running_var"):
                assert torch.equal(getattr(outputs, name).isfinite(), ~hit), f"{case}: {name}"


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_subsets_of_gradients(device: str, needs: tuple[int, int, int], training: bool) -> None:
    """Each gradient has the same bits whether or not others are needed, and unneeded gradients are None.

    On CUDA parameter gradients alone are sums of the two-pass path, as nothing has to stay on chip for them. With the
    input's gradient they come from the persistent kernel, in another order.
    """
    for layout in ("contiguous", "channels_last"):
        i = Case("offset_1e2", (6, 20, 5, 7), layout=layout, training=training).inputs(device)
        mean, invstd = ops.forward_train(i.x, i.weight, i.bias, None, None, None, 0.1, i.eps)[1:3]
        input_too = bool(needs[0]) or device == "cpu"
        every = ops.backward(i.grad, i.x, i.weight, mean, invstd, training, input_too, True, True)
        some = ops.backward(i.grad, i.x, i.weight, mean, invstd, training, *map(bool, needs))
        for wanted, expected, made in zip(needs, every, some):
            assert same_bits(made, expected if wanted else None)


Module = Callable[..., torch.nn.Module]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (bnkernels.BatchNorm1d, (9, 20)),
        (bnkernels.BatchNorm1d, (6, 20, 7)),
        (bnkernels.BatchNorm2d, (4, 20, 5, 7)),
        (bnkernels.BatchNorm3d, (2, 20, 3, 4, 5)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_modules_over_batches(device: str, module: Module, shape: tuple[int, ...], momentum: float | None) -> None:
    """Running statistics over several batches, each step compared from the state before it; then inference."""
    layer = module(20, momentum=momentum).to(device)
    for seed in range(4):
        inputs = Case("offset_1e2", shape, seed=seed, weight="none").inputs(device)
        before = replace(
            inputs,
            weight=layer.weight.detach(),
            bias=layer.bias.detach(),
            running_mean=layer.running_mean.clone(),
            running_var=layer.running_var.clone(),
            num_batches_tracked=layer.num_batches_tracked.clone(),
            momentum=momentum,
        )
        y = layer(inputs.x)
        after = Outputs(
            y=y,
            running_mean=layer.running_mean,
            running_var=layer.running_var,
            num_batches_tracked=layer.num_batches_tracked,
        )
        assert_within(judge_call(before, after), f"batch {seed}")
    layer.eval()
    final = replace(before, running_mean=layer.running_mean, running_var=layer.running_var, training=False)
    assert_within(judge_call(final, Outputs(y=layer(inputs.x))), "inference")


@pytest.mark.slow
@LARGE
@pytest.mark.parametrize("shape", shapes.LARGE, ids=str)
def test_large_shapes(device: str, shape: tuple[int, ...]) -> None:
    """N and C beyond every grid dimension, and shapes of real networks, in both memory formats."""
    for layout in ("contiguous", "channels_last"):
        if LAYOUTS[layout].applies(shape):
            check(Case("offset_1e2", shape, "bfloat16", "float32", layout, grad="near_one"), device)


def huge(device: str, shape: tuple[int, ...], layout: str) -> None:
    case = Case("offset_1e2", shape, "bfloat16", "float32", layout)
    inputs = case.inputs(device)
    assert_within(judge_call(inputs, outputs_of(inputs), device), str(case))


HUGE = pytest.mark.parametrize(
    ("shape", "layout"),
    [*((shape, "contiguous") for shape in shapes.HUGE), (shapes.HUGE[0], "channels_last")],
    ids=str,
)


@pytest.mark.huge(gib=48)
@HUGE
def test_beyond_32_bits(shape: tuple[int, ...], layout: str) -> None:
    huge("cpu", shape, layout)


@pytest.mark.cuda
@pytest.mark.huge(gib=30)
@HUGE
def test_beyond_32_bits_on_the_gpu(shape: tuple[int, ...], layout: str) -> None:
    huge("cuda", shape, layout)
