"""Small networks, each with a structure that fuse() could get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

C = 4


def conv(inputs: int = C, outputs: int = C, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options)


class UpBlock(nn.Module):
    """An optional skip, selected by its type: MONAI's BasicUNet."""

    def __init__(self, inputs: int = C) -> None:
        super().__init__()
        self.c, self.b = conv(inputs), nn.BatchNorm2d(C)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = F.relu(self.b(self.c(x)))
        return y + skip if isinstance(skip, Tensor) else y


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up, self.last = UpBlock(3), UpBlock(), UpBlock(), UpBlock()

    def forward(self, x: Tensor) -> Tensor:
        top = self.stem(x)
        low = self.down(F.max_pool2d(top, 2))
        return self.last(self.up(F.interpolate(low, size=top.shape[2:]), top))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """torchvision's BasicBlock: one ReLU module used twice, everything in place."""

    def __init__(self, inputs: int = C, outputs: int = C, drop: float = 0.0) -> None:
        super().__init__()
        self.c1, self.b1 = conv(inputs, outputs), nn.BatchNorm2d(outputs)
        self.c2, self.b2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.skip = None
        if inputs != outputs:
            self.skip = nn.Sequential(conv(inputs, outputs), nn.BatchNorm2d(outputs))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.skip is None else self.skip(x)
        y = self.b2(self.c2(self.relu(self.b1(self.c1(x)))))
        if self.drop > 0 and self.training:  # drop path, as in timm
            keep = y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(1 - self.drop)
            y = y * keep / (1 - self.drop)
        y += identity
        return self.relu(y)  # type: ignore[no-any-return]


class Dense(nn.Module):
    """BatchNorm before convolution, over an input that grows by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 2 * i), nn.ReLU(inplace=True), conv(3 + 2 * i, 2)) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Preactivation(nn.Module):
    """The residual is the input of the BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b1, self.b2, self.c1, self.c2 = conv(3), nn.BatchNorm2d(C), nn.BatchNorm2d(C), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.c2(F.relu(self.b2(self.c1(F.relu(self.b1(x))))))
        return x + y


class Chunks(nn.Module):
    """YOLO's C2f: iterates over the chunks of an output and uses all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = conv(3, 2 * C), nn.BatchNorm2d(2 * C)
        self.blocks = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.relu(self.b(self.c(x))).chunk(2, 1))
        y.extend(block(y[-1]) for block in self.blocks)
        return torch.cat(y, 1)


class Heads(nn.Module):
    """An auxiliary head in training only, and a dictionary as the result, as in detection and segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = Residual(3, C), nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU())
        self.dropout = nn.Dropout2d(0.5)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        if targets is not None:
            raise ValueError("no targets are expected")
        y = self.body(x)
        out = {"out": self.dropout(y)}
        if self.training:
            out["aux"] = self.aux(y)
        return out


class Shared(nn.Module):
    """One BatchNorm called twice, one shared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        from bnkernels import BatchNorm2d  # torch's cannot be called twice before its backward

        self.c1, self.c2, self.b, self.relu = conv(3), conv(), BatchNorm2d(C), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.b(self.c1(x)))
        return self.relu(self.b(self.c2(y)) + y)  # type: ignore[no-any-return]


class UsedLater(nn.Module):
    """Residuals and outputs that are used again."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.d, self.e = conv(3), nn.BatchNorm2d(C), conv(), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.b(self.c(x))
        z = F.relu(y)
        w = self.e(self.d(z)) + z
        return y, F.relu(w), w.mean(), z


