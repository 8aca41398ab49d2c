"""fuse(): the ReLU and the addition that follow a BatchNorm, made part of it.

torch.fx traces the model, patterns.py says what can be fused and rewrites the graph, and here the result gets the
modules for it: each over the parameters and buffers of the one that it stands for.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .convert import OURS, Skip
from .patterns import CALL_HOOKS, Match, Modules, called, drop_identities, matches

logger = logging.getLogger("bnkernels")


@dataclass(frozen=True)
class Fusion:
    """One BatchNorm that was fused. name is its path in the model; what: "relu", "add" or "add + relu"."""

    name: str
    what: str


@dataclass
class FusionReport:
    """What fuse() did to each BatchNorm of a model: every one is in one of the lists. str() gives a table."""

    fused: list[Fusion] = field(default_factory=list)
    left: list[Skip] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(fusion.name, fusion.what) for fusion in self.fused]
        rows += [(skip.name, f"left: {skip.reason}") for skip in self.left]
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"  {name:<{width}}  {text}" for name, text in rows]
        return "\n".join([f"{len(self.fused)} BatchNorms fused, {len(self.left)} left as they are", *lines])


def fuse(model: nn.Module, *, report: FusionReport | None = None, tracer: fx.Tracer | None = None) -> fx.GraphModule:
    """Fuses the ReLU, the addition, or the addition and the ReLU behind each BatchNorm of a model into it.

    The result computes what the model computes, in training and in evaluation, and reads and writes less. Fused are
    nn.ReLU, F.relu, torch.relu, Tensor.relu and additions of two tensors, in place or not, behind an exact
    nn.BatchNorm1d/2d/3d or bnkernels' own, where nothing else uses the value between. Where both operands of an
    addition are BatchNorms, the later one takes the other's result as its residual. Calls of nn.Identity are dropped.
    What is not fused stays as it is: bnk.fuse(bnk.convert(model)) has no BatchNorm1d/2d/3d of torch left.

    The result shares with the model, as all that torch.fx traces: its parameters and buffers are the model's, so that
    an optimizer goes on, and have the model's names and order, so that a checkpoint of the one loads into the other.
    The model itself goes on computing what it did: a fused BatchNorm is a new module over the parameters and buffers of
    the old. train() and eval() are to be called on the result. fuse(copy.deepcopy(model)) shares nothing.

    Of the modules that torch.fx enters it keeps parameters, buffers and submodules, not class and methods. What their
    code decides by self.training (F.dropout's argument, an auxiliary head) is decided as of this call; layers of
    torch.nn and BatchNorms go by train() and eval(). An addition in place, `bn += x`, becomes one that is not: with an
    x of a wider dtype, the result has that.

    Args:
        model: what torch.fx can trace.
        report: filled with what was fused, and what was left and why, where given. A summary is logged to the logger
            "bnkernels" at INFO.
        tracer: traces in place of torch.fx's own tracer, for a model that needs rules of what is a leaf; BatchNorms in
            a leaf are left.

    Returns:
        A GraphModule.

    Raises:
        TypeError: model is no module.
        ValueError: model cannot be traced, or is a BatchNorm itself.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, _BatchNorm):
        raise ValueError(
            f"model is a {type(model).__name__} itself, with nothing behind it to fuse: pass the model that calls it, "
            'or give a bnkernels BatchNorm its activation="relu"'
        )
    named = dict(model.named_modules(remove_duplicate=False))
    graph = _traced(model, tracer or _Tracer())
    _forget_names_of_types(graph)
    drop_identities(graph, named)
    found, reasons = matches(graph, named)
    standing: dict[nn.Module, nn.Module] = {}
    for match in found:
        layer = named[str(match.call.target)]
        standing[layer] = _twin(layer, match.activation)
        match.rewrite(graph)
    result = fx.GraphModule(model, graph, type(model).__name__)
    _complete(result, model, standing)
    result.graph.lint()

    done = _reported(model, named, found, reasons)
    _log(done, type(model).__name__)
    if report is not None:
        report.fused += done.fused
        report.left += done.left
    return result


