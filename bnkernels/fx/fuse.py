"""fuse(), unfuse() and FusionReport."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import fx as torch_fx
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.nn.modules.batchnorm import _BatchNorm

from .backend import BACKENDS, EAGER

logger = logging.getLogger("bnkernels")

_Model = TypeVar("_Model", bound=nn.Module)

# Older versions of torch have the same function under the name is_fx_tracing().
_is_fx_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)

NOT_CAPTURED = "not captured yet: no captured graph has called it since fuse()"


@dataclass(frozen=True)
class Fusion:
    """A fused BatchNorm. name is its path in the model; what is "relu", "add" or "add + relu"."""

    name: str
    what: str


@dataclass(frozen=True)
class Left:
    """A BatchNorm that was not fused in a captured graph, and the reason."""

    name: str
    reason: str


@dataclass
class FusionReport:
    """The outcome of fuse() for each BatchNorm of a model, filled as the model runs. str() gives a table.

    TorchDynamo captures a graph at the first call, and further graphs for other modes, dtypes or shapes. A layer that
    is called several times, or in several graphs, is listed once per distinct outcome.
    """

    outcomes: dict[str, list[Fusion | Left]] = field(default_factory=dict)
    """The outcomes by layer name; an empty list if no captured graph has called the layer yet."""

    @property
    def fused(self) -> list[Fusion]:
        return [each for found in self.outcomes.values() for each in found if isinstance(each, Fusion)]

    @property
    def left(self) -> list[Left]:
        rows = ((name, found or [Left(name, NOT_CAPTURED)]) for name, found in self.outcomes.items())
        return [each for _, found in rows for each in found if isinstance(each, Left)]

    def summary(self) -> str:
        """One line: the numbers of fused layers by epilogue, and of other layers by reason."""
        fused, left = Counter(each.what for each in self.fused), Counter(each.reason for each in self.left)
        counts = [f"{len({each.name for each in self.fused})} BatchNorms fused"]
        counts += [f"{count} x {what}" for what, count in fused.most_common()]
        reasons = [f"{count} x {reason}" for reason, count in left.most_common()]
        text = f"{', '.join(counts)}; {len({each.name for each in self.left})} left"
        return f"{text}: {'; '.join(reasons)}" if reasons else text

    def __str__(self) -> str:
        rows = [(each.name, each.what) for each in self.fused]
        rows += [(each.name, f"left: {each.reason}") for each in self.left]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([self.summary(), *(f"  {name:<{width}}  {text}" for name, text in rows)])


def fuse(model: _Model, *, report: FusionReport | None = None, backend: str = EAGER) -> _Model:
    """Fuses each BatchNorm of a model with the addition, the ReLU, or both that follow it. Works in place.

    Equivalent to model.compile(backend="bnkernels"), with a report. TorchDynamo captures graphs when the model is
    called. In these graphs, nn.ReLU, F.relu, torch.relu, Tensor.relu and additions of tensors, in place or not, become
    the epilogue of the preceding BatchNorm call, of torch or of this package. Other operations do not change.

    The model keeps its class, methods, modules, hooks and state_dict. Only __call__ is redirected; unfuse() undoes it.
    Control flow that depends on the mode, or on types and sizes of the arguments, stays dynamic: TorchDynamo guards it
    and captures another graph if it changes. Data-dependent control flow cannot be traced: it runs in eager mode, and
    the graphs before and after it are fused.

    Copies (copy.deepcopy, pickle) are not fused. torch.export, torch.fx, torch.jit.trace and transforms of torch.func
    use the original model. In 16-bit dtypes, a fused sum is rounded once instead of twice.

    Args:
        model: any module other than a BatchNorm.
        report: optional; receives the outcome for each BatchNorm as the model runs. Outcomes are also logged to the
            logger "bnkernels" at INFO.
        backend: "bnkernels", or "bnkernels_inductor", which compiles the rest of the graph with inductor.

    Returns:
        model.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: model is a BatchNorm, or is already compiled; unknown backend.
    """
    _check(model, backend)
    report = FusionReport() if report is None else report
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            report.outcomes.setdefault(name, [])
    record = partial(_record, report, model)
    model._compiled_call_impl = FusedCall(
        model, torch.compile(_call_of(model), backend=partial(BACKENDS[backend], record=record))
    )
    return model


def unfuse(model: _Model) -> _Model:
    """Undoes fuse(), in place, for the model and its submodules.

    Returns model. Raises TypeError if it is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for module in model.modules():
        if isinstance(module._compiled_call_impl, FusedCall):
            module._compiled_call_impl = None
    return model


class FusedCall:
    """The call of a fused model: runs the captured graphs, or the original model for other tracers and transforms."""

    def __init__(self, model: nn.Module, compiled: Any) -> None:
        self._model, self._compiled = model, compiled
        self._is_lazy = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_traced():
            return self._model._call_impl(*args, **kwargs)
        if self._is_lazy and _is_lazy(self._model):
            return self._model._call_impl(*args, **kwargs)
        self._is_lazy = False
        return self._compiled(*args, **kwargs)


def _call_of(model: nn.Module) -> Callable[..., Any]:
    """The model's call as a function with its own code object.

    TorchDynamo caches graphs, and limits their number, per code object. With nn.Module.compile() all models share one:
    beyond torch._dynamo.config.recompile_limit models, further ones run in eager mode.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=type(model).__name__)
    return call


def _is_traced() -> bool:
    """Whether a tracer or a transform of torch.func, other than autograd, observes the operations of this call."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or _is_fx_tracing() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _is_lazy(model: nn.Module) -> bool:
    """Whether the next call initialises the parameters of a lazy layer, which also changes the layer's class."""
    return any(nn.parameter.is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _check(model: Any, backend: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, _BatchNorm):
        raise ValueError(
            f"model is a {type(model).__name__} itself, which has nothing to fuse with: pass the model that contains it"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, but got {backend!r}")
    if model._compiled_call_impl is not None and not isinstance(model._compiled_call_impl, FusedCall):
        raise ValueError('model is already compiled: use model.compile(backend="bnkernels_inductor") instead')


def _record(
    report: FusionReport,
    model: nn.Module,
    node: torch_fx.Node,
    arguments: Sequence[torch_fx.Node],
    inputs: dict[torch_fx.Node, Any],
    what: str,
    reason: str,
) -> None:
    name = _name_of(model, node, [inputs.get(argument) for argument in arguments])
    outcome: Fusion | Left = Fusion(name, what) if what else Left(name, reason)
    found = report.outcomes.setdefault(name, [])
    if outcome not in found:
        found.append(outcome)
        logger.info("%s: %s", name, what or f"left: {reason}")


def _name_of(model: nn.Module, node: torch_fx.Node, values: Sequence[Any]) -> str:
    """The name of the layer of a call: found by its parameters and statistics, else from the stack of module calls."""
    tensors = {id(value) for value in values if isinstance(value, Tensor)}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            own = [*module._parameters.values(), *module._buffers.values()]
            if any(id(tensor) in tensors for tensor in own if tensor is not None):
                return name
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else node.name
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", re.sub(r"^L\[[^]]*\](\.__self__)?\.?", "", path)).replace(
        "._modules", ""
    )
