"""BatchNormAct2d, and tools that replace its BatchNorm: the activation must survive."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnkernels as bnk


class TorchModel(nn.Module):
    """The same model with torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.act(y)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), bnk.BatchNormAct2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


def pair() -> tuple[Model, TorchModel]:
    plain = TorchModel().double()
    plain(torch.randn(8, 3, 4, 4, dtype=torch.float64) + 1)
    model = Model().double()
    model.load_state_dict(plain.state_dict())
    return model, plain


def images() -> Tensor:
    return torch.randn(4, 3, 5, 5, dtype=torch.float64)


def test_is_batch_norm_and_relu() -> None:
    model, plain = pair()
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x := images()), plain.train(training)(x))
    layer = model.norm
    y = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(y, y), torch.relu(plain.norm(y) + y))
    assert not isinstance(layer, nn.BatchNorm2d) and type(layer.bn) is bnk.BatchNorm2d
    torch.testing.assert_close(bnk.BatchNormAct2d(4, apply_act=False).double()(y), nn.BatchNorm2d(4).double()(y))


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda layer: layer.register_forward_hook(lambda m, i, y: y - 1),
    "forward_pre": lambda layer: layer.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "backward": lambda layer: layer.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "backward_pre": lambda layer: layer.register_full_backward_pre_hook(lambda m, o: (3 * o[0],)),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("layer_name", ["bn", "act"])
def test_submodule_hooks_run(layer_name: str, hook: Callable[[nn.Module], Any]) -> None:
    """Hooks of every kind on either layer change the output and the gradient."""
    model, plain = pair()
    hook(getattr(model.norm, layer_name))
    hook(plain.norm if layer_name == "bn" else plain.act)
    x = images().requires_grad_()
    results = [(y := each(x), *torch.autograd.grad(y.square().sum(), x)) for each in (model, plain)]
    torch.testing.assert_close(*results)


class Doubled(bnk.BatchNorm2d):
    """A subclass with its own forward."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return 2 * super().forward(input, residual)


class DoubledReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


REPLACEMENTS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "BatchNorm subclass": ("bn", lambda: Doubled(4)),
    "torch BatchNorm": ("bn", lambda: nn.BatchNorm2d(4, eps=0.1)),
    "Identity": ("bn", nn.Identity),
    "ReLU subclass": ("act", DoubledReLU),
    "SiLU": ("act", nn.SiLU),
}


@pytest.mark.parametrize(("layer_name", "make"), REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_replaced_submodule_is_called(layer_name: str, make: Callable[[], nn.Module]) -> None:
    """The fused kernel runs only for the submodule classes of the constructor, not for their replacements."""
    model, plain = pair()
    setattr(model.norm, layer_name, layer := make().double())
    setattr(plain, {"bn": "norm", "act": "act"}[layer_name], copy.deepcopy(layer))
    y = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for training in (True, False):
        model.train(training), plain.train(training)
        torch.testing.assert_close(model(x := images()), plain(x))
        torch.testing.assert_close(model.norm(y, y + 1), plain.act(plain.norm(y) + y + 1))


@pytest.mark.parametrize("layer_name", ["bn", "act"])
def test_replaced_forward_is_called(layer_name: str) -> None:
    """Libraries that offload weights or log replace a layer's forward on the instance."""
    model, plain = pair()
    for layer in (getattr(model.norm, layer_name), plain.norm if layer_name == "bn" else plain.act):
        layer.forward = lambda input, forward=layer.forward: 2 * forward(input)
    torch.testing.assert_close(model(x := images()), plain(x))


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_jit_trace_records_aten_batch_norm(residual: bool) -> None:
    """The trace runs without this package, and on other batch sizes."""
    model, plain = (each.eval() for each in pair())
    y = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    traced = torch.jit.trace(model.norm, (y, y) if residual else (y,))
    graph = str(traced.inlined_graph)
    assert "aten::batch_norm" in graph and "bnkernels::" not in graph
    z = torch.randn(5, 4, 2, 2, dtype=torch.float64)
    expected = torch.relu(plain.norm(z) + z if residual else plain.norm(z))
    torch.testing.assert_close(traced(z, z) if residual else traced(z), expected)


def test_unsupported_layers_raise() -> None:
    with pytest.raises(ValueError, match=r"act_layer must be nn\.ReLU"):
        bnk.BatchNormAct2d(4, act_layer=nn.SiLU)
    with pytest.raises(ValueError, match=r"drop_layer None, but got .*ReLU.*, .*Dropout"):
        bnk.BatchNormAct2d(4, drop_layer=nn.Dropout)


BATCH_NORMS = [bnk.BatchNorm1d, bnk.BatchNorm2d, bnk.BatchNorm3d, bnk.SyncBatchNorm, bnk.LazyBatchNorm2d]


@pytest.mark.parametrize("cls", BATCH_NORMS, ids=lambda cls: cls.__name__)
def test_batch_norm_classes_take_no_activation(cls: Any) -> None:
    """Tools that test isinstance(..., _BatchNorm) copy the parameters and buffers, and would lose an activation."""
    arguments = () if "Lazy" in cls.__name__ else (4,)
    with pytest.raises(TypeError, match="unexpected keyword argument 'activation'"):
        cls(*arguments, activation="relu")
    assert issubclass(cls, _BatchNorm) and not issubclass(bnk.BatchNormAct2d, _BatchNorm)


def require_timm() -> None:
    pytest.importorskip("timm", exc_type=ImportError)


def test_signature_matches_timm() -> None:
    require_timm()
    from timm.layers import BatchNormAct2d

    assert list(inspect.signature(bnk.BatchNormAct2d).parameters) == list(inspect.signature(BatchNormAct2d).parameters)


def sync(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def timm_sync(model: nn.Module) -> nn.Module:
    require_timm()
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def timm_freeze(model: nn.Module) -> nn.Module:
    require_timm()
    from timm.utils.model import freeze_batch_norm_2d

    return freeze_batch_norm_2d(model)


def timm_split(model: nn.Module) -> nn.Module:
    require_timm()
    from timm.layers import convert_splitbn_model

    return convert_splitbn_model(model)


def fold_conv_bn(model: nn.Module) -> nn.Module:
    norm = model.norm
    if isinstance(norm, bnk.BatchNormAct2d):
        model.conv, norm.bn = fuse_conv_bn_eval(model.conv, norm.bn), nn.Identity()  # type: ignore[assignment]
    else:
        model.conv, model.norm = fuse_conv_bn_eval(model.conv, norm), nn.Identity()
    return model


def bnk_sync(model: nn.Module) -> nn.Module:
    return bnk.SyncBatchNorm.convert_sync_batchnorm(model)


TOOLS: list[Callable[[nn.Module], nn.Module]] = [sync, bnk_sync, fold_conv_bn, bnk.revert, bnk.convert]
TIMM_TOOLS: list[Callable[[nn.Module], nn.Module]] = [timm_sync, timm_split, timm_freeze]


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("tool", TOOLS + TIMM_TOOLS, ids=lambda tool: tool.__name__)
def test_tools(tool: Callable[[nn.Module], nn.Module], fused: bool) -> None:
    """A tool gives the same result as on torch's layers, also if fuse() produced the model."""
    torch.compiler.reset()
    model, plain = (each.eval() for each in pair())
    if fused:
        model = bnk.fuse(copy.deepcopy(plain))  # type: ignore[assignment]
        model(images())
    x = images()
    torch.testing.assert_close(tool(model).eval()(x), tool(plain).eval()(x))
