"""Derivatives of SyncBatchNorm in four gloo processes equal BatchNorm's in one process, to any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from processes import Pool
from test_sync import EVEN, ONE_EMPTY, RANKS, UNEVEN, part_of
from torch import Tensor, nn

import bnkernels as bnk
from bnkernels import reference


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(RANKS, "gloo")
    yield made
    made.close()


def function_of_gradients(x: Tensor, dx: Tensor, dweights: list[Tensor], dbias: Tensor) -> Tensor:
    """A scalar of the gradients. `dweights`: each rank's part of the weight's gradient, with a different weight."""
    numbers = torch.linspace(-1, 2, len(dbias), dtype=x.dtype)
    weighted = sum((rank + 1) * (dweight * numbers).sum() for rank, dweight in enumerate(dweights))
    return (dx.pow(3) + dx * x).sum() + weighted + dbias.sum()


def second_derivatives(x: Tensor, grad: Tensor, bounds: tuple[int, ...]) -> list[Tensor]:
    """Gradients of function_of_gradients() with respect to this rank's x and grad, and its part of the weight's."""
    layer = bnk.SyncBatchNorm(x.shape[1]).double()
    x, grad = (part_of(t, bounds).clone().requires_grad_() for t in (x, grad))
    dx, dweight, dbias = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad, create_graph=True)
    others = [torch.zeros_like(dweight)] * dist.get_rank()
    loss = function_of_gradients(x, dx, [*others, dweight], dbias)
    return [t.detach() for t in torch.autograd.grad(loss, (x, grad, layer.weight))]


@pytest.mark.parametrize("bounds", [EVEN, ONE_EMPTY], ids=["even", "one empty"])
def test_double_backward(pool: Pool, bounds: tuple[int, ...]) -> None:
    """As in one process, by torch's formulas."""
    x, grad = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    parts = pool.run(second_derivatives, x, grad, bounds)
    layer = nn.BatchNorm1d(3).double()
    x.requires_grad_()
    grad.requires_grad_()
    dx, dbias = torch.autograd.grad(layer(x), (x, layer.bias), grad, create_graph=True)
    products = grad * nn.functional.batch_norm(x, None, None, training=True, eps=layer.eps)
    dweights = [products[a:b].sum((0, 2)) for a, b in pairwise(bounds)]
    expected = torch.autograd.grad(function_of_gradients(x, dx, dweights, dbias), (x, grad, layer.weight))
    found = [torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), sum(p[2] for p in parts)]
    torch.testing.assert_close(found, list(expected))


def third_derivative(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = call(x.requires_grad_())
    for _ in range(3):
        (y,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    return y.detach()


def third_derivatives(x: Tensor, bounds: tuple[int, ...]) -> Tensor:
    return third_derivative(bnk.SyncBatchNorm(x.shape[1]).double(), part_of(x, bounds).clone())


def test_third_derivative(pool: Pool) -> None:
    """The sums over ranks in the double backward are themselves differentiated over ranks."""
    x = torch.randn(12, 3, 5, dtype=torch.float64)
    parts = pool.run(third_derivatives, x, UNEVEN)
    expected = third_derivative(lambda x: reference.forward(x, *(None,) * 5, True, 0.1, 1e-5).y, x)
    torch.testing.assert_close(torch.cat(parts), expected)


def transformed(which: str) -> str:
    layer = bnk.SyncBatchNorm(3)
    x = torch.randn(4, 3, 2)
    calls = {
        "vmap": lambda: torch.vmap(layer)(x[:, None]),
        "grad": lambda: torch.func.grad(lambda x: layer(x).sum())(x),
        "jvp": lambda: torch.func.jvp(layer, (x,), (x,)),
    }
    try:
        calls[which]()
    except NotImplementedError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("which", ["vmap", "grad", "jvp"])
def test_transforms_raise(pool: Pool, which: str) -> None:
    for message in pool.run(transformed, which):
        assert message.startswith("SyncBatchNorm(3): transforms of torch.func and forward-mode AD are not supported")
