"""BatchNormAct2d, and the tools that put another layer in the place of a BatchNorm: the activation stays."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnkernels as bnk


class Plain(nn.Module):
    """The same of torch's layers."""

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


def pair() -> tuple[Model, Plain]:
    plain = Plain().double()
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


def test_hooks_of_its_layers_run() -> None:
    model, plain = pair()
    model.norm.bn.register_forward_hook(lambda m, i, y: y - 1)
    plain.norm.register_forward_hook(lambda m, i, y: y - 1)
    torch.testing.assert_close(model(x := images()), plain(x))


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"act_layer must be nn\.ReLU"):
        bnk.BatchNormAct2d(4, act_layer=nn.SiLU)
    layer = bnk.BatchNorm2d(4)
    with pytest.raises(ValueError, match="activation must be None or 'relu', but got 'gelu'"):
        layer.activation = "gelu"
    assert layer.activation is None


def timms() -> None:
    pytest.importorskip("timm", exc_type=ImportError)


def test_arguments_are_timms() -> None:
    timms()
    from timm.layers import BatchNormAct2d

    assert list(inspect.signature(bnk.BatchNormAct2d).parameters) == list(inspect.signature(BatchNormAct2d).parameters)


def sync(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def timm_sync(model: nn.Module) -> nn.Module:
    timms()
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def timm_freeze(model: nn.Module) -> nn.Module:
    timms()
    from timm.utils.model import freeze_batch_norm_2d

    return freeze_batch_norm_2d(model)


def folded(model: nn.Module) -> nn.Module:
    norm = model.norm
    if isinstance(norm, bnk.BatchNormAct2d):
        model.conv, norm.bn = fuse_conv_bn_eval(model.conv, norm.bn), nn.Identity()  # type: ignore[assignment]
    else:
        model.conv, model.norm = fuse_conv_bn_eval(model.conv, norm), nn.Identity()
    return model


TOOLS: list[Callable[[nn.Module], nn.Module]] = [sync, timm_sync, timm_freeze, folded, bnk.revert, bnk.convert]


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_tools(tool: Callable[[nn.Module], nn.Module], fused: bool) -> None:
    """The tool's result is that of torch's layers; and fuse()'s, which the tool then changes, is too."""
    torch.compiler.reset()
    model, plain = (each.eval() for each in pair())
    if fused:
        model = bnk.fuse(copy.deepcopy(plain))  # type: ignore[assignment]
        model(images())
    x = images()
    torch.testing.assert_close(tool(model).eval()(x), tool(plain).eval()(x))
