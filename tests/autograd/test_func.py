"""torch.func: vmap, grad, jvp and their compositions, over functions and modules; ensembles in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import cells, row
from derivatives import Function, arguments, images, pair, trainings
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import bnkernels as bnk
from bnkernels import reference
from bnkernels.autograd import formulas, functions

FUNC = "torch.func"
CONTIGUOUS = cells(compiled=(False,), channels_last=(False,))


def both(training: bool, device: str) -> tuple[tuple[Function, Function], tuple[Tensor, ...]]:
    """This package and the reference (plain torch formulas) as functions of (x, weight, bias).

    Not torch's batch_norm: in training its second derivatives are wrong under torch.func (the Hessian of a function
    of x and the weight is not symmetric), although right with torch.autograd.grad.
    """
    mean, var = (torch.rand(3, dtype=torch.float64, device=device) + 0.5 for _ in range(2))
    statistics = (None, None) if training else (mean, var)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bnk.batch_norm(x, *statistics, weight, bias, training, 0.1, 0.1)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.forward(x, weight, bias, *statistics, None, training, 0.1, 0.1).y

    return (ours, plain), tuple(t.detach() for t in arguments("4-D", ["weight", "bias"], device))


TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, t: grad(lambda *a: f(*a).pow(3).sum(), (0, 1, 2))(*t),
    "vjp": lambda f, t: vjp(f, *t)[1](torch.ones_like(t[0])),
    "jvp": lambda f, t: jvp(f, t, tuple(torch.ones_like(a) * (1 + i) for i, a in enumerate(t))),
    "jacrev": lambda f, t: jacrev(f, (0, 1, 2))(*t),
    "jacfwd": lambda f, t: jacfwd(f, (0, 1, 2))(*t),
    "hessian": lambda f, t: hessian(lambda *a: f(*a).pow(3).sum(), (0, 1))(*t),
    "hessian, reverse twice": lambda f, t: jacrev(jacrev(lambda *a: f(*a).pow(3).sum(), (0, 1)), (0, 1))(*t),
    "grad of grad": lambda f, t: grad(lambda *a: grad(lambda *b: f(*b).pow(3).sum())(*a).square().sum(), (0, 1))(*t),
    "jvp of grad": lambda f, t: jvp(grad(lambda *a: f(*a).pow(3).sum(), (0, 1, 2)), t, t),
    "vmap": lambda f, t: vmap(f, (0, None, None))(torch.stack([t[0], t[0] * 2 + 1]), *t[1:]),
    "vmap, batch at the end": lambda f, t: vmap(f, (-1, 0, None), 1)(
        torch.stack([t[0], t[0].sin()], -1), torch.stack([t[1], t[1] + 1]), t[2]
    ),
    "vmap of the parameters": lambda f, t: vmap(f, (None, 0, 1))(
        t[0], torch.stack([t[1], t[1] + 1]), torch.stack([t[2], t[2] + 1], 1)
    ),
    "vmap of vmap": lambda f, t: vmap(vmap(f, (0, None, None)), (0, 0, None))(
        torch.stack([torch.stack([t[0], t[0].sin()]), torch.stack([t[0].cos(), t[0] + 1])]),
        torch.stack([t[1], t[1] + 1]),
        t[2],
    ),
    "gradient of each example": lambda f, t: vmap(
        grad(lambda x, w, b: f(x, w, b).pow(3).sum(), (0, 1, 2)), (0, None, None)
    )(torch.stack([t[0], t[0].sin()]), *t[1:]),
    "grad of vmap": lambda f, t: grad(lambda x, w, b: vmap(f, (0, None, None))(x, w, b).pow(3).sum(), (0, 1, 2))(
        torch.stack([t[0], t[0].sin()]), *t[1:]
    ),
}


@row(FUNC, "vmap, grad, jvp, vjp, jacrev, jacfwd, hessian, and one within another", CONTIGUOUS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@trainings
def test_transforms(transform: Callable[..., Any], training: bool, device: str) -> None:
    (ours, plain), tensors = both(training, device)
    torch.testing.assert_close(transform(ours, tensors), transform(plain, tensors))


@row(
    FUNC,
    "stack_module_state, functional_call and vmap: an ensemble",
    CONTIGUOUS,
    "K models are one BatchNorm over K*C channels; each has its statistics and its count.",
)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("x_dim", [None, 0, 1, -1], ids=["one input", "an input each", "dimension 1", "at the end"])
@trainings
def test_ensemble(x_dim: int | None, momentum: float | None, training: bool, device: str) -> None:
    """vmap over stacked models: each has its own statistics, updated in place, and its own count.

    The models share one input, like the first layer of an ensemble, or have one each, like the later layers.
    """
    models = [bnk.BatchNorm2d(3, momentum=momentum, device=device, dtype=torch.float64) for _ in range(3)]
    for index, model in enumerate(models):
        for _ in range(index):  # so that the counts differ
            model(images(device))
        model.train(training)
    parameters, buffers = torch.func.stack_module_state(models)
    x = images(device, requires_grad=False)
    each = [x] * 3 if x_dim is None else [x, x.sin() + 1, 2 * x]

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (x,))

    y = vmap(call, (0, 0, x_dim))(parameters, buffers, x if x_dim is None else torch.stack(each, x_dim))
    torch.testing.assert_close(y, torch.stack([model(x) for model, x in zip(models, each)]))
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([dict(m.named_buffers())[name] for m in models]))


def test_gradients_of_a_module(device: str) -> None:
    """torch.func.grad over a module in training updates the statistics once. (torch's own module fails to count.)"""
    torch_layer, ours = pair(device)
    x = images(device, requires_grad=False)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(ours, parameters, (x,)).pow(3).sum()

    got = grad(loss)(dict(ours.named_parameters()))
    torch_layer(x).pow(3).sum().backward()
    torch.testing.assert_close(got, {name: p.grad for name, p in torch_layer.named_parameters()})
    torch.testing.assert_close(dict(ours.named_buffers()), dict(torch_layer.named_buffers()))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (4, 3), (0, 3, 2)], ids=str)
