"""BatchNorm followed by an addition, a ReLU or both: one kernel computes the same function as torch's layers.

Values by dtype, layout and distribution are in test_fused_cpu.py and test_simt_fused.py. These tests check what callers
see: gradients of any order, buffers, errors, tracing, and which tensors are saved for the backward.

"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import cells, row
from derivatives import assert_gradients_have_tangents
from hardware import DRIVER, INDUCTOR, PYTHON
from op_arguments import fused_arguments
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import bnkernels as bnk
from bnkernels import _ops as ops
from bnkernels import testing

SHAPE = (4, 3, 5, 2)
each_epilogue = pytest.mark.parametrize(
    ("activation", "adds"), [("relu", False), ("relu", True), (None, True)], ids=["relu", "add+relu", "add"]
)
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def layer(
    activation: str | None, device: str, dtype: torch.dtype = torch.float64, **options: Any
) -> bnk.BatchNormAct2d:
    made = bnk.BatchNormAct2d(SHAPE[1], apply_act=activation is not None, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for tensor in (made.bn.weight, made.bn.bias, made.bn.running_mean):
            if tensor is not None:
                tensor.normal_()  # weights of both signs
    return made


def images(device: str, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def by_torch(fused: bnk.BatchNormAct2d) -> Callable[..., Tensor]:
    """The same layer built from torch's own, with copies of the parameters and buffers."""
    bn = fused.bn
    plain = nn.BatchNorm2d(
        bn.num_features, eps=bn.eps, momentum=bn.momentum, device=bn.weight.device, dtype=bn.weight.dtype
    )
    plain.load_state_dict(bn.state_dict())
    plain.train(fused.training)

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = plain(x)
        y = y if residual is None else y + residual
        return torch.relu(y) if isinstance(fused.act, nn.ReLU) else y

    call.module = plain  # type: ignore[attr-defined]
    return call


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.autograd.grad(y, inputs, torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator))


@each_epilogue
@trainings
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@row("Fusion", "an addition, a ReLU or both after a layer", cells(compiled=(False,)))
def test_matches_torch_layers(activation: str | None, adds: bool, training: bool, layout: str, device: str) -> None:
    """Output, memory format, all gradients, and buffers are those of torch's layers, in float64."""
    fused = layer(activation, device).train(training)
    parts = by_torch(fused)
    x = testing.lay_out(images(device).detach(), layout).requires_grad_()
    residual = testing.lay_out(images(device).detach(), layout).requires_grad_() if adds else None
    inputs = [x, residual] if residual is not None else [x]
    ours, expected = fused(x, residual), parts(x, residual)
    torch.testing.assert_close(ours, expected)
    if layout != "sliced":
        assert ours.stride() == x.stride()
    module = parts.module  # type: ignore[attr-defined]
    torch.testing.assert_close(
        gradients(ours, *inputs, *fused.parameters()), gradients(expected, *inputs, *module.parameters())
    )
    torch.testing.assert_close(dict(fused.bn.state_dict()), dict(module.state_dict()))


@PYTHON
@each_epilogue
@trainings
def test_gradcheck_to_second_order(activation: str | None, adds: bool, training: bool, device: str) -> None:
    """Against finite differences: reverse mode, forward mode (dual level, without torch.func), forward over reverse."""
    fused = layer(activation, device).train(training)

    def function(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        more = residual[0] if residual else None
        mean, var = (None, None) if training else (fused.bn.running_mean, fused.bn.running_var)
        return bnk.batch_norm(x, mean, var, weight, bias, training, residual=more, activation=activation)

    inputs = [images(device), fused.bn.weight, fused.bn.bias, *([images(device)] if adds else [])]
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)
    # gradgradcheck only tests the derivatives of the differentiable backward. Its values come from the kernels.
    by_kernels, differentiable = (
        torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=again) for again in (False, True)
    )
    torch.testing.assert_close(differentiable, by_kernels)


