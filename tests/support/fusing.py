"""Shared by tests of fuse(): models, and the comparison of a fused model with the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkernels as bnk

CHANNELS = 4
# One step of a few layers in float64: sums of some hundred terms, in another order.
CLOSE = {"rtol": 2.0**-38, "atol": 2.0**-38}

After = Callable[[Any, Tensor, Tensor], Any]


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, y: y + 1)
    return module


class Model(nn.Module):
    """A BatchNorm followed by what a test puts after it: after(model, its output, another tensor of that shape)."""

    def __init__(self, after: After, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 1)
        self.bn = norm or nn.BatchNorm2d(CHANNELS)
        self.nothing = nn.Identity()
        self.relu = nn.ReLU()
        self.relu_in_place = nn.ReLU(inplace=True)
        self.relu_with_hook = with_hook(nn.ReLU())
        self.skip = nn.Conv2d(3, CHANNELS, 1)
        self.other_bn = nn.BatchNorm2d(CHANNELS)
        self.offset = nn.Parameter(torch.randn(CHANNELS, 1, 1))
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.bn(self.conv(x)), self.skip(x))


def prepared(model: nn.Module) -> nn.Module:
    """The model in float64, with nontrivial parameters and statistics."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith("var") else torch.randn_like(tensor) / 2)
    return model.double()


def images() -> Tensor:
    return torch.randn(4, 3, 5, 5, dtype=torch.float64)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for each in values for tensor in tensors(each)]


def step(model: nn.Module, x: Tensor, differentiates: bool = True) -> list[Any]:
    """Outputs, gradients of the input and of all parameters, and buffers of one call."""
    model.zero_grad()
    input = x.clone().requires_grad_(differentiates)
    torch.manual_seed(0)  # for dropout
    ys = tensors(model(input * 1) if differentiates else model(input))
    if differentiates:
        torch.stack([y.square().mean() for y in ys if y.requires_grad]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [ys, [y.stride() for y in ys], input.grad, grads, dict(model.named_buffers())]


def assert_computes_the_same(result: nn.Module, model: nn.Module, x: Tensor, differentiates: bool = True) -> None:
    """In train, eval, and train mode with another batch size. The two models must share no state."""
    for training, size in ((True, len(x)), (False, len(x)), (True, len(x) - 1)):
        with torch.set_grad_enabled(differentiates):
            seen = [step(each.train(training), x[:size], differentiates) for each in (result, model)]
        torch.testing.assert_close(*seen, **CLOSE)


def fused(model: nn.Module, **options: Any) -> tuple[nn.Module, bnk.FusionReport]:
    """A fused copy of the model, which shares no state with it, and its report, which fills as the model runs."""
    torch.compiler.reset()
    report = bnk.FusionReport()
    return bnk.fuse(copy.deepcopy(prepared(model)), report=report, **options), report


def whats(report: bnk.FusionReport) -> dict[str, str]:
    return {each.name: each.what for each in report.fused}


def reasons(report: bnk.FusionReport) -> dict[str, str]:
    return {each.name: each.reason for each in report.left}


RELUS: dict[str, After] = {
    "nn.ReLU": lambda m, y, _: m.relu(y),
    "nn.ReLU(inplace=True)": lambda m, y, _: m.relu_in_place(y),
    "F.relu": lambda m, y, _: F.relu(y),
    "F.relu(inplace=True)": lambda m, y, _: F.relu(y, inplace=True),
    "F.relu(y, True)": lambda m, y, _: F.relu(y, True),
    "F.relu(input=y)": lambda m, y, _: F.relu(input=y),
    "torch.relu": lambda m, y, _: torch.relu(y),
    "torch.relu_": lambda m, y, _: torch.relu_(y),
    "Tensor.relu": lambda m, y, _: y.relu(),
    "Tensor.relu_": lambda m, y, _: y.relu_(),
    "nn.Identity between": lambda m, y, _: m.relu(m.nothing(y)),
}


class Branches(nn.Module):
    """The sum of two BatchNorms: the residual block that changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.skip = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        y += self.skip(x)
        return F.relu(y)
