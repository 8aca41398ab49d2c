"""A fused model is the same object and behaves the same except when called."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fusing import CLOSE, Branches, Model, assert_computes_the_same, fused, images, prepared, whats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnkernels as bnk

ROOT = Path(__file__).resolve().parents[2]


def relu(m: Model, y: Tensor, skip: Tensor) -> Any:
    return m.relu(y)


def test_model_and_state_are_unchanged() -> None:
    model = Branches()
    before, state = (
        list(model.named_modules()),
        {key: id(value) for key, value in model.state_dict(keep_vars=True).items()},
    )
    assert bnk.fuse(model) is model
    assert list(model.named_modules()) == before and type(model) is Branches
    assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == state


@pytest.mark.parametrize("undo", [bnk.unfuse, bnk.revert], ids=["unfuse", "revert"])
def test_undo(undo: Callable[[nn.Module], nn.Module]) -> None:
    """Removes the compiled calls of submodules too."""
    model = nn.Sequential(Branches(), nn.ReLU())
    bnk.fuse(bnk.fuse(model)[0])
    bnk.fuse(model)
    bnk.fuse(model)  # fusing again has no effect
    assert undo(model) is model
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_fused_module_inside_fused_module() -> None:
    result, report = fused(nn.Sequential(model := Branches()))
    bnk.fuse(result[0])  # type: ignore[index]
    assert_computes_the_same(result, nn.Sequential(model), images())
    assert whats(report) == {"0.skip.1": "add + relu"}


def test_more_models_than_the_recompile_limit() -> None:
    """TorchDynamo stops compiling a code object after recompile_limit graphs; models must not share that limit."""
    torch.compiler.reset()
    for channels in range(1, torch._dynamo.config.recompile_limit + 4):
        model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()).double()
        bnk.fuse(model, report=(report := bnk.FusionReport()))(images())
        assert whats(report) == {"1": "relu"}


def test_torch_compile_by_name() -> None:
    for backend in ("bnkernels", "bnkernels_inductor"):
        torch.compiler.reset()
        model = prepared(Branches())
        other = copy.deepcopy(model)
        torch.testing.assert_close(torch.compile(other, backend=backend)(x := images()), model(x), **CLOSE)
        torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), **CLOSE)


def test_import_registers_the_backends() -> None:
    """With either order of imports, and without importing torch._dynamo, which takes seconds."""
    code = {
        "first": "import sys, bnkernels; assert 'torch._dynamo' not in sys.modules; import torch",
        "second": "import torch._dynamo, bnkernels",
    }
    check = "; from torch._dynamo import lookup_backend"
    check += "; assert {'bnkernels', 'bnkernels_inductor'} <= set(torch.compiler.list_backends())"
    check += "; assert lookup_backend('bnkernels').__module__ == 'bnkernels.fx.backend'"
    for each in code.values():
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", each + check], check=True, env=environment, cwd=ROOT)


def test_copies_are_not_fused() -> None:
    """Pickled, copied and saved models are not fused and compute the same."""
    result, _ = fused(model := Branches())
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), torch.load(file, weights_only=False)):
        assert other._compiled_call_impl is None
        assert_computes_the_same(other, copy.deepcopy(model), images())


def test_export() -> None:
    """The README's example: export of a fused and reverted model, without this package; and of a fused one."""
    result, _ = fused(model := Branches())
    bnk.convert(result)
    x = images()
    result(x)
    expected = copy.deepcopy(result).eval()(x)
    for each in (result.eval(), bnk.revert(copy.deepcopy(result))):
        program = torch.export.export(each, (x,))
        torch.testing.assert_close(program.module()(x), expected, **CLOSE)
    assert "bnkernels" not in str(program.graph)
    del model


def test_other_tracers_see_the_model() -> None:
    result, _ = fused(model := Model(relu))
    result.eval(), model.eval()
    x = images()
    calls: list[Callable[[nn.Module], Any]] = [
        lambda m: torch.fx.symbolic_trace(nn.Sequential(m))(x),
        lambda m: torch.func.grad(lambda x: m(x).sum())(x),
        lambda m: torch.func.vmap(m)(x[None]),
        lambda m: torch.func.jvp(m, (x,), (x,)),
        lambda m: torch.func.functional_call(m, {"bn.weight": torch.ones(4, dtype=torch.float64)}, (x,)),
    ]
    for call in calls:
        torch.testing.assert_close(call(result), call(model), **CLOSE)


def test_double_backward() -> None:
    seen = []
    result, _ = fused(model := Branches())
    x = images()
    for each in (result, model):
        input = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(each(input).square().sum(), input, create_graph=True)
        grad.square().sum().backward()
        seen.append([input.grad, [p.grad for p in each.parameters()]])
    torch.testing.assert_close(*seen, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    result, report = fused(model := Branches())
    with mode():
        for training in (True, False):
            torch.testing.assert_close(result.train(training)(x := images()), model.train(training)(x), **CLOSE)
    assert whats(report) == {"skip.1": "add + relu"}


@pytest.mark.parametrize("once", [False, True], ids=["default", "checkpoint_contexts"])
def test_checkpoint_inside(once: bool) -> None:
    """The block is recomputed, and its statistics are updated as often as without fuse()."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = bnk.convert(Branches())

        def forward(self, x: Tensor) -> Tensor:
            contexts: Any = {"context_fn": functools.partial(bnk.checkpoint_contexts, self.block)} if once else {}
            return checkpoint(self.block, x, use_reentrant=False, **contexts)  # type: ignore[no-any-return]

    result, report = fused(model := Checkpointed())
    assert_computes_the_same(result, model, images())
    assert model.get_submodule("block.skip.1").num_batches_tracked == (2 if once else 4)
    assert whats(report) == {"block.skip.1": "add + relu"}


def test_hooks_run() -> None:
    """Forward and backward hooks of the model, of a BatchNorm and of a ReLU."""
    result, _ = fused(model := Model(relu))
    seen: list[list[Any]] = []
    for each in (result, model):
        events: list[Any] = []
        seen.append(events)
        each.register_forward_hook(lambda m, i, y: y * 2)
        each.bn.register_forward_pre_hook(lambda m, i: (i[0] * 3,))
        each.bn.register_full_backward_hook(lambda m, i, o, to=events: to.append(o[0].sum().item()))
    assert_computes_the_same(result, model, images())
    torch.testing.assert_close(*seen, **CLOSE)
    assert len(seen[0]) == 3


def test_lazy() -> None:
    """The first call, which initializes the parameters, is not fused; the next is."""
    torch.compiler.reset()
    report = bnk.FusionReport()
    model = bnk.fuse(nn.Sequential(nn.LazyConv2d(4, 1), bnk.LazyBatchNorm2d(), nn.ReLU()), report=report)
    model(torch.randn(2, 3, 2, 2))
    assert report.fused == [] and type(model[1]) is bnk.BatchNorm2d
    model(torch.randn(2, 3, 2, 2))
    assert whats(report) == {"1": "relu"}


def test_optimizer_continues() -> None:
    model = prepared(Branches())
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, other)]
    for each, optimizer in zip((bnk.fuse(model), other), optimizers):
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            each(images()).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), **CLOSE)


def test_16_bits() -> None:
    """torch's layer with float32 parameters is fused; a sum is rounded once."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    result, report = fused(model)
    x = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16)
    torch.testing.assert_close(result.float()(x), model.float()(x))
    assert whats(report) == {"0": "relu"}
