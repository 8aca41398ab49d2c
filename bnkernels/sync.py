"""SyncBatchNorm: one BatchNorm over the batches of several processes, and what DDP needs to take it on the CPU."""

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
    """torch.nn.SyncBatchNorm for (N, C, *) inputs, on CUDA and on the CPU, with bnkernels' kernels.

    Arguments, attributes, state_dict and errors are torch.nn.SyncBatchNorm's. In training the statistics are those of
    the batches of all ranks of `process_group` (default: all processes) together, with one collective in the forward
    and one in the backward. In eval mode, in a group of one, and where torch.distributed is not initialised, it is
    bnkernels' BatchNorm. Dtypes: see batch_norm(). Otherwise than torch's:

    - Inputs may be on the CPU (gloo). DistributedDataParallel of torch refuses that: see this package's.
    - What the ranks exchange is float64: counts are exact, float64 inputs keep their precision. Every rank has the same
      statistics, to the bit. The host waits for no device, also with momentum=None.
    - N may differ between the ranks, and be 0. One value in all is no error, as nobody knows before the exchange: the
      running statistics then stay as they are.
    - It can be differentiated twice and more, and compiled (torch.compile, fullgraph=True).
    - residual is as BatchNorm2d's; between ranks torch adds it after the last kernel.

    Raises:
        RuntimeError, or a kind of it: the backend's, with the layer named, where a rank does not take part until the
            process group's timeout. (NCCL tells later, and by itself, unless it waits: TORCH_NCCL_BLOCKING_WAIT.)
        NotImplementedError: torch.func's transforms and forward-mode AD, in training, in a group of two or more.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2; the join of statistics: Chan, Golub & LeVeque 1979.
    """

    qualified_name = ""
    """The path in its model, for errors; set by the functions that convert models, "" where unknown."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf_for(input.tracer):
            return self._recorded(input, residual)
        if isinstance(input, Tensor):  # a proxy has no dimensions yet
            self._check_input_dim(input)
            if not input.is_nested:  # which may have no such size, and is refused by the ops
                self._check_non_zero_input_channels(input)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input, residual)
        group: Any = self.process_group if self.process_group is not None else dist.group.WORLD
        size = dist.get_world_size(group)
        if size < 2:  # -1: this rank is not in it
            return super().forward(input, residual)
        running_mean = running_var = num_batches_tracked = None
        if self.track_running_stats:
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked
        momentum = self.momentum
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0  # there is nothing to average by, and torch leaves the statistics as they are
        if residual is not None:
            check_residual(residual, input, None)
        ranks = Ranks(group, size, self._in_words())
        y = sync_batch_norm_tracked(
            input, self.weight, self.bias, running_mean, running_var, num_batches_tracked, momentum, self.eps, ranks
        )
        return with_epilogue(y, residual, None)

    def _torch_forward(self, input: Tensor) -> Tensor:
        """torch's own, which refuses what cannot be recorded."""
        return nn.SyncBatchNorm.forward(self, input)

    def _in_words(self) -> str:
        name = f" '{self.qualified_name}'" if self.qualified_name else ""
        return f"{type(self).__name__}({self.num_features}){name}"

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """torch.nn.SyncBatchNorm.convert_sync_batchnorm(), to layers of this class.

        Takes torch's BatchNorm layers and this package's, and SyncBatchNorm layers, which get the new process group.
        The layers are new, with the parameters and buffers of the old; hooks do not move. (bnkernels.convert() keeps
        the modules, and takes what is a torch.nn.SyncBatchNorm already.)

        Args:
            module: the model, or a layer.
            process_group: whose ranks share statistics; default: all processes.

        Returns:
            module, or, where it is such a layer itself, the new layer.

        Raises:
            ValueError: a lazy layer that has not seen an input, whose parameters do not exist yet.
        """
        if isinstance(module, _LazyNormBase) and module.has_uninitialized_params():
            raise ValueError(f"{type(module).__name__} has no parameters yet: run the model once, then convert it")
        converted: nn.Module = super().convert_sync_batchnorm(module, process_group)
        if type(converted) is nn.SyncBatchNorm:
            converted.__class__ = cls
        name_layers(converted)
        return converted


def name_layers(model: nn.Module) -> None:
    """Tells each SyncBatchNorm its path in the model, which its errors name."""
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm):
            module.qualified_name = name


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch.nn.parallel.DistributedDataParallel, less one refusal: on the CPU it takes this package's SyncBatchNorm.

    torch's raises ValueError for a SyncBatchNorm on the CPU, where its own cannot run, and goes by isinstance. On CUDA
    there is no difference.
    """

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        for layer in module.modules():
            if isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer, SyncBatchNorm):
                super()._passing_sync_batchnorm_handle(layer)
