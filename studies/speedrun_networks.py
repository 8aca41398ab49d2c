"""The networks of cifar_style_speedrun.py: a small ResNet-9 with each kind of BatchNorm, from the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import bnkernels as bnk
from studies.study import FOURTH, THIRD, WITH_BN, WITHOUT_BN

BATCH, VIRTUAL = 256, 32
# Momentum of one update of the running statistics. Ghosts update several times a step; the decay per step is equal.
GHOST_MOMENTUM = 0.1
MOMENTUM = 1 - (1 - GHOST_MOMENTUM) ** (BATCH // VIRTUAL)
LOGIT_SCALE = 0.125


class GhostBatchNorm2d(bnk.BatchNormAct2d):
    """BatchNorm2d over virtual batches, the last of which may be smaller; in evaluation the same as BatchNorm2d.

    With apply_act, the kernel also computes a ReLU.

    Each virtual batch updates the running statistics: n of them with means m_1 .. m_n turn the running mean r, with
    momentum p, into (1 - p)^n r + sum_i p (1 - p)^(n - i) m_i; likewise for the unbiased variances.
    """

    def __init__(self, num_features: int, virtual_batch: int, apply_act: bool = False) -> None:
        super().__init__(num_features, momentum=GHOST_MOMENTUM, apply_act=apply_act)
        self.virtual_batch = virtual_batch

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(x, residual)
        inputs = x.split(self.virtual_batch)
        residuals = [None] * len(inputs) if residual is None else residual.split(self.virtual_batch)
        parts = zip(inputs, residuals)
        return torch.cat([super(GhostBatchNorm2d, self).forward(part, added) for part, added in parts])


Norm = Callable[[int], nn.Module]


def conv_bn_relu(norm: Norm, inputs: int, outputs: int) -> nn.Sequential:
    layer = norm(outputs)
    has_relu = isinstance(layer, bnk.BatchNormAct2d) and isinstance(layer.act, nn.ReLU)
    relu = nn.Identity() if has_relu else nn.ReLU()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), layer, relu)


class Residual(nn.Module):
    def __init__(self, norm: Norm, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_bn_relu(norm, channels, channels), conv_bn_relu(norm, channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)  # type: ignore[no-any-return]


class ScaledLinear(nn.Linear):
    """Scales down the logits; with larger initial logits, training at the learning rates of the speedruns diverges."""

    def forward(self, x: Tensor) -> Tensor:
        return LOGIT_SCALE * super().forward(x)


TORCH_NORM: Norm = partial(nn.BatchNorm2d, momentum=MOMENTUM)
SMALL_BATCH_NORM: Norm = partial(bnk.BatchNorm2d, momentum=GHOST_MOMENTUM)
GHOST_NORM: Norm = partial(GhostBatchNorm2d, virtual_batch=VIRTUAL)
FUSED_GHOST_NORM: Norm = partial(GhostBatchNorm2d, virtual_batch=VIRTUAL, apply_act=True)


def network(norm: Norm, width: int = 16) -> nn.Sequential:
    """ResNet-9 without its last stage: the images have 8x8 pixels."""
    return nn.Sequential(
        conv_bn_relu(norm, 1, width),
        conv_bn_relu(norm, width, 2 * width),
        nn.MaxPool2d(2),
        Residual(norm, 2 * width),
        conv_bn_relu(norm, 2 * width, 4 * width),
        nn.MaxPool2d(2),
        Residual(norm, 4 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        ScaledLinear(4 * width, 10, bias=False),
    )


@dataclass(frozen=True)
class Kind:
    name: str
    layout: torch.memory_format
    colour: str
    style: str

    @property
    def layout_name(self) -> str:
        return "NCHW" if self.layout == torch.contiguous_format else "channels_last"

    def __str__(self) -> str:
        return f"{self.name}, {self.layout_name}"


NN_NCHW, CONVERTED_NCHW, FUSED_NCHW, NN, CONVERTED, FUSED, GHOST, FUSED_GHOST = KINDS = (
    Kind("nn.BatchNorm2d", torch.contiguous_format, WITHOUT_BN, ":"),
    Kind("converted", torch.contiguous_format, WITH_BN, ":"),
    Kind("fused", torch.contiguous_format, FOURTH, ":"),
    Kind("nn.BatchNorm2d", torch.channels_last, WITHOUT_BN, "-"),
    Kind("converted", torch.channels_last, WITH_BN, "-"),
    Kind("fused", torch.channels_last, FOURTH, "-"),
    Kind("ghost", torch.channels_last, THIRD, "-"),
    Kind("fused + ghost", torch.channels_last, THIRD, "--"),
)
GHOST_KINDS = (GHOST, FUSED_GHOST)
CONVERSIONS = ((NN_NCHW, CONVERTED_NCHW), (NN, CONVERTED))
FUSIONS = ((CONVERTED_NCHW, FUSED_NCHW), (CONVERTED, FUSED), (GHOST, FUSED_GHOST))
PAIRS = (*CONVERSIONS, *FUSIONS, (GHOST, CONVERTED))  # pairs whose step times are compared


def model_of(kind: Kind, original: nn.Module) -> nn.Module:
    """The network of a kind, with the weights of the network with nn.BatchNorm2d."""
    if kind in GHOST_KINDS:
        model: nn.Module = network(GHOST_NORM if kind is GHOST else FUSED_GHOST_NORM)
        model.load_state_dict(original.state_dict())
        return model
    model = copy.deepcopy(original)
    if kind.name != "nn.BatchNorm2d":
        model = bnk.convert(model)
    return bnk.fuse(model) if kind.name == "fused" else model
