"""BatchNorm1d/2d/3d and their lazy forms: torch's modules, with the forward pass of this package.

Subclasses of torch's: constructor, repr, parameters, buffers, state_dict and errors are theirs, isinstance holds, and
convert() turns one into the other by its class alone. Only forward() differs:

- It takes a residual, which the same kernel adds: y = batch_norm(input) + residual. BatchNormAct2d has a ReLU as well.
- num_batches_tracked is incremented, and momentum=None averages by it, on the device: the host never waits for it.
- A call that raises leaves the buffers as they were (torch has counted the batch by then).

torch.fx, torch.jit.trace and the exporters record a module of this package as they record torch's.
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
    """The forward pass of the classes below."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """batch_norm(input) + residual; residual: see batch_norm()."""
        return self._forward(input, residual, None)

    def _forward(self, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        if isinstance(input, Tensor):
            self._check_input_dim(input)
        elif isinstance(input, Proxy) and self._is_leaf_for(input.tracer):
            return self._recorded(input, residual)
        # Module.__getattr__ would cost more than all these together. A name is missing here where somebody has put
        # something else in its place: a parametrization, a view into a wrapper's flat parameter.
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
            momentum = 0.0  # there is nothing to average by, and torch leaves the statistics as they are
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

    def _is_leaf_for(self, tracer: Any) -> bool:
        """Whether a tracer of torch.fx is to record this module as one call, as it does torch's own.

        Tracers enter what is not of torch.nn, and would then record `training` as it is just now, and no layer. Hooks
        have been traced already when forward() is called and would run a second time within that call; with them, and
        as the root of the trace, the module is entered.

        Quantization goes by exact classes. It would leave the layer in floating point, and its convolution unfolded.
        """
        if any(cls.__module__.startswith("torch.ao.") for cls in type(tracer).__mro__):
            raise RuntimeError(f"quantization does not know {self._reverts()}")
        return self is not tracer.root and not _has_hooks(self)

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script, which cannot compile forward(), before it compiles anything."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {self._reverts()}. torch.jit.trace takes the model as it is"
        )

    def _reverts(self) -> str:
        name = type(self).__name__
        return f"bnkernels.{name}: call bnkernels.revert(model) first, which makes its layers torch.nn's again"

    def _recorded(self, input: Proxy, residual: Any) -> Proxy:
        tracer: Any = input.tracer
        args = (input,) if residual is None else (input, residual)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, {})

    def _slow_forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """Called in forward()'s place by torch.jit.trace and the older ONNX exporter: they record torch's operators."""
        return with_epilogue(self._torch_forward(input), residual, None)

    def _torch_forward(self, input: Tensor) -> Tensor:
        return _BatchNorm.forward(self, input)


class BatchNorm1d(ForwardMixin, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d for (N, C) and (N, C, L) inputs, with bnkernels' kernels.

    Arguments, attributes, state_dict and errors are torch.nn.BatchNorm1d's. Dtypes: see batch_norm().
    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """


class BatchNorm2d(ForwardMixin, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d for (N, C, H, W) inputs, contiguous or channels_last, with bnkernels' kernels.

    Arguments, attributes, state_dict and errors are torch.nn.BatchNorm2d's. Dtypes: see batch_norm().
    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """


class BatchNorm3d(ForwardMixin, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d for (N, C, D, H, W) inputs, contiguous or channels_last_3d, with bnkernels' kernels.

    Arguments, attributes, state_dict and errors are torch.nn.BatchNorm3d's. Dtypes: see batch_norm().
    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """


class BatchNormAct2d(nn.Module):
    """relu(batch_norm(x) + residual) as a module that contains a plain BatchNorm2d: timm's BatchNormAct2d, fused.

    Tools that replace BatchNorm layers (convert_sync_batchnorm, freezing, folding into a convolution) replace the layer
    `bn` and leave the activation. What they put in its place is called as it is, and followed by the activation.
    Arguments are timm's, in timm's order. A state_dict of nn.BatchNorm2d or of timm's class loads.

    Args:
        apply_act: whether there is an activation.
        act_layer: nn.ReLU or None. inplace, act_kwargs: taken for timm's sake; neither changes a result.

    Raises:
        ValueError: another act_layer; a drop_layer.
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
            raise ValueError(f"act_layer must be nn.ReLU or None, and drop_layer None: got {act_layer}, {drop_layer}")
        self.bn: Any = BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act: nn.Module = nn.ReLU() if apply_act and act_layer is not None else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not is_scripting():  # noqa: SIM102 (TorchScript leaves out such a block, and no part of a condition)
            if self._is_fused(x):
                layers: dict[str, Any] = self._modules
                return layers["bn"]._forward(x, residual, "relu" if type(layers["act"]) is nn.ReLU else None)
        y = self.bn(x)
        result: Tensor = self.act(y if residual is None else y + residual)
        return result

    def _is_fused(self, x: Any) -> bool:
        """Whether one kernel stands for both layers: they are those of this class, and nothing sees what is between."""
        layers: dict[str, Any] = self._modules  # Module.__getattr__ would cost more than the rest
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


# A lazy module computes its first call itself, before its class changes for good, hence ForwardMixin in these too.


class LazyBatchNorm1d(ForwardMixin, nn.LazyBatchNorm1d):
    """BatchNorm1d whose num_features is the first input's; becomes a bnkernels.BatchNorm1d with its first call."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(ForwardMixin, nn.LazyBatchNorm2d):
    """BatchNorm2d whose num_features is the first input's; becomes a bnkernels.BatchNorm2d with its first call."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(ForwardMixin, nn.LazyBatchNorm3d):
    """BatchNorm3d whose num_features is the first input's; becomes a bnkernels.BatchNorm3d with its first call."""

    cls_to_become = BatchNorm3d
