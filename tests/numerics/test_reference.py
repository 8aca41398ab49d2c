"""The reference against independent results: by hand, exact arithmetic, finite differences, torch."""

from __future__ import annotations

import decimal
import math
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from bnkernels import reference

SHAPES = [(6, 3), (5, 4, 7), (3, 2, 4, 5), (2, 3, 2, 3, 4)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    """One channel, x = 1 and 3, eps = 3: mean 2, variance 1, invstd 1/2."""
    x = torch.tensor([[1.0], [3.0]])
    out = reference.forward(
        x,
        weight=torch.tensor([2.0]),
        bias=torch.tensor([10.0]),
        running_mean=torch.tensor([0.0]),
        running_var=torch.tensor([1.0]),
        num_batches_tracked=7,
        momentum=0.25,
        eps=3.0,
    )
    assert out.mean.tolist() == [2.0] and out.var.tolist() == [1.0] and out.invstd.tolist() == [0.5]
    assert out.y.tolist() == [[9.0], [11.0]]
    assert out.running_mean is not None and out.running_var is not None
    assert out.running_mean.tolist() == [0.5]  # 3/4 of 0 and 1/4 of 2
    assert out.running_var.tolist() == [1.25]  # 3/4 of 1 and 1/4 of 2: the unbiased variance
    assert out.num_batches_tracked == 8

    grads = reference.backward(torch.tensor([[1.0], [0.0]]), x, torch.tensor([2.0]), out.mean, out.invstd)
    assert grads.dbias.tolist() == [1.0]
    assert grads.dweight.tolist() == [-0.5]  # xhat = -1/2, 1/2
    assert grads.dx.tolist() == [[0.375], [-0.375]]  # 1 * (1 - 1/2 - 1/8), 1 * (0 - 1/2 + 1/8)

    grads = reference.backward(torch.tensor([[1.0], [0.0]]), x, None, out.mean, out.invstd, training=False)
    assert grads.dx.tolist() == [[0.5], [0.0]]


def test_inference_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    mean, var = torch.tensor([1.0, 4.0]), torch.tensor([4.0, 1.0])
    out = reference.forward(x, running_mean=mean, running_var=var, num_batches_tracked=3, training=False, eps=0.0)
    assert out.y.tolist() == [[0.0, -2.0], [1.0, 2.0]]
    assert out.num_batches_tracked == 3
    assert torch.equal(out.mean, mean.double()) and torch.equal(out.var, var.double())


def test_cumulative_average_is_the_average() -> None:
    """momentum=None: after any number of batches the running statistics are the mean of the batches' statistics."""
    batches = [rand(4, 3, 5, seed=s) for s in range(4)]
    mean, var, count = torch.zeros(3), torch.ones(3), 0  # initial values must not matter
    for x in batches:
        out = reference.forward(x, None, None, mean, var, count, momentum=None)
        mean, var, count = out.running_mean, out.running_var, out.num_batches_tracked
    rows = torch.stack([x.movedim(1, 0).reshape(3, -1) for x in batches])
    torch.testing.assert_close(mean, rows.mean(dim=2).mean(dim=0), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(var, rows.var(dim=2).mean(dim=0), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "both"])
def test_against_torch(shape: tuple[int, ...], training: bool, affine: str) -> None:
    """torch in float64 is an independent implementation, accurate for inputs that are not adversarial."""
    channels = shape[1]
    x = rand(*shape).requires_grad_()
    weight = rand(channels, seed=1).requires_grad_() if affine in ("weight", "both") else None
    bias = rand(channels, seed=2).requires_grad_() if affine in ("bias", "both") else None
    mean, var = rand(channels, seed=3), rand(channels, seed=4).square() + 0.1
    out = reference.forward(x, weight, bias, mean, var, None, training, 0.3, 1e-3)
    grad = rand(*shape, seed=5)
    grads = reference.backward(grad, x, weight, out.mean, out.invstd, training)

    y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3)
    leaves = {"dx": x, "dweight": weight, "dbias": bias}
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    expected = dict(zip(present, torch.autograd.grad(y, list(present.values()), grad)))
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out.y, y, **close)
    torch.testing.assert_close(out.running_mean, mean, **close)  # torch updates these in place in training
    torch.testing.assert_close(out.running_var, var, **close)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(grads, name), value, **close)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_against_differences(shape: tuple[int, ...], training: bool) -> None:
    """backward() is the derivative of forward(): central differences for every element of x, weight and bias."""
    channels = shape[1]
    leaves = [rand(*shape), rand(channels, seed=1), rand(channels, seed=2)]
    mean, var = rand(channels, seed=3), rand(channels, seed=4).square() + 0.1
    grad = rand(*shape, seed=5)

    def loss() -> Tensor:
        return (reference.forward(*leaves, mean, var, None, training).y * grad).sum()

    out = reference.forward(*leaves, mean, var, None, training)
    grads = reference.backward(grad, leaves[0], leaves[1], out.mean, out.invstd, training)
    step = 1e-5
    for leaf, derivative in zip(leaves, (grads.dx, grads.dweight, grads.dbias)):
        numeric = torch.empty_like(leaf)
        flat, out_flat = leaf.view(-1), numeric.view(-1)
        for i in range(flat.numel()):
            value = flat[i].item()
            flat[i] = value + step
            above = loss()
            flat[i] = value - step
            out_flat[i] = (above - loss()) / (2 * step)
            flat[i] = value
        torch.testing.assert_close(derivative, numeric, rtol=1e-6, atol=1e-7)


