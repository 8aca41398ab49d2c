"""Models of torchvision, timm and transformers: converted, trained a few steps, saved, loaded with torch's layers only,
and reverted.

Random weights and tiny images; the torch model is the reference. In float64, so that rounding, which every layer and
step amplifies, stays far below the effect of a wrong formula or a missed update.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import Cell, cells, row
from torch import Tensor, nn

import bnkernels as bnk

CELLS = (
    *cells(training=(True,), compiled=(False,)),
    *cells(training=(True,), compiled=(True,), channels_last=(False,)),
)
STEPS = 3
IMAGE = (3, 32, 32)
CLASSES = 5


def torchvision_resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=CLASSES)


def timm_resnet10t() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=CLASSES)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def transformers_resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    return Logits(transformers.ResNetForImageClassification(config))


def count_norms(model: nn.Module, cls: type[nn.Module]) -> int:
    return sum(isinstance(module, cls) for module in model.modules())


def trained(model: nn.Module, cell: Cell, device: str) -> list[float]:
    """Losses of a few steps of SGD on batches of two sizes."""
    torch.manual_seed(1)
    call: Callable[..., Any] = cell.prepared(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        x = cell.laid_out(torch.randn(4 + 2 * (step % 2), *IMAGE, device=device, dtype=torch.float64))
        target = torch.randint(CLASSES, (len(x),), device=device)
        loss = nn.functional.cross_entropy(call(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_trains_like_torch(make: Callable[[], nn.Module], cell: Cell, device: str) -> None:
    """Losses, parameters and statistics after training equal torch's, and so do predictions after load_state_dict() and
    after revert()."""
    torch_model = make().double().to(device)
    converted = bnk.convert(copy.deepcopy(torch_model))
    assert count_norms(converted, bnk.BatchNorm2d) == count_norms(torch_model, nn.BatchNorm2d) > 0

    torch.testing.assert_close(trained(converted, cell, device), trained(torch_model, cell.eager, device))
    torch.testing.assert_close(dict(converted.state_dict()), dict(torch_model.state_dict()))

    x = cell.laid_out(torch.randn(2, *IMAGE, device=device, dtype=torch.float64))
    expected = torch_model.eval()(x)
    torch.testing.assert_close(converted.eval()(x), expected)

    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    plain = make().double().to(device)
    plain.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(plain.eval()(x), expected)

    torch.testing.assert_close(bnk.revert(converted)(x), expected)
    assert count_norms(converted, bnk.BatchNorm2d) == 0 and count_norms(converted, nn.BatchNorm2d) == count_norms(
        torch_model, nn.BatchNorm2d
    )


@row("Models", "torchvision ResNet-18: trained, saved, loaded with torch's layers only, reverted", CELLS)
def test_torchvision(cell: Cell, device: str) -> None:
    assert_trains_like_torch(torchvision_resnet18, cell, device)


@row("Models", "transformers ResNet: the same", CELLS)
def test_transformers(cell: Cell, device: str) -> None:
    assert_trains_like_torch(transformers_resnet, cell, device)


@row("Models", "timm ResNet: the same", cells(training=(True,), compiled=(False,)))
def test_timm(cell: Cell, device: str) -> None:
    assert_trains_like_torch(timm_resnet10t, cell, device)
