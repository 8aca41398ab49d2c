"""Shared by tests of derivatives: a pair of modules, images, and function arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import bnkernels as bnk

Function = Callable[..., Tensor]
SHAPES = {"2-D": (5, 3), "4-D": (2, 3, 2, 2), "channels_last": (2, 3, 2, 2)}

trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def pair(device: str, dtype: torch.dtype = torch.float64) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """torch's module and this package's, with equal nontrivial parameters and statistics."""
    torch_layer = nn.BatchNorm2d(3, device=device, dtype=dtype)
    with torch.no_grad():
        for tensor in [*torch_layer.parameters(), *torch_layer.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    ours = bnk.BatchNorm2d(3, device=device, dtype=dtype)
    ours.load_state_dict(torch_layer.state_dict())
    return torch_layer, ours


def images(device: str, dtype: torch.dtype = torch.float64, *, requires_grad: bool = True) -> Tensor:
    return torch.randn(4, 3, 5, 2, device=device, dtype=dtype, requires_grad=requires_grad)


def arguments(shape: str, names: list[str], device: str) -> tuple[Tensor, ...]:
    x = torch.randn(SHAPES[shape], dtype=torch.float64, device=device)
    if shape == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    vectors = [torch.randn(3, dtype=torch.float64, device=device) for _ in names]
    return tuple(t.requires_grad_() for t in (x, *vectors))


def assert_gradients_have_tangents(y: Tensor, leaves: Sequence[Tensor]) -> None:
    """A backward is linear in the gradient of y, so its results' tangents equal its results for the tangent."""
    direction, change = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, change, retain_graph=True)
    with forward_ad.dual_level():
        changed = torch.autograd.grad(y, leaves, forward_ad.make_dual(direction, change))
        tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in changed]
    torch.testing.assert_close(tangents, list(expected))
