"""fuse() on networks: outputs, gradients and statistics equal the model's, in train and eval mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compatibility import cells, row
from fusing import assert_computes_the_same, fused, prepared
from networks import NETWORKS
from torch import nn

import bnkernels as bnk


@pytest.mark.parametrize(("make", "count"), NETWORKS.values(), ids=NETWORKS)
def test_network(make: Callable[[], nn.Module], count: int) -> None:
    """In float64, with every second layer converted, and every layer in the report."""
    model = prepared(make())
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    result, report = fused(bnk.convert(make(), lambda _, name: norms.index(name) % 2 == 0))
    result.load_state_dict(model.state_dict())
    assert_computes_the_same(result, model, torch.randn(4, 3, 6, 6, dtype=torch.float64))
    assert list(report.outcomes) == norms
    assert len({each.name for each in report.fused}) == count, str(report)


@pytest.mark.parametrize(
    "name",
    [
        "residual",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("U-Net with optional skips", "checkpointed, drop path")),
    ],
)
def test_network_with_inductor(name: str) -> None:
    """Inductor draws other random numbers for drop path, so that one runs in eval mode only."""
    make, count = NETWORKS[name]
    result, report = fused(model := make(), backend="bnkernels_inductor")
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    if "drop" in name:
        torch.testing.assert_close(result.eval()(x), model.eval()(x))
    else:
        assert_computes_the_same(result, model, x)
        assert len({each.name for each in report.fused}) == count, str(report)
    assert report.fused


# Library models. docs/fusion.md has fuse() of the other models of torchvision and timm


def torchvision_resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=5)


def torchvision_densenet() -> nn.Module:
    densenet = pytest.importorskip("torchvision").models.DenseNet
    return densenet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)


def timm_resnet10t() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=5)


@row(
    "Fusion",
    "fuse() of torchvision's and timm's networks",
    cells(channels_last=(False,), compiled=(False,)),
)
@pytest.mark.parametrize(
    ("make", "count"),
    [(torchvision_resnet18, 17), (torchvision_densenet, 10), (timm_resnet10t, 11)],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_library_model(make: Callable[[], nn.Module], count: int) -> None:
    """Every addition and ReLU becomes part of a BatchNorm; the BatchNorms left are residuals."""
    result, report = fused(model := make())
    assert_computes_the_same(result, model, torch.randn(4, 3, 32, 32, dtype=torch.float64))
    assert len(report.fused) == count, str(report)