@each_epilogue
@trainings
def test_tangents_of_gradient_after_ordinary_forward(
    activation: str | None, adds: bool, training: bool, device: str
) -> None:
    """The dual level is entered after the forward, so the backward has to detect it."""
    fused = layer(activation, device).train(training)
    inputs = [images(device) for _ in range(2 if adds else 1)]
    assert_gradients_have_tangents(fused(*inputs), [*inputs, *fused.parameters()])


@each_epilogue
@trainings
@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_statistics_that_require_gradients(
    activation: str | None, adds: bool, training: bool, which: str, device: str
) -> None:
    """Rejected as without an epilogue, before anything is modified: running statistics have no gradient."""
    x = images(device)
    statistics = {"running_mean": torch.zeros(3, device=device), "running_var": torch.ones(3, device=device)}
    statistics = {name: tensor.to(x.dtype).requires_grad_(name == which) for name, tensor in statistics.items()}
    options: dict[str, Any] = {"training": training, "residual": x if adds else None, "activation": activation}
    with pytest.raises(RuntimeError, match="not differentiable with respect to running"):
        bnk.batch_norm(x, **statistics, **options)
    assert (statistics["running_mean"] == 0).all() and (statistics["running_var"] == 1).all()
    with torch.no_grad():
        bnk.batch_norm(x, **statistics, **options)


@each_epilogue
@trainings
def test_transforms_match_torch_layers(activation: str | None, adds: bool, training: bool, device: str) -> None:
    """vmap over layers, jvp and jacrev give the derivatives of torch's layers."""
    x, more, tangent = (images(device).detach() for _ in range(3))
    weight, bias = torch.randn(2, SHAPE[1], device=device, dtype=x.dtype)
    statistics = (torch.zeros_like(weight), torch.ones_like(weight))

    def function_of(batch_norm: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def call(x: Tensor, weight: Tensor) -> Tensor:
            mean, var = (None, None) if training else statistics
            if batch_norm is bnk.batch_norm:
                residual = more if adds else None
                return bnk.batch_norm(x, mean, var, weight, bias, training, residual=residual, activation=activation)
            y = batch_norm(x, mean, var, weight, bias, training)
            y = y + more if adds else y
            return torch.relu(y) if activation else y

        return call

    ours, expected = function_of(bnk.batch_norm), function_of(nn.functional.batch_norm)
    for transform in (
        lambda f: torch.func.jvp(lambda x: f(x, weight), (x,), (tangent,)),
        lambda f: torch.func.jacrev(lambda w: f(x, w).sum((0, 2, 3)))(weight),
        lambda f: torch.func.vmap(f)(torch.stack([x, tangent]), torch.stack([weight, -weight])),
    ):
        torch.testing.assert_close(transform(ours), transform(expected))


@pytest.mark.parametrize(
    "change",
    [lambda r: r[:1], lambda r: r[:, :, :1, :1], lambda r: r.float(), lambda r: r[0]],
    ids=["one image", "one pixel", "float32", "no batch"],
)
def test_broadcast_residuals_are_added_by_torch(change: Callable[[Tensor], Tensor], device: str) -> None:
    """Broadcasting and promotion as in torch, and torch's error for sizes that do not match."""
    fused = layer("relu", device)
    parts = by_torch(fused)
    x, residual = images(device), change(images(device).detach()).requires_grad_()
    ours, expected = fused(x, residual), parts(x, residual)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, x, residual), gradients(expected, x, residual))
    with pytest.raises(RuntimeError, match="must match the size"):
        fused(x, torch.zeros(4, 3, 5, 7, device=device, dtype=x.dtype))


def test_unknown_activation_raises() -> None:
    with pytest.raises(ValueError, match="activation must be None or 'relu', but got 'gelu'"):
        bnk.batch_norm(torch.randn(4, 3), None, None, training=True, activation="gelu")


