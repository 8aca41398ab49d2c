"""batch_norm(): sizes, layouts and arguments that other BatchNorm implementations get wrong.

Values are compared with a float64 reference, within tolerance. Adversarial values are in test_numerics.py.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from hardware import LARGE
from torch import Tensor

import bnkernels as bnk
from bnkernels import _ops as ops
from bnkernels import testing

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def inputs_like(x: Tensor, training: bool, vectors: torch.dtype | None = None, **changes: Any) -> testing.Inputs:
    """A call on x with all optional arguments: a gradient in x's layout, vectors of the given dtype (None: x's)."""
    channels = x.shape[1]

    def uniform() -> Tensor:
        return (torch.rand(channels, device=x.device) + 0.5).to(vectors or x.dtype)

    arguments: dict[str, Any] = {
        "x": x,
        "grad": torch.randn_like(x),
        "weight": uniform(),
        "bias": uniform(),
        "running_mean": uniform(),
        "running_var": uniform(),
        "num_batches_tracked": None,
        "training": training,
        "momentum": 0.1,
        "eps": 1e-5,
    }
    return testing.Inputs(**(arguments | changes))


def call(inputs: testing.Inputs) -> testing.Outputs:
    """Forward and backward of the public function. Tensors keep their layout; the running statistics are copies."""
    x = inputs.x.detach().requires_grad_()
    weight, bias = (None if t is None else t.detach().requires_grad_() for t in (inputs.weight, inputs.bias))
    mean, var = (None if t is None else t.clone() for t in (inputs.running_mean, inputs.running_var))
    assert inputs.momentum is not None
    y = bnk.batch_norm(x, mean, var, weight, bias, inputs.training, inputs.momentum, inputs.eps)
    # autograd.grad() instead of backward(): .grad is given the strides of its tensor.
    leaves = {name: leaf for name, leaf in (("dx", x), ("dweight", weight), ("dbias", bias)) if leaf is not None}
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), inputs.grad)))
    return testing.Outputs(y=y.detach(), running_mean=mean, running_var=var, **gradients)


def check(inputs: testing.Inputs, context: str = "") -> testing.Outputs:
    outputs = call(inputs)
    shape = tuple(inputs.x.shape)
    testing.assert_within(testing.judge_call(inputs, outputs), f"{context} {shape} {inputs.x.dtype}")
    assert outputs.y is not None and outputs.dx is not None
    assert outputs.y.dtype == outputs.dx.dtype == inputs.x.dtype
    for gradient, vector in ((outputs.dweight, inputs.weight), (outputs.dbias, inputs.bias)):
        assert (gradient is None) == (vector is None)
        assert gradient is None or vector is None or gradient.dtype == vector.dtype
    return outputs


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of the results of torch's elementwise functions."""
    return torch._prims_common.suggest_memory_format(x)


def test_signature() -> None:
    ours, expected = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (bnk.batch_norm, torch.nn.functional.batch_norm)
    )
    extra = [(name, inspect.Parameter.KEYWORD_ONLY, None) for name in ("residual", "activation")]
    assert ours == [*expected, *extra]


# Size


SIZES = {
    "N > 65,535": (65_537, 2, 1),
    "N > 131,070": (131_073, 3),
    "N > 880,801": (880_803, 2),
    "N > 65,535, planes": (65_537, 1, 2, 2),
    "C > 65,535": (3, 65_537, 2),
    "C > 65,535, 2-D": (2, 65_539),
    "one channel": (7, 1, 3, 3),
    "two values": (2, 5),
    "two values in a plane": (1, 5, 1, 2),
    "long": (2, 3, 100_003),
    "five dimensions": (2, 3, 5, 4, 3),
    "six dimensions": (2, 3, 2, 2, 3, 2),
}