def test_differentiable() -> None:
    """autograd through forward() equals backward(): forward() is plain torch code, as higher derivatives need."""
    x, weight = rand(4, 3, 5).requires_grad_(), rand(3, seed=1).requires_grad_()
    out = reference.forward(x, weight)
    grad = rand(4, 3, 5, seed=2)
    dx, dweight = torch.autograd.grad(out.y, (x, weight), grad)
    grads = reference.backward(grad, x, weight, out.mean, out.invstd)
    torch.testing.assert_close(grads.dx, dx, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads.dweight, dweight, rtol=1e-13, atol=1e-13)


def exact(values: list[float], eps: float) -> tuple[Decimal, Decimal, list[Decimal]]:
    """mean, variance and xhat in 80 digits: floats are finite decimals, so only divisions and the root round."""
    numbers = [Decimal(v) for v in values]
    mean = sum(numbers, Decimal(0)) / len(numbers)
    var = sum(((v - mean) ** 2 for v in numbers), Decimal(0)) / len(numbers)
    invstd = 1 / (var + Decimal(eps)).sqrt()
    return mean, var, [(v - mean) * invstd for v in numbers]


@pytest.mark.parametrize(
    ("name", "x", "tolerance"),
    [
        # The condition number k = rms/std amplifies float64's 1e-16; the tolerance leaves a factor of 10.
        ("normal", lambda z: z, 1e-14),
        ("mean/std 1e6", lambda z: 1e6 + z, 1e-9),
        ("mean/std 3e5, negative", lambda z: -300 + 1e-3 * z, 1e-9),
        ("one outlier", lambda z: torch.cat([z[:-1], torch.tensor([-1e6])]), 1e-14),
        ("1e30 z", lambda z: 1e30 * z, 1e-14),
        ("1e-30 z", lambda z: 1e-30 * z, 1e-14),
        ("subnormal", lambda z: 1e-40 * z, 1e-14),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_accuracy_against_exact_arithmetic(name: str, x: object, tolerance: float) -> None:
    assert callable(x)
    values = x(rand(1000).float()).float()
    out = reference.forward(values[:, None], eps=1e-5)
    with decimal.localcontext() as context:
        context.prec = 80
        mean, var, xhat = exact(values.tolist(), 1e-5)
        assert abs(Decimal(out.mean.item()) - mean) <= Decimal("1e-15") * sum(abs(Decimal(v)) for v in values.tolist())
        assert abs(Decimal(out.var.item()) - var) <= Decimal(tolerance) * var
        largest = max(abs(v) for v in xhat)
        for got, expected in zip(out.y[:, 0].tolist(), xhat):
            assert abs(Decimal(got) - expected) <= Decimal(tolerance) * largest


def test_low_precision_inputs_are_exact() -> None:
    x = rand(5, 3, 4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = x.to(dtype)
        assert torch.equal(reference.forward(rounded).y, reference.forward(rounded.double()).y)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_do_not_matter(shape: tuple[int, ...]) -> None:
    x, grad = rand(*shape), rand(*shape, seed=1)
    out = reference.forward(x)
    grads = reference.backward(grad, x, None, out.mean, out.invstd)
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = torch.full((*shape[:-1], 2 * shape[-1]), math.nan, dtype=torch.float64)
    sliced = wide[..., ::2].copy_(grad)
    assert torch.equal(reference.forward(turned).y, out.y)
    again = reference.backward(sliced, turned, None, out.mean, out.invstd)
    assert torch.equal(again.dx, grads.dx) and torch.equal(again.dweight, grads.dweight)


def test_arguments_are_not_modified() -> None:
    x, mean, var = rand(4, 3), rand(3, seed=1), torch.ones(3, dtype=torch.float64)
    count = torch.tensor(4)
    copies = [t.clone() for t in (x, mean, var, count)]
    out = reference.forward(x, None, None, mean, var, count)
    assert out.num_batches_tracked == 5
    assert all(torch.equal(a, b) for a, b in zip((x, mean, var, count), copies))


def test_undefined_results_raise() -> None:
    with pytest.raises(ValueError, match="2 values per channel"):
        reference.forward(rand(1, 3))
    with pytest.raises(ValueError, match="num_batches_tracked"):
        reference.forward(rand(4, 3), running_mean=torch.zeros(3), momentum=None)
    with pytest.raises(ValueError, match="running_mean and running_var"):
        reference.forward(rand(4, 3), running_mean=torch.zeros(3), training=False)
    with pytest.raises(ValueError, match=r"expected \(N, C, \*\)"):
        reference.forward(rand(4))
