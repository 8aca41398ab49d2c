"""What of a traced model can become part of its BatchNorms: a ReLU, an addition, or both, behind each call.

A call is matched with what uses its result. Fused is only what computes the same afterwards: nobody else may see the
values between, and the calls of a module must be alike, as its activation is one for all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from .convert import OTHER_ACTIVATION, OURS
from .modules import ForwardMixin

_FUSIBLE = {*OURS, *OURS.values()}  # but for those that _reason_to_leave names before

_RELU_FUNCTIONS = {nn.functional.relu, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_"}
_ADD_IN_PLACE = {operator.iadd, "add_"}

_NUMBER_METHODS = {"dim", "item", "ndimension", "numel", "size", "stride"}
_NUMBER_FUNCTIONS = {"_operator", "math"}  # modules of functions that make numbers of numbers

# What is known to return new memory and to write to none of its arguments. Whatever is not named may do either.
_PURE_MODULES = {*_FUSIBLE, nn.SyncBatchNorm, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}
_PURE_FUNCTIONS = {operator.add, operator.mul, torch.add, torch.mul, torch.cat, torch.relu}

CALL_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

Modules = Mapping[str, nn.Module]


def drop_identities(graph: fx.Graph, named: Modules) -> None:
    """Takes out the calls of nn.Identity: models have it where another configuration has a layer."""
    for node in graph.nodes:
        module = called(node, named)
        if type(module) is nn.Identity and not _own_behaviour(module):
            input = node.args[0] if node.args else node.kwargs.get("input")
            if isinstance(input, fx.Node):
                node.replace_all_uses_with(input)
                graph.erase_node(node)


@dataclass(frozen=True)
class Match:
    """One call of a BatchNorm, and what is to become part of it."""

    call: fx.Node
    add: fx.Node | None
    relu: fx.Node | None

    @property
    def what(self) -> str:
        return " + ".join(word for word, node in (("add", self.add), ("relu", self.relu)) if node is not None)

    @property
    def activation(self) -> str | None:
        return None if self.relu is None else "relu"

    def rewrite(self, graph: fx.Graph) -> None:
        """The call moves to where the addition was: its residual may be computed after its input."""
        if self.add is not None:
            (residual,) = (operand for operand in _operands(self.add) if operand is not self.call)
            self.add.prepend(self.call)
            self.call.kwargs = {**self.call.kwargs, "residual": residual}
        for node in (self.relu, self.add):
            if node is not None:
                node.replace_all_uses_with(self.call)
                graph.erase_node(node)


def matches(graph: fx.Graph, named: Modules) -> tuple[list[Match], dict[nn.Module, str]]:
    """What is fused, and why each other BatchNorm that is called is left."""
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if isinstance(layer := called(node, named), _BatchNorm):
            calls.setdefault(layer, []).append(node)
    reasons = {layer: reason for layer in calls if (reason := _reason_to_leave(layer))}
    while True:  # a BatchNorm whose calls are not alike leaves its addition to the other operand
        outcomes: dict[fx.Node, Match | str] = {}
        added: dict[fx.Node, fx.Node] = {}  # an addition, and the call that it becomes part of
        for call in reversed(graph.nodes):  # of two operands the later: nothing has to move, no value lives longer
            layer = called(call, named)
            if layer in calls and layer not in reasons:
                outcome = outcomes[call] = _match(call, named, added)
                if isinstance(outcome, Match) and outcome.add is not None:
                    added[outcome.add] = call
        found = [outcome for outcome in outcomes.values() if isinstance(outcome, Match)]
        left = {}
        for layer in (layer for layer in calls if layer not in reasons):
            if reason := _reason_of_calls([outcomes[call] for call in calls[layer]]):
                left[layer] = reason
        undone = {layer: left[layer] for match in found if (layer := called(match.call, named)) in left}
        if not undone:
            return found, reasons | left
        reasons |= undone


def called(node: fx.Node, named: Modules) -> nn.Module | None:
    """The module that a node calls, None where it is another operation."""
    return named.get(str(node.target)) if node.op == "call_module" else None


def _reason_to_leave(layer: nn.Module) -> str:
    """Why a BatchNorm is left whatever follows it, "" if it need not be."""
    if isinstance(layer, _LazyNormBase):
        return "lazy, without parameters yet: run the model once, then fuse"
    if isinstance(layer, nn.SyncBatchNorm):
        return "a SyncBatchNorm, whose kernels take neither residual nor activation"
    if type(layer) not in _FUSIBLE:
        return "a subclass, whose forward may be its own"
    if getattr(layer, "activation", None) is not None:
        return "it has an activation already" if isinstance(layer, ForwardMixin) else OTHER_ACTIVATION
    return _own_behaviour(layer)


def _own_behaviour(module: nn.Module) -> str:
    """What makes a call of this object something else than its class's, "" for nothing."""
    if "forward" in vars(module):
        return "its forward has been replaced on the object"
    if any(getattr(module, hooks) for hooks in CALL_HOOKS):
        return "it has hooks"
    return ""