# Tens of thousands of rows of few elements: as many CTAs or loop iterations.
SLOW = {"C > 65,535", "C > 65,535, 2-D", "N > 65,535, planes"}


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[LARGE] * (name in SLOW)) for name, shape in SIZES.items()], ids=SIZES
)
@trainings
def test_sizes(shape: tuple[int, ...], training: bool, device: str) -> None:
    check(inputs_like(torch.randn(shape, device=device), training))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 3, 0), (4, 0, 2, 2), (0, 0), (4, 3, 2, 0, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@trainings
def test_empty_inputs(shape: tuple[int, ...], dtype: torch.dtype, training: bool, device: str) -> None:
    inputs = inputs_like(torch.randn(shape, device=device, dtype=dtype), training)
    outputs = call(inputs)
    assert outputs.y is not None and outputs.y.shape == shape and outputs.y.dtype == dtype
    assert outputs.dx is not None and outputs.dx.shape == shape
    assert testing.same_bits(outputs.running_mean, inputs.running_mean)
    assert testing.same_bits(outputs.running_var, inputs.running_var)
    for gradient in (outputs.dweight, outputs.dbias):
        assert gradient is not None and testing.same_bits(gradient, torch.zeros_like(gradient))


def test_one_dimension() -> None:
    """torch accepts an empty 1-D input as one without channels (as in its OpInfo); it reads past others."""
    x = torch.randn(0, requires_grad=True)
    y = bnk.batch_norm(x, torch.zeros(0), torch.ones(0), training=True)
    y.sum().backward()
    assert y.shape == (0,) and x.grad is not None
    with pytest.raises(RuntimeError, match="running_mean should contain 0 elements not 3"):
        bnk.batch_norm(x, torch.zeros(3), torch.ones(3))
    for shape in ((3,), ()):
        with pytest.raises(ValueError, match="expected at least 2D input"):
            bnk.batch_norm(torch.randn(shape), torch.zeros(3), torch.ones(3))


def check_repeated_samples(samples: int, width: int, channels_last: bool, device: str) -> None:
    """x repeats one random sample and ends with a different one, so that float64 statistics are cheap.

    bfloat16. x is also the gradient, to save a third huge tensor. Outputs are compared at the first, a middle and the
    last samples.
    """
    channels = 2
    shape = (samples, width, channels) if channels_last else (samples, channels, width)
    x = torch.empty(shape, device=device, dtype=torch.bfloat16)
    usual, last = (torch.randn(shape[1:], device=device).to(x.dtype) + shift for shift in (0, 3))
    x[:-1], x[-1] = usual, last
    x = (x.movedim(-1, 1) if channels_last else x).unsqueeze(2)  # (samples, channels, 1, width)
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    counts, n = (samples - 1, 1), samples * width
    parts = [t.double().T if channels_last else t.double() for t in (usual, last)]

    def mean_of(values: list[Tensor]) -> Tensor:
        return sum(value.sum(1, keepdim=True) * count for value, count in zip(values, counts)) / n

    mean = mean_of(parts)
    invstd = (mean_of([(part - mean).square() for part in parts]) + 1e-5).rsqrt()
    xhat = [(part - mean) * invstd for part in parts]
    correlation = mean_of([part * z for part, z in zip(parts, xhat)])
    places = ((0, 0), (samples // 2, 0), (samples - 2, 0), (samples - 1, 1))

    y, got_mean, got_invstd, _ = ops.forward_train(x, None, None, None, None, None, 0.1, 1e-5)
    torch.testing.assert_close(got_mean.double(), mean[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_invstd.double(), invstd[:, 0], rtol=1e-5, atol=0)
    for index, part in places:
        torch.testing.assert_close(y[index, :, 0].double(), xhat[part], rtol=2**-8, atol=1e-5)
    del y
    dx, _, dbias = ops.backward(x, x, None, got_mean, got_invstd, True, True, False, True)
    assert dx is not None and dbias is not None
    torch.testing.assert_close(dbias.double() / n, mean[:, 0], rtol=1e-5, atol=1e-6)
    for index, part in places:
        expected = invstd * (parts[part] - mean - xhat[part] * correlation)
        torch.testing.assert_close(dx[index, :, 0].double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_repeated_samples(channels_last: bool, device: str) -> None:
    """test_more_than_2_to_the_31_elements at a size that always runs."""
    check_repeated_samples(65, 1 << 10, channels_last, device)


@pytest.mark.huge(gib=10)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_more_than_2_to_the_31_elements(device: str, channels_last: bool) -> None:
    check_repeated_samples((1 << 16) + 1, 1 << 14, channels_last, device)


# Layout


SHAPES = {
    "2-D": (6, 5),
    "3-D": (4, 3, 7),
    "4-D": (4, 6, 5, 7),
    "5-D": (2, 3, 4, 3, 5),
    "N1HW": (4, 1, 5, 7),
    "NC11": (4, 6, 1, 1),
    "NCH1": (4, 6, 5, 1),
    "1CHW": (1, 6, 5, 7),
    "NC1W": (3, 8, 1, 7),
}


def layouts_of(shape: tuple[int, ...]) -> list[str]:
    return [name for name, layout in testing.LAYOUTS.items() if layout.applies(shape)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@trainings
def test_layouts(shape: tuple[int, ...], dtype: torch.dtype, training: bool, device: str) -> None:
    """All pairs of layouts of x and gradient: values within tolerance, in x's memory format, and the same bits for all
    layouts of a format."""
    values, gradient = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)
    plain = inputs_like(values, training, torch.float32, grad=gradient)
    for x_layout in layouts_of(shape):
        x = testing.lay_out(values, x_layout)
        first: testing.Outputs | None = None
        for grad_layout in layouts_of(shape):
            inputs = testing.Inputs(**(vars(plain) | {"x": x, "grad": testing.lay_out(gradient, grad_layout)}))
            outputs = check(inputs, f"x {x_layout}, gradient {grad_layout}")
            assert outputs.y is not None and outputs.dx is not None
            assert outputs.y.is_contiguous(memory_format=memory_format(x)), (x_layout, grad_layout)
            assert outputs.dx.is_contiguous(memory_format=memory_format(x)), (x_layout, grad_layout)
            if first is not None:
                assert testing.same_bits(outputs.dx, first.dx) and testing.same_bits(outputs.dweight, first.dweight)
            first = outputs


def strange_gradients(shape: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """Gradients as autograd makes them: of a sum, a mean over pixels, a crop, a transpose, a concatenation, a flip."""
    n, c, h, w = shape
    return {
        "expanded scalar": torch.randn((), device=device).expand(shape),
        "expanded pixels": torch.randn(n, c, 1, 1, device=device).expand(shape),
        "expanded batch": torch.randn(1, c, h, w, device=device).expand(shape),
        "expanded channels": torch.randn(n, 1, h, w, device=device).expand(shape),
        "sliced": torch.randn(n, c, h + 3, 2 * w, device=device)[:, :, 2:-1, ::2],
        "transposed": torch.randn(n, c, w, h, device=device).transpose(2, 3),
        "permuted": torch.randn(h, c, w, n, device=device).permute(3, 1, 0, 2),
        "part of a concatenation": torch.randn(n, c + 5, h, w, device=device)[:, 3:-2],
    }


@pytest.mark.parametrize("name", strange_gradients((4, 6, 5, 7), "cpu"))
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@trainings
def test_gradients_of_any_strides(name: str, channels_last: bool, training: bool, device: str) -> None:
    shape = (4, 6, 5, 7)
    x = torch.randn(shape, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(inputs_like(x, training, grad=strange_gradients(shape, device)[name]))


@pytest.mark.parametrize("shape", [(5, 37), (3, 5, 33), (3, 5, 7, 9), (4, 16, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@trainings
def test_misaligned_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, training: bool, device: str
) -> None:
    """x, gradient, parameters and statistics aligned only to their element give the same bits as aligned ones.

    On CUDA the order of sums follows the 16-byte vectors of x, so there only the parameters and statistics are
    misaligned for the comparison of bits.
    """
    values = torch.randn(shape, device=device).to(dtype)
    layout = "channels_last" if channels_last and len(shape) > 2 else "contiguous"
    aligned = inputs_like(testing.lay_out(values, layout), training)
    offset = "channels_last_offset" if layout == "channels_last" else "offset"
    moved = {name: testing.lay_out(getattr(aligned, name), offset) for name in ("x", "grad")}
    vectors = {
        name: testing.misaligned(getattr(aligned, name)) for name in ("weight", "bias", "running_mean", "running_var")
    }
    outputs = check(testing.Inputs(**(vars(aligned) | vectors | moved)))
    if device == "cuda":
        outputs = call(testing.Inputs(**(vars(aligned) | vectors)))
    for name, expected in vars(call(aligned)).items():
        assert testing.same_bits(getattr(outputs, name), expected), name


def test_strided_statistics_are_written_back(device: str) -> None:
    """Parameters and statistics may be slices of a larger tensor, whose other elements do not change."""
    wide = torch.rand(4, 8, device=device) + 0.5
    before = wide.clone()
    x = torch.randn(5, 4, 3, device=device)
    inputs = inputs_like(x, True, running_mean=wide[:, 1], running_var=wide[:, 6], weight=wide[:, 2], bias=wide[:, 3])
    expected = check(inputs)
    bnk.batch_norm(x, wide[:, 1], wide[:, 6], wide[:, 2], wide[:, 3], training=True)
    assert testing.same_bits(wide[:, 1], expected.running_mean) and testing.same_bits(wide[:, 6], expected.running_var)
    wide[:, 1], wide[:, 6] = before[:, 1], before[:, 6]
    assert torch.equal(wide, before)


# Arguments


OPTIONAL = [
    pytest.param(weight, bias, statistics, id=f"{weight=:d} {bias=:d} {statistics=:d}")
    for weight in (True, False)
    for bias in (True, False)
    for statistics in (True, False)
]


@pytest.mark.parametrize(("weight", "bias", "statistics"), OPTIONAL)
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5, 2)], ids=str)
@trainings
def test_optional_arguments(
    weight: bool, bias: bool, statistics: bool, shape: tuple[int, ...], training: bool, device: str
) -> None:
    if not statistics and not training:
        pytest.skip("inference needs the running statistics")
    given = {"weight": weight, "bias": bias, "running_mean": statistics, "running_var": statistics}
    changes = {name: None for name, is_given in given.items() if not is_given}
    check(inputs_like(torch.randn(shape, device=device), training, **changes))


@pytest.mark.parametrize(
    "missing", [("running_mean",), ("running_var",), ("running_mean", "running_var")], ids="+".join
)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("adds_residual", [False, True], ids=["", "residual"])
def test_missing_statistics_in_inference_raise(
    missing: tuple[str, ...], activation: str | None, adds_residual: bool, device: str
) -> None:
    """torch's message names the missing statistic, with any residual or activation."""
    x = torch.randn(4, 3, device=device)
    names = ("running_mean", "running_var")
    statistics = {name: None if name in missing else torch.ones(3, device=device) for name in names}
    with pytest.raises(RuntimeError) as expected:
        torch.nn.functional.batch_norm(x, **statistics)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value).splitlines()[0])):
        bnk.batch_norm(x, **statistics, residual=x if adds_residual else None, activation=activation)


@pytest.mark.parametrize(("x_dtype", "vector_dtype"), testing.DTYPE_PAIRS)
@pytest.mark.parametrize("weight", [True, False], ids=["affine", "bias only"])
@trainings
def test_dtypes(x_dtype: str, vector_dtype: str, weight: bool, training: bool, device: str) -> None:
    """Every supported pair of dtypes. The gradients of the parameters have the parameters' dtype."""
    changes = {} if weight else {"weight": None}
    x = torch.randn(4, 6, 5, 3, device=device).to(testing.DTYPES[x_dtype])
    check(inputs_like(x, training, testing.DTYPES[vector_dtype], **changes))


def test_statistics_and_parameters_of_different_dtypes(device: str) -> None:
    x = torch.randn(4, 6, 5, device=device).bfloat16()
    inputs = inputs_like(x, True, torch.float32)
    assert inputs.running_mean is not None and inputs.running_var is not None
    half = {"running_mean": inputs.running_mean.bfloat16(), "running_var": inputs.running_var.bfloat16()}
    check(testing.Inputs(**(vars(inputs) | half)))


@pytest.mark.parametrize("momentum", [0.0, 1.0, -1.2, 0.5])
@pytest.mark.parametrize("eps", [1e-12, 0.5, 1e3])
def test_momentum_and_eps(momentum: float, eps: float, device: str) -> None:
    check(inputs_like(torch.randn(4, 6, 5, device=device), True, momentum=momentum, eps=eps))


def test_eps_zero_in_inference(device: str) -> None:
    check(inputs_like(torch.randn(4, 6, 5, device=device), False, eps=0.0))


@trainings
def test_autocast(training: bool, device: str) -> None:
    """16-bit activations with float32 parameters: no tensor is cast, and a float32 activation stays float32."""
    layer = bnk.BatchNorm2d(6, device=device).train(training)
    conv = torch.nn.Conv2d(3, 6, 1, device=device)
    image = torch.randn(2, 3, 5, 5, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        hidden = conv(image)
        y = layer(hidden)
        float32_output = layer(image.expand(2, 3, 5, 5).repeat(1, 2, 1, 1))
        assert hidden.dtype == y.dtype == torch.bfloat16 and float32_output.dtype == torch.float32
    y.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert layer.running_mean.dtype == torch.float32
    assert conv.weight.grad is not None and conv.weight.grad.isfinite().all()


@trainings
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_non_finite_values_stay_in_their_channel(training: bool, bad: float, channels_last: bool, device: str) -> None:
    values = torch.randn(4, 9, 5, 7, device=device)
    layout = "channels_last" if channels_last else "contiguous"
    clean = inputs_like(testing.lay_out(values, layout), training)
    values[2, 4, 1, 3] = bad
    non_finite = testing.Inputs(**(vars(clean) | {"x": testing.lay_out(values, layout)}))
    outputs, expected = check(non_finite), call(clean)
    others = [channel for channel in range(9) if channel != 4]
    for name, tensor in vars(expected).items():
        if tensor is not None:
            got = getattr(outputs, name)
            got, expected_others = (t[:, others] if t.dim() > 1 else t[others] for t in (got, tensor))
            assert testing.same_bits(got, expected_others), name
