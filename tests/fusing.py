"""What tests of fuse() share: models to fuse, and the comparison of the result with the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bnkernels as bnk

CHANNELS = 4
# A step of a few layers in float64: sums of some hundred terms, taken in another order.
CLOSE = {"rtol": 2.0**-40, "atol": 2.0**-40}

Behind = Callable[[Any, Tensor, Tensor], Any]


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, y: y + 1)
    return module


class Model(nn.Module):
    """A BatchNorm, and what a test puts behind it: behind(model, its result, another value of that shape)."""

    def __init__(self, behind: Behind, norm: nn.Module | None = None) -> None:
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
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        return self.behind(self, self.bn(self.conv(x)), self.skip(x))


def prepared(model: nn.Module) -> nn.Module:
    """In float64, with parameters and statistics that are not a fresh layer's."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith("var") else torch.randn_like(tensor))
    return model.double()


def images() -> Tensor:
    return torch.randn(4, 3, 5, 5, dtype=torch.float64)


def assert_computes_the_same(result: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Two training steps and an evaluation: results, gradients, running statistics. The two must share no state."""
    seen = []
    for each in (result, model):
        inputs = [(x + step).requires_grad_() for step in range(2)]
        ys = [each.train()(input) for input in inputs]
        torch.stack([y.square().mean() for y in ys]).sum().backward()
        grads = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        evaluated = each.eval()(x.clone())
        seen.append((ys, [input.grad for input in inputs], grads, dict(each.named_buffers()), evaluated))
    torch.testing.assert_close(*seen, **CLOSE)


def fused(model: nn.Module) -> tuple[fx.GraphModule, dict[str, str], dict[str, str]]:
    """The fused model, which shares nothing with the model; what was fused, and what was left and why, by name."""
    report = bnk.FusionReport()
    result = bnk.fuse(copy.deepcopy(prepared(model)), report=report)
    return result, {each.name: each.what for each in report.fused}, {each.name: each.reason for each in report.left}


def calls(graph_module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes if node.op.startswith("call")}


RELUS: dict[str, Behind] = {
    "nn.ReLU": lambda m, y, _: m.relu(y),
    "nn.ReLU(inplace=True)": lambda m, y, _: m.relu_in_place(y),
    "F.relu": lambda m, y, _: F.relu(y),
    "F.relu(inplace=True)": lambda m, y, _: F.relu(y, inplace=True),
    "torch.relu": lambda m, y, _: torch.relu(y),
    "torch.relu_": lambda m, y, _: torch.relu_(y),
    "Tensor.relu": lambda m, y, _: y.relu(),
    "Tensor.relu_": lambda m, y, _: y.relu_(),
    "nn.Identity between": lambda m, y, _: m.relu(m.nothing(y)),
}


class Branches(nn.Module):
    """Two BatchNorms that are added: the block of a residual network that changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.skip = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        y += self.skip(x)
        return F.relu(y)
