"""A small network, its data and its training loop, for one of several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """The basic residual block of He et al. 2015."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
    )


def batches(steps: int, n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64)
        return x, torch.randint(5, (n,), generator=generator)

    return [batch() for _ in range(steps)]


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]], rank: int = 0, ranks: int = 1) -> list[float]:
    """Losses on this rank's part of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, target in data:
        part = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
        loss = F.cross_entropy(model(x[part]), target[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def of_this_rank(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    return train(model, data, dist.get_rank(), dist.get_world_size())
