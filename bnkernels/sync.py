"""SyncBatchNorm, and a DistributedDataParallel that accepts it on the CPU."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _LazyNormBase

from .functional import check_residual, sync_batch_norm_tracked, with_epilogue
from .modules import ForwardMixin
from .ranks import Ranks


class SyncBatchNorm(ForwardMixin, nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm for (N, C, *) inputs on CUDA and the CPU, computed by this package's kernels.

    Arguments, attributes, state_dict and errors are those of torch.nn.SyncBatchNorm. In training the statistics are
    computed over the batches of all ranks of `process_group` (default: all processes), with one collective in the
    forward and one in the backward. In eval mode, in a group of one, and if torch.distributed is not initialised, the
    layer is this package's BatchNorm. Dtypes: see batch_norm(). Differences from torch's layer:

    - Inputs may be on the CPU (gloo). torch's DistributedDataParallel rejects that; use this package's.
    - The ranks exchange float64: counts are exact and float64 inputs keep their precision. All ranks get bitwise equal
      statistics. The host never waits for the device, even with momentum=None.
    - N may differ between ranks and may be 0. A single value in total is not an error, because the count is not known
      before the exchange; the running statistics then do not change.
    - It supports double backward, to any order, and torch.compile(fullgraph=True).
    - residual as in BatchNorm2d. When synchronising, torch adds it after the last kernel.

    Raises:
        RuntimeError: a rank did not take part before the process group's timeout. This is the error of the distributed
            backend, or a subclass, with the name of the layer. (NCCL reports timeouts later, outside this call, unless
            TORCH_NCCL_BLOCKING_WAIT is set.)
        NotImplementedError: transforms of torch.func or forward-mode AD in training in a group of two or more.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2; combining statistics: Chan, Golub & LeVeque 1979.
    """

    qualified_name = ""
    """The path in its model, for error messages; set by the functions that convert models, "" if unknown."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and self._is_traced_as_leaf(input.tracer):
            return self._record_call(input, residual)
        if isinstance(input, Tensor):  # a torch.fx Proxy has no dimensions
            self._check_input_dim(input)
            if not input.is_nested:  # the ops reject nested tensors, whose sizes may be undefined
                self._check_non_zero_input_channels(input)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input, residual)
        group: Any = self.process_group if self.process_group is not None else dist.group.WORLD
        size = dist.get_world_size(group)
        if size < 2:  # -1: this rank is not in the group
            return super().forward(input, residual)
        running_mean = running_var = num_batches_tracked = None
        if self.track_running_stats:
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked
        momentum = self.momentum
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0  # no batch count to average by: like torch, leave the statistics unchanged
        if residual is not None:
            check_residual(residual, input, None)
        ranks = Ranks(group, size, self._description())
        y = sync_batch_norm_tracked(
            input, self.weight, self.bias, running_mean, running_var, num_batches_tracked, momentum, self.eps, ranks
        )
        return with_epilogue(y, residual, None)

    def _torch_forward(self, input: Tensor) -> Tensor:
        """torch's forward pass, which raises if it cannot be recorded."""
        return nn.SyncBatchNorm.forward(self, input)

    def _description(self) -> str:
        name = f" '{self.qualified_name}'" if self.qualified_name else ""
        return f"{type(self).__name__}({self.num_features}){name}"

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """torch.nn.SyncBatchNorm.convert_sync_batchnorm(), with this class as the result.

        Converts BatchNorm layers of torch and of this package. Existing SyncBatchNorm layers get the new process group.
        The layers are new objects with the parameters and buffers of the old ones; hooks are not copied.
        (bnkernels.convert() keeps the objects, but converts a torch.nn.SyncBatchNorm only.)

        Args:
            module: a model or a layer.
            process_group: the ranks that share statistics (default: all processes).

        Returns:
            module, or the new layer if module is a BatchNorm layer.

        Raises:
            ValueError: module is a lazy layer whose parameters are not initialised.
        """
        if isinstance(module, _LazyNormBase) and module.has_uninitialized_params():
            raise ValueError(f"{type(module).__name__} has no parameters yet: run a forward pass before converting it")
        converted: nn.Module = super().convert_sync_batchnorm(module, process_group)
        if type(converted) is nn.SyncBatchNorm:
            converted.__class__ = cls
        name_layers(converted)
        return converted


def name_layers(model: nn.Module) -> None:
    """Sets qualified_name of each SyncBatchNorm of a model."""
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm):
            module.qualified_name = name


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch.nn.parallel.DistributedDataParallel that accepts this package's SyncBatchNorm on the CPU.

    torch's class raises ValueError for any SyncBatchNorm instance on the CPU, where torch's own layer cannot run. On
    CUDA both classes behave the same.
    """

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        for layer in module.modules():
            if isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer, SyncBatchNorm):
                super()._passing_sync_batchnorm_handle(layer)
