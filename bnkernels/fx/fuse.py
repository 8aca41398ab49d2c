"""fuse(), unfuse() and the report of what became of each BatchNorm."""

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

# Before it had this name, is_fx_tracing() was no more than that.
_is_fx_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)

NOT_CAPTURED = "not captured yet: no captured graph has called it since fuse()"


@dataclass(frozen=True)
class Fusion:
    """A BatchNorm that was fused. name is its path in the model; what: "relu", "add" or "add + relu"."""

    name: str
    what: str


@dataclass(frozen=True)
class Left:
    """A BatchNorm that was left as it is in a captured graph, and why."""

    name: str
    reason: str


@dataclass
class FusionReport:
    """What became of each BatchNorm of a model, once the model has run. str() gives a table.

    TorchDynamo captures a graph when the model is first called, more for other modes, dtypes or shapes. A layer that
    is called several times, or in several graphs, is in the lists once for each different outcome.
    """

    outcomes: dict[str, list[Fusion | Left]] = field(default_factory=dict)
    """By the name of the layer; an empty list for one that no captured graph has called yet."""

    @property
    def fused(self) -> list[Fusion]:
        return [each for found in self.outcomes.values() for each in found if isinstance(each, Fusion)]

    @property
    def left(self) -> list[Left]:
        rows = ((name, found or [Left(name, NOT_CAPTURED)]) for name, found in self.outcomes.items())
        return [each for _, found in rows for each in found if isinstance(each, Left)]

    def summary(self) -> str:
        """One line: how many layers were fused with what, and how many were left, by reason."""
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
    """Computes the ReLU, the addition, or both after each BatchNorm of a model in the BatchNorm's kernel, in place.

    The same as model.compile(backend="bnkernels"), with a report. TorchDynamo captures what the model computes when it
    is called; in the graphs, nn.ReLU, F.relu, torch.relu, Tensor.relu and additions of tensors, in place or not,
    become part of the call of a BatchNorm before them, of torch or of this package. The rest of a graph runs as it is.

    The model keeps its class, methods, modules, hooks and state_dict; only its call goes another way, and unfuse()
    undoes it. What the model decides by its mode, by types and by sizes of its arguments stays decided at each call:
    TorchDynamo checks it and captures another graph where it differs. What it cannot capture runs in eager, and the
    graphs before and after it are fused.

    A copy (copy.deepcopy, pickle) is not fused. torch.export, torch.fx, torch.jit.trace and transforms of torch.func
    see the model as it was. In 16 bits a sum that becomes part of a kernel is rounded once instead of twice.

    Args:
        report: receives what was fused, and what was left and why, as the model runs.
        backend: "bnkernels", or "bnkernels_inductor", which compiles the rest of the graph by inductor.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: the model is a BatchNorm itself, or compiled already; an unknown backend.
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
    """Undoes fuse(), in place, in the model and in its submodules."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for module in model.modules():
        if isinstance(module._compiled_call_impl, FusedCall):
            module._compiled_call_impl = None
    return model


class FusedCall:
    """What a fused model's call runs: the captured graphs, or the model itself for other tracers and transforms."""

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
    """The model's call, as a function whose code object is its own.

    TorchDynamo keeps graphs, and limits their number, by code object. nn.Module.compile() gives all models the same:
    beyond torch._dynamo.config.recompile_limit of them, models run in eager.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=type(model).__name__)
    return call


def _is_traced() -> bool:
    """Whether something else than autograd sees the operations of this call."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or _is_fx_tracing() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _is_lazy(model: nn.Module) -> bool:
    """Whether a layer gets its parameters in the coming call, which also changes its class."""
    return any(nn.parameter.is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _check(model: Any, backend: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, _BatchNorm):
        raise ValueError(
            f"model is a {type(model).__name__} itself, followed by nothing to fuse: pass the model that calls it"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, but got {backend!r}")
    if model._compiled_call_impl is not None and not isinstance(model._compiled_call_impl, FusedCall):
        raise ValueError('model is compiled already: use model.compile(backend="bnkernels_inductor") instead')


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
    """The layer that a call is of: whose parameters or statistics it has, or whose code calls it."""
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