def test_errors_of_ops() -> None:
    """C++ checks reject a residual that does not match x, and relu_bounds that do not come from the forward."""
    x = torch.randn(SHAPE)
    vectors = (None, None, None, None, None)
    for wrong, message in (
        (torch.randn(4, 3, 5), "expected a residual of shape"),
        (x.double(), "expected a residual of dtype Float, but got Double"),
        (x.to("meta"), "expected a residual of .* on cpu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.forward_train(x, *vectors, 0.1, 1e-5, wrong, True)
    _, mean, invstd, relu_bounds = ops.forward_train(x, *vectors, 0.1, 1e-5, None, True)
    for wrong in (relu_bounds[:1], relu_bounds.double(), relu_bounds[:, :2], relu_bounds[0]):
        with pytest.raises(RuntimeError, match=r"expected a relu_bounds of shape \[2, 3\] and dtype Float"):
            ops.backward(x, x, None, mean, invstd, True, True, True, True, wrong)


def test_tensors_saved_for_backward(device: str) -> None:
    """With a ReLU alone, the layer saves x and 4C numbers, where torch also saves y. So y may be overwritten, as by an
    in-place operation, and the gradient is still that of the ReLU."""
    fused, x = layer("relu", device), images(device)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = fused(x)
    assert sum(tensor.numel() for tensor in saved) == x.numel() + fused.bn.weight.numel() + 4 * SHAPE[1]
    expected = gradients(by_torch(fused)(x), x)
    with torch.no_grad():
        y.zero_()
    torch.testing.assert_close(gradients(y, x), expected)


@each_epilogue
def test_needed_gradients(activation: str | None, adds: bool, device: str) -> None:
    """No gradients, or gradients of some of the inputs only."""
    fused = layer(activation, device)
    x, residual = images(device), images(device) if adds else None
    expected = fused(x, residual)
    with torch.no_grad():
        y = fused(x, residual)
    assert testing.same_bits(y, expected.detach()) and not y.requires_grad
    everything = [x, fused.bn.weight, fused.bn.bias, *([residual] if residual is not None else [])]
    every = gradients(fused(x, residual), *everything)
    for chosen in itertools.product([False, True], repeat=len(everything)):
        if not any(chosen):
            continue
        for tensor, needed in zip(everything, chosen):
            tensor.requires_grad_(needed)
        wanted = [tensor for tensor in everything if tensor.requires_grad]
        torch.testing.assert_close(
            gradients(fused(x, residual), *wanted), tuple(grad for grad, needed in zip(every, chosen) if needed)
        )


def on(device: str, inputs: testing.Inputs) -> testing.Inputs:
    """Inputs moved to the device, with their layouts."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return testing.Inputs(*(moved(getattr(inputs, field.name)) for field in dataclasses.fields(inputs)))


@pytest.mark.parametrize("case", list(testing.cases("quick"))[::7], ids=str)
def test_values(case: testing.Case, device: str) -> None:
    """Within tolerance for each dtype, layout and distribution; the backward masks exactly where the forward's ReLU
    did."""
    inputs = case.inputs()
    more = testing.make_residual(inputs)
    for epilogue in (testing.Epilogue(relu=True), testing.Epilogue(more), testing.Epilogue(more, relu=True)):
        i = on(device, case.inputs())  # a fresh copy: the op updates the buffers
        residual = None if epilogue.residual is None else epilogue.residual.to(device)
        if i.training:
            buffers = (i.running_mean, i.running_var, i.num_batches_tracked)
            y, mean, invstd, relu_bounds = ops.forward_train(
                i.x, i.weight, i.bias, *buffers, i.momentum, i.eps, residual, epilogue.relu
            )
        else:
            y, mean, invstd, relu_bounds = ops.forward_eval(
                i.x, i.weight, i.bias, i.running_mean, i.running_var, i.eps, residual, epilogue.relu
            )
        outputs = testing.Outputs(y.cpu(), mean.cpu(), invstd.cpu())
        if epilogue.has_bounds:
            testing.assert_bounds_are_exact(inputs, y.cpu(), *relu_bounds.cpu(), str(case))
            needs = (True, i.weight is not None, True)
            dx, dweight, dbias = ops.backward(i.grad, i.x, i.weight, mean, invstd, i.training, *needs, relu_bounds)
            outputs = dataclasses.replace(
                outputs, dx=dx.cpu(), dweight=None if dweight is None else dweight.cpu(), dbias=dbias.cpu()
            )
        testing.assert_within(testing.judge_fused(inputs, epilogue, outputs), str(case))


class Block(nn.Module):
    """Each epilogue once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = bnk.BatchNormAct2d(SHAPE[1])
        self.second = bnk.BatchNorm2d(SHAPE[1])
        self.third = bnk.BatchNormAct2d(SHAPE[1], momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.third(self.second(y, x), y)  # type: ignore[no-any-return]


@row("Fusion", "the same in one graph (inductor)", cells(compiled=(True,)))
@trainings
@pytest.mark.parametrize("channels_last", [False, True])
@INDUCTOR
def test_compiled(training: bool, channels_last: bool, device: str) -> None:
    """One graph, bitwise equal to eager: output, gradients and buffers, over three steps."""
    torch.compiler.reset()
    eager = Block().to(device).train(training)
    model = copy.deepcopy(eager)
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        x = torch.randn(SHAPE, device=device)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        results = [
            (y.detach(), *gradients(y, x, *module.parameters()))
            for module, y in ((m, f(x.requires_grad_())) for m, f in ((eager, eager), (model, compiled)))
        ]
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()), rtol=0, atol=0)
    assert backend.frame_count == 1
    targets = {str(node.target) for graph in backend.graphs for node in graph.graph.nodes}
    assert not any("relu" in target and "bnkernels" not in target for target in targets), targets


@pytest.mark.parametrize(("adds", "relu"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(adds: bool, relu: bool, dtype: torch.dtype, layout: str, device: str) -> None:
    """Schemas, fakes and tracing of ops with an epilogue."""
    x = testing.lay_out(torch.randn(SHAPE, device=device).to(dtype), layout)
    for op in (ops.train_op, ops.train_functional):
        torch.library.opcheck(op, fused_arguments(x, adds, relu))
    torch.library.opcheck(ops.eval_op, fused_arguments(x, adds, relu, training=False))
    if adds:
        return
    _, mean, invstd, relu_bounds = ops.eval_op(*fused_arguments(x, adds, relu, training=False))
    torch.library.opcheck(
        ops.backward_op, (torch.randn_like(x), x, None, mean, invstd, True, True, True, True, relu_bounds)
    )


def test_empty_batches(device: str) -> None:
    """A batch of 0: empty output, zero gradients, and the batch is counted."""
    fused, x = layer("relu", device), images(device, shape=(0, 3, 5, 2))
    y = fused(x)
    assert y.shape == x.shape and fused.bn.num_batches_tracked == 1
    for grad in gradients(y, x, *fused.parameters()):
        assert (grad == 0).all()


# Modules


@DRIVER
def test_tracers(device: str) -> None:
    """torch.fx records the modules, with the residual and the layers of BatchNormAct2d; torch.jit.trace records aten
    ops."""
    model = Block().to(device).eval()
    graph = torch.fx.symbolic_trace(model)
    calls = [(node.target, len(node.args)) for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == [("first.bn", 1), ("first.act", 1), ("second", 2), ("third.bn", 1), ("third.act", 1)]
    x = torch.randn(SHAPE, device=device)
    torch.testing.assert_close(graph(x), model(x))
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """The kernels take 16-bit inputs with float32 parameters; torch adds a float32 residual to a 16-bit output."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), bnk.BatchNormAct2d(3)).to(device)
    x = torch.randn(SHAPE, device=device)
    with torch.autocast(device, dtype):
        y = model(x)
        wide = model[1](model[0](x), x)
    assert y.dtype == dtype and wide.dtype == torch.float32
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