@trainings
def test_plain_formula(shape: tuple[int, ...], momentum: float | None, training: bool, device: str) -> None:
    """The formula of batch_norm that replaces the kernels when a compiler traces a transform matches them."""
    arguments = [torch.rand(3, device=device, dtype=torch.float64) + 0.5 for _ in range(4)]
    x = torch.randn(shape, device=device, dtype=torch.float64)
    results = []
    for formula in (True, False):
        tensors = [t.clone() for t in (x, *arguments)]
        count = torch.tensor(2, device=device)
        x_, weight, bias, mean, var = tensors
        spec = (mean, var, count, training, momentum, 1e-3)
        y = formulas.forward(x_, weight, bias, *spec) if formula else functions.batch_norm(x_, weight, bias, spec)
        results.append([y, *tensors, count])
    torch.testing.assert_close(*results)


def test_tensors_that_escape_a_transform(device: str) -> None:
    """They behave like the tensors they wrap, and gradients flow through them."""
    torch_layer, ours = pair(device)
    results = []
    for module in (ours, torch_layer):
        escaped: list[Tensor] = []
        x = torch.arange(120.0, dtype=torch.float64, device=device).view(4, 3, 5, 2).sin().requires_grad_()
        grad(lambda x, escaped=escaped: (escaped.append(x * 2), x.sum())[1])(x)
        module(escaped[0]).pow(3).sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert results[0][0] is not None
    torch.testing.assert_close(*results)


def test_vmap_examples_cannot_share_statistics(device: str) -> None:
    """Each example would write its own running mean to one buffer: an error, as in torch."""
    ours = bnk.BatchNorm2d(3, device=device)
    with pytest.raises(RuntimeError, match="were not batched"):
        vmap(ours)(torch.randn(2, 4, 3, 5, 2, device=device))
    assert torch.equal(ours.running_mean, torch.zeros(3, device=device)) and ours.num_batches_tracked == 0
    same = vmap(lambda weight: bnk.batch_norm(x, mean, var, weight, training=True))
    x, mean, var = images(device, torch.float32), torch.zeros(3, device=device), torch.ones(3, device=device)
    same(torch.ones(2, 3, device=device))  # all examples normalize one x, which has one mean
    torch.testing.assert_close(mean, 0.1 * x.detach().mean((0, 2, 3)))
