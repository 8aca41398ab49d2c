"""Fuse the ReLUs and the addition of a residual block into its BatchNorm layers, evaluate it, and export it.

python examples/fuse_and_export.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkernels as bnk


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


torch.manual_seed(0)
model, x = Block(16).eval(), torch.randn(2, 16, 8, 8)
with torch.no_grad():
    expected = model(x)
    report = bnk.FusionReport()
    bnk.fuse(bnk.convert(model), report=report)  # in place
    print(f"fused, largest difference: {(model(x) - expected).abs().max():.1e}")  # the first call captures the graph
    print(report)

    # torch.export traces the unfused layers. A process that loads the program imports bnkernels for its operators.
    program = torch.export.export(model, (x,))
    print(f"exported, largest difference: {(program.module()(x) - expected).abs().max():.1e}")
