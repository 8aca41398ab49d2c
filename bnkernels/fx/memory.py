"""Alias analysis: which memory the nodes of a captured graph read and write.

TorchDynamo runs each node on fake tensors during capture and stores the result in node.meta["example_value"]. Views
share their fake storage, so aliases are exact. Writes are derived from the conventions of torch's functions; any other
function is assumed to write to each of its arguments.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from .calls import STATISTICS, norm_call

_IN_PLACE_OPERATORS = {
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")),
    *(getattr(operator, f"i{name}") for name in ("and", "or", "xor", "lshift", "rshift", "concat")),
    operator.setitem,
    operator.delitem,
}
_TORCH_MODULES = ("torch", "torch._C", "torch.functional", "torch.nn.functional", "_operator", "math", "builtins")

_ANY = "any"
"""Unknown memory, which may alias any other."""
_INPUTS = "inputs"
"""The memory of graph inputs, which may alias each other: inputs of later calls may overlap even if these do not."""

Memory = frozenset[Any]


class MemoryOf:
    """The memory of the values of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        calls = [call for node in graph.nodes if (call := norm_call(node)) is not None]
        statistics = {call.arguments[name] for call in calls for name in STATISTICS}
        inputs = [node for node in graph.nodes if node.op == "placeholder" and node not in statistics]
        self._of_inputs = {
            storage
            for node in inputs
            if not isinstance(node.meta.get("example_value"), torch.nn.Parameter)
            for storage in _storages(node)
        }
        self._of_all_inputs = {s for node in graph.nodes if node.op == "placeholder" for s in _storages(node)}

    def of(self, *nodes: Any) -> Memory:
        """The memory of the values of nodes. Arguments that are not nodes have none."""
        found = {storage for node in nodes if isinstance(node, fx.Node) for storage in _storages(node)}
        if found & self._of_inputs:
            found.add(_INPUTS)
        return frozenset(found)

    def is_shared(self, memory: Memory) -> bool:
        """Whether the memory may be visible outside the graph."""
        return _ANY in memory or not memory.isdisjoint(self._of_all_inputs)

    def read(self, node: fx.Node) -> Memory:
        return self.of(*node.all_input_nodes)

    def written(self, node: fx.Node) -> Memory:
        return self.of(*_written_arguments(node))


def overlap(one: Memory, other: Memory) -> bool:
    """Whether two values may share memory."""
    if not one or not other:
        return False
    return _ANY in one or _ANY in other or not one.isdisjoint(other)


def is_barrier(node: fx.Node) -> bool:
    """Whether a node may change a mode (grad mode, autocast, saved-tensor hooks) for the nodes that follow."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    value = node.meta.get("example_value")
    return not isinstance(value, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool | int | float | tuple | list)


def fake(node: Any) -> FakeTensor | None:
    """The fake tensor of a node's value; None if the value is not a plain tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if type(value) is FakeTensor else None


def _storages(node: fx.Node) -> Iterator[Any]:
    if node.op == "get_attr" and "example_value" not in node.meta:  # a subgraph
        return
    if "example_value" not in node.meta:
        yield _ANY
        return
    for value in _leaves(node.meta.get("example_value")):
        if type(value) is FakeTensor:
            yield value.untyped_storage()._cdata
        elif not isinstance(value, int | float | str | torch.SymInt | torch.SymFloat | torch.SymBool | None):
            yield _ANY


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _written_arguments(node: fx.Node) -> Iterable[Any]:
    if node.op == "call_method":
        name = str(node.target)
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set", "__del"))
        return node.args[:1] if in_place else ()
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op != "call_function":
        return ()
    call = norm_call(node)
    if call is not None:
        return [call.arguments[name] for name in STATISTICS] if call.training else ()
    target: Any = node.target
    if target in _IN_PLACE_OPERATORS:
        return node.args[:1]
    if isinstance(target, torch._ops.OpOverload):
        return node.all_input_nodes if target._schema.is_mutable else ()
    name = getattr(target, "__name__", "")
    known = getattr(target, "__module__", None) in (None, *_TORCH_MODULES, "torch._C._nn")
    if not known or name.endswith("_") or "out" in node.kwargs or name in ("batch_norm", "instance_norm"):
        return node.all_input_nodes
    return node.args[:1] or node.all_input_nodes if _is_called_in_place(node) else ()


def _is_called_in_place(node: fx.Node) -> bool:
    """Whether a function of torch.nn.functional is called with inplace=True, by keyword or position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    position = _position_of_inplace(node.target)
    return position is not None and position < len(node.args) and node.args[position] is not False


@cache
def _position_of_inplace(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins have no signature and no such argument
        return None
    return names.index("inplace") if "inplace" in names else None
