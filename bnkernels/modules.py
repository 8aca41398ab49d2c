"""BatchNorm1d/2d/3d and their lazy forms: torch's modules with this package's forward pass.

They are subclasses of torch's classes and inherit constructor, repr, parameters, buffers, state_dict and errors, so
that isinstance checks hold and convert() only assigns __class__. Only forward() differs:

- It accepts a residual, which the same kernel adds: y = batch_norm(input) + residual. BatchNormAct2d adds a ReLU.
- num_batches_tracked is incremented on the device, and momentum=None averages by it there, without host
  synchronisation.
- A call that raises does not change the buffers. torch has already incremented num_batches_tracked by then.

torch.fx, torch.jit.trace and the exporters record these modules as they record torch's.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm

from .functional import batch_norm_tracked, with_epilogue


def _has_hooks(module: nn.Module) -> bool:
    forward = module._forward_pre_hooks or module._forward_hooks
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)


class ForwardMixin(_BatchNorm):
    """The forward pass shared by the classes below."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """batch_norm(input) + residual. residual is optional; see batch_norm()."""
        return self._forward(input, residual, None)

    def _forward(self, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        if isinstance(input, Tensor):
            self._check_input_dim(input)
        elif isinstance(input, Proxy) and self._is_traced_as_leaf(input.tracer):
            return self._record_call(input, residual)
        # Direct lookups are faster than Module.__getattr__. A key is missing if the parameter was replaced, e.g. by a
        # parametrization or by a view into a wrapper's flat parameter.
        try:
            parameters, buffers = self._parameters, self._buffers
            weight = parameters["weight"]
            bias = parameters["bias"]
            running_mean = buffers["running_mean"]
            running_var = buffers["running_var"]
            num_batches_tracked = buffers["num_batches_tracked"]
        except KeyError:
            weight, bias = self.weight, self.bias
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked

        momentum = self.momentum
        training = self.training
        if training:
            if not self.track_running_stats:
                running_mean = running_var = num_batches_tracked = None
        else:
            num_batches_tracked = None
            training = running_mean is None and running_var is None
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0  # no batch count to average by: like torch, leave the statistics unchanged
        return batch_norm_tracked(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            momentum,
            self.eps,
            residual,
            activation,
        )

    def _is_traced_as_leaf(self, tracer: Any) -> bool:
        """Whether a torch.fx tracer should record this module as one call_module node, as it records torch's.

        By default tracers trace into modules outside torch.nn and so bake in the current value of `training`. Modules
        with hooks, and the root of the trace, are still traced into: hooks have already been traced when forward() is
        called and would run a second time inside a leaf call.

        Raises RuntimeError for the tracers of torch.ao.quantization, which match exact classes: they would leave this
        layer in floating point and its convolution unfolded.
        """
        if any(cls.__module__.startswith("torch.ao.") for cls in type(tracer).__mro__):
            raise RuntimeError(f"torch.ao.quantization does not support {self._unsupported_hint()}")
        return self is not tracer.root and not _has_hooks(self)

    def __prepare_scriptable__(self) -> NoReturn:
        """Raises before torch.jit.script, which calls this first, tries to compile forward()."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {self._unsupported_hint()}. torch.jit.trace needs no conversion"
        )

    def _unsupported_hint(self) -> str:
        name = type(self).__name__
        return f"bnkernels.{name}: call bnkernels.revert(model) first to restore the torch.nn layers"

    def _record_call(self, input: Proxy, residual: Any) -> Proxy:
        tracer: Any = input.tracer
        args = (input,) if residual is None else (input, residual)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, {})

    def _slow_forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """Replaces forward() in torch.jit.trace and the older ONNX exporter, which record torch's operators."""
        return with_epilogue(self._torch_forward(input), residual, None)

    def _torch_forward(self, input: Tensor) -> Tensor:
        return _BatchNorm.forward(self, input)


class BatchNorm1d(ForwardMixin, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d for (N, C) and (N, C, L) inputs, computed by this package's kernels.

    Arguments, attributes, state_dict and errors are those of torch.nn.BatchNorm1d. forward() also accepts a residual.
    Dtypes: see batch_norm().
    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """


class BatchNorm2d(ForwardMixin, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d for (N, C, H, W) inputs, computed by this package's kernels.

    Contiguous and channels_last inputs are read in place. Arguments, attributes, state_dict and errors are those of
    torch.nn.BatchNorm2d. forward() also accepts a residual. Dtypes: see batch_norm().
    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """


class BatchNorm3d(ForwardMixin, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d for (N, C, D, H, W) inputs, computed by this package's kernels.

    Contiguous and channels_last_3d inputs are read in place. Arguments, attributes, state_dict and errors are those of
    torch.nn.BatchNorm3d. forward() also accepts a residual. Dtypes: see batch_norm().
    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """


class BatchNormAct2d(nn.Module):
    """relu(batch_norm(x) + residual) in one kernel, with the interface of timm's BatchNormAct2d.

    x is (N, C, H, W), residual optional. The module contains a plain BatchNorm2d, `bn`, and an activation, `act`. Tools
    that replace BatchNorm layers (convert_sync_batchnorm, freezing, folding into a convolution) replace `bn` only; the
    forward pass then calls the replacement, followed by the activation.

    Arguments have timm's names and order. Loads the state_dict of nn.BatchNorm2d and of timm's class.

    Args:
        apply_act: whether to apply the activation.
        act_layer: nn.ReLU or None.
        act_kwargs, inplace: accepted for compatibility with timm; they do not change the result.
        drop_layer: must be None.

    Raises:
        ValueError: unsupported act_layer or drop_layer.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: type[nn.Module] | None = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: type[nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if act_layer not in (None, nn.ReLU) or drop_layer is not None:
            raise ValueError(
                f"act_layer must be nn.ReLU or None and drop_layer None, but got {act_layer}, {drop_layer}"
            )
        self.bn: Any = BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act: nn.Module = nn.ReLU() if apply_act and act_layer is not None else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not is_scripting():  # noqa: SIM102 (TorchScript skips the block, but compiles all of an `and`)
            if self._can_fuse(x):
                layers: dict[str, Any] = self._modules
                return layers["bn"]._forward(x, residual, "relu" if type(layers["act"]) is nn.ReLU else None)
        y = self.bn(x)
        result: Tensor = self.act(y if residual is None else y + residual)
        return result

    def _can_fuse(self, x: Any) -> bool:
        """Whether one kernel can replace both layers: neither was replaced, and no hook observes the value between."""
        layers: dict[str, Any] = self._modules  # faster than Module.__getattr__
        bn, act = layers["bn"], layers["act"]
        if type(bn) is not BatchNorm2d or type(act) not in (nn.ReLU, nn.Identity):
            return False
        for module in (bn, act):
            if "forward" in module.__dict__ or _has_hooks(module):
                return False
        return isinstance(x, Tensor) and not is_tracing()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}bn.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


# A lazy module runs its first forward() before its class changes, hence the ForwardMixin.


class LazyBatchNorm1d(ForwardMixin, nn.LazyBatchNorm1d):
    """BatchNorm1d that infers num_features from its first input. The first call makes it a bnkernels.BatchNorm1d."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(ForwardMixin, nn.LazyBatchNorm2d):
    """BatchNorm2d that infers num_features from its first input. The first call makes it a bnkernels.BatchNorm2d."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(ForwardMixin, nn.LazyBatchNorm3d):
    """BatchNorm3d that infers num_features from its first input. The first call makes it a bnkernels.BatchNorm3d."""

    cls_to_become = BatchNorm3d
