"""Batch normalisation kernels for PyTorch: CUDA and CPU, drop-in modules, checked against float64.

import bnkernels as bnk

model = bnk.convert(model)                                  # every nn.BatchNorm* of a model, in place
model = bnk.fuse(model)                                     # and the ReLUs and additions that follow them, when it runs
layer = bnk.BatchNorm2d(64)                                 # nn.BatchNorm2d's signature
y = bnk.batch_norm(x, running_mean, running_var, weight, bias, training=True)
print(bnk.explain(x))                                       # how a GPU runs it; explain_model: every layer of a model
"""

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
from .ops import build_info, empty_cache
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
