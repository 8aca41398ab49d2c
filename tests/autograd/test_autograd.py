"""Derivatives: state that backward relies on, needed gradients, all orders and modes. (torch.func: test_func.py)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from derivatives import SHAPES, Function, arguments, assert_gradients_have_tangents, images, pair, trainings
from hardware import PYTHON
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import bnkernels as bnk
from bnkernels import _ops as ops


def gradients(output: Tensor, module: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator(output.device).manual_seed(seed)
    direction = torch.randn(output.shape, device=output.device, dtype=output.dtype, generator=generator)
    return torch.autograd.grad(output, (x, *module.parameters()), direction)


# State


@trainings
def test_backward_uses_its_own_forward(training: bool, device: str) -> None:
    """A forward in the other mode, between a forward and its backward, does not change the gradient.

    torch reads the running statistics again in the backward of an eval forward, and silently computes a wrong gradient
    (pytorch#13402). The end of this test demonstrates it.

    """
    torch_layer, ours = pair(device)
    x, other = images(device), images(device, requires_grad=False) * 3 + 1
    expected = gradients(torch_layer.train(training)(x), torch_layer, x)
    y = ours.train(training)(x)
    for between in (True, False):
        ours.train(between)(other)
    torch.testing.assert_close(gradients(y, ours, x), expected)
    if not training and device == "cpu":
        y = torch_layer(x)
        torch_layer.train()(other)
        assert not torch.allclose(gradients(y, torch_layer, x)[0], expected[0])


@trainings
def test_two_forwards_before_the_backwards(training: bool, device: str) -> None:
    torch_layer, ours = pair(device)
    first, second = images(device), images(device)
    y = [ours.train(training)(x) for x in (first, second)]
    z = [torch_layer.train(training)(x) for x in (first, second)]
    for index, x in ((1, second), (0, first)):
        torch.testing.assert_close(gradients(y[index], ours, x), gradients(z[index], torch_layer, x))


@contextmanager
def one_process() -> Iterator[None]:
    """A process group with this process only. In memory and with a timeout, so that a failure cannot hang."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_forwards_under_ddp() -> None:
    """DDP broadcasts the buffers in place before every forward, so a backward that reads them sees those of the
    second."""
    torch_layer, ours = pair("cpu")
    first, second = images("cpu"), images("cpu")
    results = []
    with one_process():
        # torch 2.11's layer cannot do this: its saved running statistics have been modified in place. With one process
        # the broadcast changes no value, so its result without DDP is the expected one.
        for module, call in ((ours, nn.parallel.DistributedDataParallel(ours)), (torch_layer, torch_layer)):
            (call(first) * call(second)).square().sum().backward()
            results.append([*(p.grad for p in module.parameters()), *module.buffers(), first.grad, second.grad])
            first.grad = second.grad = None
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpoint(use_reentrant: bool, device: str) -> None:
    """The recomputed forward gives the same gradient; the statistics are updated twice, as in torch."""
    torch_layer, ours = pair(device)
    results = []
    for module in (ours, torch_layer):
        x = images(device).detach().fill_(0).add_(torch.arange(120, device=device).view(4, 3, 5, 2).sin())
        x.requires_grad_()
        y: Any = checkpoint(nn.Sequential(module, nn.ReLU()), x, use_reentrant=use_reentrant)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    torch.testing.assert_close(*results)


@trainings
def test_backward_twice(training: bool, device: str) -> None:
    _, ours = pair(device)
    x = images(device)
    y = ours.train(training)(x)
    first = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y.square().sum(), x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.square().sum(), x)