def _reason_of_calls(outcomes: list[Match | str]) -> str:
    """Why a BatchNorm is left, by what its calls could become part of; "" if all of them are fused alike."""
    whats = {outcome.what for outcome in outcomes if isinstance(outcome, Match)}
    reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if len(outcomes) > 1 and (len(whats) > 1 or reasons):
        return f"called {len(outcomes)} times, and not followed by the same each time"
    return reasons[0] if reasons else ""


def _match(call: fx.Node, named: Modules, added: Mapping[fx.Node, fx.Node]) -> Match | str:
    """What a call could become one with; or why it stays alone."""
    if len(call.users) != 1:
        return f"its result is used in {len(call.users)} places"
    (user,) = call.users
    add = None
    if _operands(user):
        if user in added:
            return f"its result is the residual of {added[user].target}"
        if reason := _reason_against(user, call, named):
            return reason
        add = user
    last = add or call
    relu = next(iter(last.users), None)
    if relu is not None and len(last.users) == 1 and _is_relu(relu, named):
        return Match(call, add, relu)
    if add is not None:
        return Match(call, add, None)
    module = called(user, named)
    what = type(module).__name__ if module else getattr(user.target, "__name__", user.target)
    return f"followed by {what}, which is neither a ReLU nor an addition of two tensors"


def _is_relu(node: fx.Node, named: Modules) -> bool:
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS and "out" not in node.kwargs
    if node.op == "call_method":
        return node.target in _RELU_METHODS
    module = called(node, named)
    return type(module) is nn.ReLU and not _own_behaviour(module)


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """The two operands of an addition, () for anything else, alpha and out among it."""
    targets: dict[str, set[Any]] = {"call_function": _ADD_FUNCTIONS, "call_method": _ADD_METHODS}
    operands = (*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs))
    plain = node.kwargs.keys() <= {"input", "other", "alpha"} and node.kwargs.get("alpha", 1) == 1
    return operands if node.target in targets.get(node.op, ()) and len(operands) == 2 and plain else ()


def _reason_against(add: fx.Node, call: fx.Node, named: Modules) -> str:
    """Why an addition cannot become part of a call, "" if it can."""
    others = [operand for operand in _operands(add) if operand is not call]
    if not others:
        return "its result is added to itself"
    if not isinstance(others[0], fx.Node):
        return f"added to {others[0]!r}, which is no tensor"
    if _may_be_number(others[0]):
        return f"added to {others[0]}, which may be a number"
    if len(call.args) > 1 or "residual" in call.kwargs:
        return "it has a residual already, and another addition"
    target = _operands(add)[0]
    if add.target in _ADD_IN_PLACE and target is not call and not (_is_pure(target, named) and len(target.users) == 1):
        return "the addition writes to a tensor that others may see"
    if not _can_wait(call, add, named):
        return "what lies between it and the addition may change its input"
    return ""


def _may_be_number(node: fx.Node) -> bool:
    """Whether a value is of a kind that is no tensor: a size, an argument of the model with a number as its default."""
    if node.op == "placeholder":
        return any(default is not None and not isinstance(default, Tensor) for default in node.args)
    if node.op == "call_method":
        return node.target in _NUMBER_METHODS
    if node.op != "call_function":
        return False
    of_numbers = getattr(node.target, "__module__", "") in _NUMBER_FUNCTIONS
    return node.target is getattr or (of_numbers and all(map(_may_be_number, node.all_input_nodes)))


def _can_wait(call: fx.Node, until: fx.Node, named: Modules) -> bool:
    """Whether a call may be made later: nothing between may write to its input, or is a call of the same module."""
    (input, *_) = call.all_input_nodes
    memory = _may_share_memory(input, named)
    layer = called(call, named)
    node = call.next
    while node is not until:
        if called(node, named) is layer and layer is not None:
            return False
        if not _is_pure(node, named) and not memory.isdisjoint(node.all_input_nodes):
            return False
        node = node.next
    return True


def _may_share_memory(node: fx.Node, named: Modules) -> set[fx.Node]:
    """The values that may be views of a value, or it of them, directly or through others."""
    found: set[fx.Node] = set()
    open = [node]
    while open:
        value = open.pop()
        if value in found:
            continue
        found.add(value)
        open += [user for user in value.users if not _is_pure(user, named)]
        if not _is_pure(value, named):
            open += value.all_input_nodes
    return found


def _is_pure(node: fx.Node, named: Modules) -> bool:
    """Whether a call is known to return new memory, and to write to none of its arguments."""
    if node.op == "call_function":
        return node.target in _PURE_FUNCTIONS and "out" not in node.kwargs
    module = called(node, named)
    if module is None or _own_behaviour(module):
        return False
    return type(module) in _PURE_MODULES or (type(module) is nn.ReLU and not module.inplace)
