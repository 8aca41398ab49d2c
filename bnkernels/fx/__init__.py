"""Fuses BatchNorm with the addition and the ReLU that follow it, in the graphs that TorchDynamo captures."""

from .fuse import Fusion, FusionReport, Left, fuse, unfuse

__all__ = ["Fusion", "FusionReport", "Left", "fuse", "unfuse"]