def test_in_place_changes(device: str) -> None:
    """y may be overwritten (in-place ReLU); x and the weight may not, as they are saved."""
    _, ours = pair(device)
    x = images(device)
    y = ours(x)
    y.relu_()
    y.sum().backward()
    for change in ("x", "weight"):
        hidden = x * 1
        y = ours(hidden)
        with torch.no_grad():
            (hidden if change == "x" else ours.weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("affine", [True, False])
@trainings
def test_saved_for_backward(training: bool, affine: bool, device: str) -> None:
    """Only x, the weight and 2C statistics are saved: no copy of x, whatever its strides."""
    saved: list[Tensor] = []
    ours = bnk.BatchNorm2d(3, affine=affine, device=device).train(training)
    x = torch.randn(4, 3, 5, 2, device=device, requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x)
    assert saved[0] is x or saved[0].data_ptr() == x.data_ptr()
    vectors = [t.shape for t in saved[1:]]
    assert vectors == [(3,)] * (3 if affine else 2)
    if affine:
        assert saved[1].data_ptr() == ours.weight.data_ptr()
    buffers = {b.data_ptr() for b in ours.buffers()}
    assert not buffers & {t.data_ptr() for t in saved}


# Needed gradients


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool, bool]]:
    """The gradients that the kernels are requested for, per call."""
    calls: list[tuple[bool, bool, bool]] = []
    backward = ops.backward

    def spy(*arguments: Any) -> Any:
        calls.append(arguments[6:9])
        return backward(*arguments)

    monkeypatch.setattr(ops, "backward", spy)
    return calls


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@pytest.mark.parametrize("create_graph", [False, True], ids=["", "create_graph"])
@trainings
def test_only_needed_gradients(
    needs: tuple[int, int, int],
    create_graph: bool,
    training: bool,
    device: str,
    requested: list[tuple[bool, bool, bool]],
) -> None:
    torch_layer, ours = pair(device)
    x = images(device, requires_grad=bool(needs[0]))
    results = []
    for module in (ours, torch_layer):
        module.weight.requires_grad_(bool(needs[1]))
        module.bias.requires_grad_(bool(needs[2]))
        y = module.train(training)(x)
        assert y.requires_grad == any(needs)
        wanted = [t for t in (x, module.weight, module.bias) if t.requires_grad]
        if wanted:
            results.append(torch.autograd.grad(y.square().sum(), wanted, create_graph=create_graph))
    if not any(needs):
        assert requested == []
        return
    assert requested == [tuple(map(bool, needs))]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@trainings
def test_without_gradients(context: Any, training: bool, device: str) -> None:
    torch_layer, ours = pair(device)
    x = images(device)
    with context():
        y = ours.train(training)(x)
    assert not y.requires_grad and y.is_inference() == (context is torch.inference_mode)
    torch.testing.assert_close(y.clone(), torch_layer.train(training)(x).detach())
    torch.testing.assert_close(dict(ours.named_buffers()), dict(torch_layer.named_buffers()))


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@trainings
def test_statistics_that_require_gradients(which: str, training: bool, device: str) -> None:
    """Statistics have no gradient: an error as in torch instead of a silent zero, before anything is modified."""
    statistics = {"running_mean": torch.zeros(3, device=device), "running_var": torch.ones(3, device=device)}
    statistics[which].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable with respect to running"):
        bnk.batch_norm(images(device, torch.float32), **statistics, training=training)
    assert torch.equal(statistics["running_mean"], torch.zeros(3, device=device))
    with torch.no_grad():
        bnk.batch_norm(images(device, torch.float32), **statistics, training=training)


def test_bias_without_weight_keeps_its_dtype(device: str) -> None:
    x = images(device, torch.float32).bfloat16()
    bias = torch.zeros(3, device=device, dtype=torch.bfloat16, requires_grad=True)
    for create_graph in (False, True):
        y = bnk.batch_norm(x, None, None, None, bias, training=True)
        (gradient,) = torch.autograd.grad(y.sum(), bias, create_graph=create_graph)
        assert gradient.dtype == torch.bfloat16


# Higher orders, other modes


CONFIGURATIONS = ["affine", "no_bias", "no_weight", "plain"]


def function(configuration: str, training: bool, device: str) -> tuple[Function, list[str]]:
    """batch_norm as a function without side effects of x and of the parameters in the configuration."""
    mean, var = (torch.rand(3, dtype=torch.float64, device=device) + 0.5 for _ in range(2))
    names = {"affine": ["weight", "bias"], "no_bias": ["weight"], "no_weight": ["bias"], "plain": []}[configuration]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return bnk.batch_norm(x, mean.clone(), var.clone(), **dict(zip(names, parameters)), training=training, eps=0.1)

    return call, names