class _Tracer(fx.Tracer):
    """torch.fx's, to which every BatchNorm is a leaf: a subclass asks for the dimensions of its input."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, tracer: fx.Tracer) -> fx.Graph:
    try:
        return tracer.trace(model)
    except Exception as error:  # whatever a model's code raises when it meets a proxy
        raise ValueError(
            f"torch.fx cannot trace {_place(error, model)}: {error}\n"
            "What depends on values or shapes of tensors has no graph. Fuse the submodules that can be traced one by "
            "one (model.layer1 = bnk.fuse(model.layer1)), pass a tracer= to which that module is a leaf, or write the "
            'fused calls by hand: bnk.BatchNorm2d(n, activation="relu")(x, residual).'
        ) from error


def _forget_names_of_types(graph: fx.Graph) -> None:
    """Postponed annotations of a forward() are strings, with which torch 2.13 cannot store a GraphModule."""
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = None


def _place(error: Exception, model: nn.Module) -> str:
    """The innermost module of the model in whose code an error was raised, and the line."""
    names = {module: name for name, module in model.named_modules()}
    place = type(model).__name__
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names:
            name = f" '{names[module]}'" if names[module] else ""
            place = f"{type(module).__name__}{name} ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


# What stands in the result


def _twin(layer: nn.Module, activation: str | None) -> nn.Module:
    """A module of this package over the parameters and buffers of another.

    The dictionaries of both are shared, not only the tensors: .to() of either puts new tensors in their place.
    """
    twin = copy.copy(layer)
    twin.__class__ = OURS.get(type(layer), type(layer))  # type: ignore[assignment]
    if activation is not None:
        twin.activation = activation  # type: ignore[assignment]
    for hooks in CALL_HOOKS:  # not these: whoever registers one means the result of one of the two
        setattr(twin, hooks, OrderedDict())
    return twin


def _complete(result: nn.Module, model: nn.Module, standing: dict[nn.Module, nn.Module]) -> None:
    """Gives a traced module the fused BatchNorms, and what a trace leaves out: state that no call uses, and the order.

    Optimizers know parameters by their order. standing: what stands in the result for a module of the model.
    """
    standing[model] = result
    children: dict[str, nn.Module | None] = {}
    for name, child in model._modules.items():
        traced = result._modules.get(name)
        if child is None or child in standing:
            children[name] = child and standing[child]
        elif traced is None or traced is child:
            if traced is child or child.state_dict():
                children[name] = standing[child] = child
        else:
            children[name] = traced
            _complete(traced, child, standing)
    added = {name: child for name, child in result._modules.items() if name not in children}
    result._modules = {**children, **added}
    result._parameters = {**model._parameters, **result._parameters}
    # torch.fx makes persistent buffers of whatever is a tensor and no parameter.
    result._non_persistent_buffers_set = model._non_persistent_buffers_set | (result._buffers.keys() - model._buffers)
    result._buffers = {**model._buffers, **result._buffers}


def _reported(
    model: nn.Module, named: Modules, found: Iterable[Match], reasons: Mapping[nn.Module, str]
) -> FusionReport:
    whats = {called(match.call, named): match.what for match in found}
    report = FusionReport()
    for name, module in model.named_modules():
        if module in whats:
            report.fused.append(Fusion(name, whats[module]))
        elif isinstance(module, _BatchNorm):
            reason = reasons.get(module, "the trace has no call of it: it is unused, or within a leaf")
            report.left.append(Skip(name, type(module), reason))
    return report


def _log(report: FusionReport, model: str) -> None:
    logger.info("fused %d BatchNorm modules of %s", len(report.fused), model)
    for reason, count in Counter(skip.reason for skip in report.left).items():
        logger.info("left %d as they are: %s", count, reason)
