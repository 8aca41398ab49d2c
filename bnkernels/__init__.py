"""Batch normalisation kernels for PyTorch: CUDA and CPU, drop-in modules, tested against a float64 reference.

import bnkernels as bnk

model = bnk.convert(model)                                  # replaces every nn.BatchNorm*, in place
model = bnk.fuse(model)                                     # fuses the ReLUs and additions that follow them
layer = bnk.BatchNorm2d(64)                                 # the signature of nn.BatchNorm2d
y = bnk.batch_norm(x, running_mean, running_var, weight, bias, training=True)
print(bnk.explain(x))                                       # the execution plan on a GPU; explain_model: of every layer
"""

from ._ops import build_info, empty_cache
from .convert import ConversionReport, convert, revert
from .explain import explain, explain_model
from .functional import batch_norm
from .fx import FusionReport, fuse, unfuse
from .fx.backend import register_on_import as _register_backends
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct2d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from .running_stats import checkpoint_contexts, no_statistics_update
from .sync import DistributedDataParallel, SyncBatchNorm

_register_backends()

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct2d",
    "ConversionReport",
    "DistributedDataParallel",
    "FusionReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "__version__",
    "batch_norm",
    "build_info",
    "checkpoint_contexts",
    "convert",
    "empty_cache",
    "explain",
    "explain_model",
    "fuse",
    "no_statistics_update",
    "revert",
    "unfuse",
]