@PYTHON
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@trainings
def test_gradcheck(configuration: str, shape: str, training: bool, device: str) -> None:
    """First and second order against finite differences: reverse, forward, forward over reverse, each also batched."""
    call, names = function(configuration, training, device)
    tensors = arguments(shape, names, device)
    assert gradcheck(call, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(call, tensors, check_fwd_over_rev=True, check_batched_grad=True)


@PYTHON
@trainings
def test_third_order(training: bool, device: str) -> None:
    call, names = function("affine", training, device)
    x, *parameters = arguments("2-D", names, device)

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*tensors).pow(3).sum(), tensors, create_graph=True)

    def second(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(t.square().sum() for t in gradient(*tensors)), tensors, create_graph=True)

    assert gradcheck(second, (x, *parameters))


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)][1:], ids=str)
@trainings
def test_double_backward_of_subsets(needs: tuple[int, int, int], training: bool, device: str) -> None:
    """Second gradients of each subset of first gradients, with respect to all inputs, match torch's double backward."""
    torch_layer, ours = pair(device)
    x = images(device)
    results = []
    for module in (ours, torch_layer):
        y = module.train(training)(x)
        direction = torch.linspace(-1, 2, y.numel(), device=device, dtype=y.dtype).view_as(y).requires_grad_()
        everything = (x, module.weight, module.bias)
        wanted = [t for t, need in zip(everything, needs) if need]
        first = torch.autograd.grad(y, wanted, direction, create_graph=True)
        second = torch.autograd.grad(
            sum(t.pow(2).sum() for t in first), (direction, x, module.weight), allow_unused=True
        )
        results.append([*first, *(torch.zeros(()) if t is None else t for t in second)])
    torch.testing.assert_close(*[[t.detach().cpu() if t.dim() else t for t in r] for r in results])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@trainings
def test_create_graph_does_not_change_bits(dtype: torch.dtype, training: bool, device: str) -> None:
    """First gradients come from the kernels, with or without create_graph; second gradients have their dtypes."""
    ours = bnk.BatchNorm2d(3, device=device).train(training)
    x = images(device, torch.float32).detach().to(dtype).requires_grad_()
    leaves = (x, *ours.parameters())
    direction = torch.randn_like(x)
    plain = torch.autograd.grad(ours(x), leaves, direction)
    graph = torch.autograd.grad(ours(x), leaves, direction, create_graph=True)
    for one, other in zip(plain, graph):
        assert torch.equal(one, other)
    second = torch.autograd.grad(sum(t.float().square().sum() for t in graph), (x, ours.weight))
    assert second[0].dtype == dtype and second[1].dtype == torch.float32
    assert second[0].isfinite().all()


@trainings
def test_forward_mode_of_subsets(training: bool, device: str) -> None:
    """Tangents of some arguments, and in the backward of the gradient only."""
    call, names = function("affine", training, device)
    tensors = [t.detach() for t in arguments("4-D", names, device)]
    tangents = [torch.randn_like(t) for t in tensors]
    with forward_ad.dual_level():
        parts = []
        for index in range(3):
            duals = [forward_ad.make_dual(t, d) if i == index else t for i, (t, d) in enumerate(zip(tensors, tangents))]
            parts.append(forward_ad.unpack_dual(call(*duals)).tangent)
        whole = forward_ad.unpack_dual(call(*map(forward_ad.make_dual, tensors, tangents))).tangent
        torch.testing.assert_close(sum(parts), whole)

        leaves = [t.clone().requires_grad_() for t in tensors]
        y = call(*leaves)
        direction, change = torch.randn_like(y), torch.randn_like(y)
        changed = torch.autograd.grad(y, leaves, forward_ad.make_dual(direction, change))
        expected = torch.autograd.grad(call(*leaves), leaves, change)
        torch.testing.assert_close([forward_ad.unpack_dual(t).tangent for t in changed], list(expected))


@trainings
def test_tangents_of_gradient_after_ordinary_forward(training: bool, device: str) -> None:
    """The dual level is entered after the forward, so the backward has to detect it."""
    call, names = function("affine", training, device)
    leaves = arguments("4-D", names, device)
    assert_gradients_have_tangents(call(*leaves), leaves)
