"""Recognises the calls that fusion handles in a captured graph: BatchNorm, ReLU and addition, in all their forms."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..functional import batch_norm_tracked

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
PLAIN = ("input", "weight", "bias", *STATISTICS, "training", "momentum", "eps")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    batch_norm_tracked: (*PLAIN, "residual", "activation"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
}
_DEFAULTS = {**dict.fromkeys(("weight", "bias", *STATISTICS, "residual", "activation")), "training": False}
_DEFAULTS |= {"momentum": 0.1, "eps": 1e-5}

_RELU_FUNCTIONS = {F.relu, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_ADD_IN_PLACE = {operator.iadd, "add_", "__iadd__"}


@dataclass(frozen=True)
class NormCall:
    """A call of a BatchNorm, with its arguments by their names in batch_norm_tracked()."""

    node: fx.Node
    arguments: dict[str, Any]

    @property
    def is_torch(self) -> bool:
        """Whether it calls torch's function, not this package's."""
        return self.node.target is F.batch_norm

    @property
    def training(self) -> bool:
        return self.arguments["training"] is not False


def norm_call(node: fx.Node) -> NormCall | None:
    """The BatchNorm call of a node; None if the node is another operation."""
    names = _SIGNATURES.get(node.target) if node.op == "call_function" else None
    if names is None:
        return None
    return NormCall(node, {**_DEFAULTS, **dict(zip(names, node.args)), **node.kwargs})


def is_relu(node: fx.Node, of: fx.Node) -> bool:
    """Whether node is the ReLU of the value `of`, in place or not."""
    targets: dict[str, set[Any]] = {"call_function": _RELU_FUNCTIONS, "call_method": _RELU_METHODS}
    input = node.args[0] if node.args else node.kwargs.get("input")
    return node.target in targets.get(node.op, ()) and input is of and node.kwargs.keys() <= {"input", "inplace"}


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The two operands of an addition; () for any other operation, including additions with alpha or out."""
    targets: dict[str, set[Any]] = {"call_function": _ADD_FUNCTIONS, "call_method": _ADD_METHODS}
    found = (*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs))
    plain = node.kwargs.keys() <= {"input", "other", "alpha"} and node.kwargs.get("alpha", 1) == 1
    return found if node.target in targets.get(node.op, ()) and len(found) == 2 and plain else ()


def adds_in_place(node: fx.Node) -> bool:
    return node.target in _ADD_IN_PLACE


def describe(node: fx.Node) -> str:
    """The name of a node's operation in the user's code: an activation module's class or the function."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    target: Any = node.target
    name = str(getattr(target, "__name__", target))
    module = stack[-1][1] if stack else None
    of_torch = isinstance(module, type) and module.__module__.startswith("torch.nn.modules.activation")
    return module.__name__ if of_torch and isinstance(module, type) else name