class Dropped(nn.Module):
    """Functional dropout, with and without self.training as a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = conv(3), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.b(self.c(x))), 0.5, training=self.training)
        return F.dropout(y, 0.25, self.training, True)


class Breaks(nn.Module):
    """Data-dependent control flow: a graph break between the BatchNorm and the ReLU, and inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = Residual(3, C), conv(), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.c(self.a(x)))
        if y.mean().item() > 1e9:
            return y  # type: ignore[no-any-return]
        return F.relu(y)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Residual(3, C, drop=0.3), Residual()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.b, checkpoint(self.a, x, use_reentrant=False), use_reentrant=False)  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    """EfficientNet's block: other activations, a gate on the result, a scaled residual."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.d, self.e = conv(3), nn.BatchNorm2d(C), conv(groups=C), nn.BatchNorm2d(C)
        self.gate, self.scale = nn.Conv2d(C, C, 1), nn.Parameter(torch.ones(C, 1, 1) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.b(self.c(x)))
        z = F.relu(self.e(self.d(y)), inplace=True)
        z = z * torch.sigmoid(self.gate(z.mean((2, 3), keepdim=True)))
        return F.relu(y + z * self.scale)


class BNActivation(nn.BatchNorm2d):
    """A subclass with its own activation, like timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class HookedOutput(nn.Module):
    """A hook stores the output of a BatchNorm, as for a perceptual loss."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = conv(3), nn.BatchNorm2d(C)
        self.stored: list[Tensor] = []
        self.b.register_forward_hook(self.store)

    def store(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.stored[:] = [output]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.relu(self.b(self.c(x))), self.stored[0].square()]


class GeneratorOfBlocks(nn.Module):
    """Blocks from a generator, keyword arguments, and a number among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3), nn.ModuleList(nn.BatchNorm2d(C) for _ in range(3))

    def run(self, x: Tensor) -> Iterator[Tensor]:
        for block in self.blocks:
            x = torch.relu(torch.add(block(input=x), x, alpha=1))
            yield x

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return torch.stack(list(self.run(self.stem(x)))).sum(0) * scale


class Transposed(nn.Module):
    """BatchNorm1d over points, between transposes: inputs that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.b = nn.Linear(3, C), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        points = self.linear(x.flatten(2).transpose(1, 2))
        y = F.relu(self.b(points.transpose(1, 2)) + points.transpose(1, 2))
        return y.max(2).values


class Frozen(nn.Module):
    """A stage that stays in eval mode, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Residual(3, C), Residual()
        for parameter in self.a.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.a.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
        return self.b(y)  # type: ignore[no-any-return]


class Accumulates(nn.Module):
    """An in-place sum over branches, whose first value is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = torch.zeros_like(x)
        first = total
        for norm in self.norms:
            total += norm(x)
        return F.relu(total) + first


class Slices(nn.Module):
    """Writes an output into a part of a buffer that is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = conv(3), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 2 * C, *x.shape[2:])
        y = self.b(self.c(x))
        out[:, :C] = y
        out[:, C:] = F.relu(y)
        return out


class Mixed(nn.Module):
    """autocast inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.d, self.e = conv(3), nn.BatchNorm2d(C), conv(), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(self.c(x)))
        with torch.autocast("cpu", enabled=False):
            z = self.e(self.d(y)) + y
        return F.relu(z)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # The number of layers that are fused, over all graphs
    "optional skip": (lambda: UpBlock(3), 1),
    "U-Net with optional skips": (UNet, 4),
    "residual": (lambda: nn.Sequential(Residual(3, C), Residual()), 4),
    "drop path": (lambda: nn.Sequential(Residual(3, C, 0.5), Residual(C, C, 0.5)), 5),
    "DenseNet": (Dense, 3),
    "pre-activation": (Preactivation, 2),
    "chunks": (Chunks, 4),
    "heads": (Heads, 3),
    "shared BatchNorm and ReLU": (Shared, 1),
    "used later": (UsedLater, 1),
    "dropout": (Dropped, 1),
    "graph breaks": (Breaks, 2),
    "checkpointed, drop path": (Checkpointed, 5),
    "squeeze and excite": (SqueezeExcite, 1),
    "subclass with an activation": (lambda: nn.Sequential(conv(3), BNActivation(C), conv()), 1),
    "hook stores the output": (HookedOutput, 0),
    "generator of blocks": (GeneratorOfBlocks, 3),
    "points": (Transposed, 0),
    "frozen stage": (Frozen, 4),
    "in-place sums": (Accumulates, 0),
    "slices": (Slices, 0),
    "autocast": (Mixed, 1),
}
