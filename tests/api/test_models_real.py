"""Models as people have them: converted, trained a few steps, stored, loaded by torch alone, and turned back.

Random weights and tiny images; torch's own model is the reference throughout. In float64, so that rounding, which every
layer and every step passes on enlarged, stays far below what a wrong formula or a missed update would change.
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


def norms(model: nn.Module, of: type[nn.Module]) -> int:
    return sum(isinstance(module, of) for module in model.modules())


def trained(model: nn.Module, cell: Cell, device: str) -> list[float]:
    """The losses of a few steps of SGD on batches of two sizes."""
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


def assert_trains_as_torchs(make: Callable[[], nn.Module], cell: Cell, device: str) -> None:
    """Losses, parameters and statistics after training, and predictions after each way back, are torch's."""
    native = make().double().to(device)
    ours = bnk.convert(copy.deepcopy(native))
    assert norms(ours, bnk.BatchNorm2d) == norms(native, nn.BatchNorm2d) > 0

    torch.testing.assert_close(trained(ours, cell, device), trained(native, cell.eager, device))
    torch.testing.assert_close(dict(ours.state_dict()), dict(native.state_dict()))

    x = cell.laid_out(torch.randn(2, *IMAGE, device=device, dtype=torch.float64))
    expected = native.eval()(x)
    torch.testing.assert_close(ours.eval()(x), expected)

    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    plain = make().double().to(device)
    plain.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(plain.eval()(x), expected)

    torch.testing.assert_close(bnk.revert(ours)(x), expected)
    assert norms(ours, bnk.BatchNorm2d) == 0 and norms(ours, nn.BatchNorm2d) == norms(native, nn.BatchNorm2d)


@row("Models", "torchvision ResNet-18: trained, stored, loaded by torch alone, reverted", CELLS)
def test_torchvision(cell: Cell, device: str) -> None:
    assert_trains_as_torchs(torchvision_resnet18, cell, device)


@row("Models", "transformers ResNet: the same", CELLS)
def test_transformers(cell: Cell, device: str) -> None:
    assert_trains_as_torchs(transformers_resnet, cell, device)


@row("Models", "timm ResNet: the same", cells(training=(True,), compiled=(False,)))
def test_timm(cell: Cell, device: str) -> None:
    assert_trains_as_torchs(timm_resnet10t, cell, device)
