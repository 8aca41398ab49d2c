"""The fusion pass: replaces BatchNorm -> [add] -> [ReLU] in a captured graph by one call with an epilogue.

The pass runs before autograd, on the graph that TorchDynamo captured; TorchDynamo's guards fix control flow, train()
and eval(), dtypes and shapes. A pattern is fused only if the result is the same. That requires:

- nothing else uses an intermediate value;
- moving the reads and writes to the position of the fused call reorders no conflicting accesses;
- no mode (grad mode, autocast, saved-tensor hooks) may change between the replaced calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..functional import batch_norm_tracked
from .calls import PLAIN, STATISTICS, NormCall, adds_in_place, describe, is_relu, norm_call, operands
from .memory import MemoryOf, fake, is_barrier, overlap

IS_RESIDUAL = "its result is the residual of another BatchNorm"


@dataclass(frozen=True)
class Match:
    """A call of a BatchNorm and the nodes that become its epilogue."""

    call: NormCall
    add: fx.Node | None
    relu: fx.Node | None
    residual: fx.Node | None
    before: fx.Node
    """The node before which the fused call is inserted."""

    @property
    def what(self) -> str:
        return " + ".join(word for word, node in (("add", self.add), ("relu", self.relu)) if node is not None)

    def rewrite(self, graph: fx.Graph) -> None:
        replaced = [node for node in (self.relu, self.add, self.call.node) if node is not None]
        arguments = [self.call.arguments[name] for name in PLAIN]
        activation = "relu" if self.relu is not None else self.call.arguments["activation"]
        with graph.inserting_before(self.before):
            fused = graph.call_function(batch_norm_tracked, (*arguments, self.residual, activation))
        fused.meta = {**replaced[0].meta, "nn_module_stack": self.call.node.meta.get("nn_module_stack", {})}
        replaced[0].replace_all_uses_with(fused)
        for node in replaced:
            graph.erase_node(node)


def fuse_graph(graph: fx.Graph) -> list[tuple[NormCall, str, str]]:
    """Rewrites a graph. Returns (call, what was fused or "", why not) for each BatchNorm call, in order."""
    if any(_is_transform(node) for node in graph.nodes):
        calls = [call for node in graph.nodes if (call := norm_call(node)) is not None]
        return [(call, "", "inside a transform of torch.func") for call in calls]
    memory = MemoryOf(graph)
    outcomes = []
    residuals: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):  # prefer the later operand of an addition: it needs no move
        call = norm_call(node)
        if call is None:
            continue
        outcome = IS_RESIDUAL if node in residuals else _match(call, memory)
        if isinstance(outcome, str):
            outcomes.append((call, "", outcome))
            continue
        if outcome.residual is not None and outcome.add is not None:
            residuals.add(outcome.residual)
        outcome.rewrite(graph)
        outcomes.append((call, outcome.what, ""))
    return outcomes[::-1]


def _is_transform(node: fx.Node) -> bool:
    module = str(getattr(node.target, "__module__", ""))
    return node.op == "call_function" and module.startswith(("torch._C._functorch", "torch._functorch"))


def _match(call: NormCall, memory: MemoryOf) -> Match | str:
    """The match of a call, or the reason why it cannot be fused."""
    node = call.node
    if reason := _reason_to_leave(call):
        return reason
    if len(node.users) != 1:
        return f"its result is used in {len(node.users)} places"
    (user,) = node.users
    residual, add, last = call.arguments["residual"], None, node
    if operands(user):
        if residual is not None:
            return "it has a residual already, and another addition"
        if reason := _reason_against(user, call, memory):
            return reason
        add = last = user
        (residual,) = (operand for operand in operands(user) if operand is not node)
    relu = next(iter(last.users)) if len(last.users) == 1 else None
    if relu is None or not is_relu(relu, last):
        relu = None
    if add is None and relu is None:
        if user.op == "output":
            return "its result leaves the captured graph"
        return f"followed by {describe(user)}, which is neither a ReLU nor an addition of two tensors"
    if not _same_layout(relu or last, node):
        return "the operation that follows changes the layout"
    return _match_at_insertion_point(call, add, relu, residual, memory)


def _reason_to_leave(call: NormCall) -> str:
    """The reason why a call cannot be fused, whatever follows it; "" if it can."""
    arguments = call.arguments
    input, result = fake(arguments["input"]), fake(call.node)
    if arguments["activation"] is not None:
        return "it has an activation already"
    if input is None or result is None:
        return "its input is not a plain tensor"
    constants = isinstance(arguments["training"], bool) and isinstance(arguments["eps"], float | int)
    if not constants or isinstance(arguments["momentum"], fx.Node):
        return "its momentum, eps or mode is computed in the graph"
    if not call.is_torch:
        return ""
    if input.device.type not in ("cpu", "cuda"):
        return f"a torch.nn BatchNorm on {input.device.type}, which bnkernels does not support"
    if input.dim() < 2 or not _same_layout(arguments["input"], call.node):
        return "a torch.nn BatchNorm with an input that is neither contiguous nor channels_last"
    vectors = [fake(arguments[name]) for name in ("weight", "bias", *STATISTICS[:2]) if arguments[name] is not None]
    allowed = {input.dtype, torch.float32} if input.dtype in (torch.float16, torch.bfloat16) else {input.dtype}
    dtypes = {vector.dtype if vector is not None else None for vector in vectors}
    if input.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or not (
        len(dtypes) <= 1 and dtypes <= allowed
    ):
        return "a torch.nn BatchNorm with dtypes that bnkernels does not support"
    return ""


def _reason_against(add: fx.Node, call: NormCall, memory: MemoryOf) -> str:
    """The reason why an addition cannot be fused into a call; "" if it can."""
    others = [operand for operand in operands(add) if operand is not call.node]
    if not others:
        return "its result is added to itself"
    (other,) = others
    tensor, result = fake(other), fake(call.node)
    if tensor is None or result is None:
        return "added to something that is not a plain tensor"
    if tensor.dtype != result.dtype or tensor.device != result.device or not _same_layout(other, call.node):
        return "added to a tensor of another shape, layout, dtype or device"
    if adds_in_place(add) and operands(add)[0] is other:
        target = memory.of(other)
        if memory.is_shared(target):
            return "the addition writes in place to a tensor with other users"
        derived = {add}
        for node in _after(add):
            aliases = {input for input in node.all_input_nodes if overlap(target, memory.of(input))}
            if not aliases <= derived:
                return "the addition writes in place to a tensor with other users"
            if overlap(target, memory.of(node)):
                derived.add(node)
    return ""


def _match_at_insertion_point(
    call: NormCall, add: fx.Node | None, relu: fx.Node | None, residual: fx.Node | None, memory: MemoryOf
) -> Match | str:
    """The match with its insertion point, or the reason why there is none.

    The fused call replaces the BatchNorm, or, if the residual is computed after that, the addition.
    """
    node, last = call.node, relu or add
    assert last is not None
    between = [each for each in _between(node, last) if each is not add]
    if any(is_barrier(each) for each in between):
        return "a mode may change between it and what follows"
    if add is None or residual is None or residual < node:
        until = [] if add is None else list(_between(node, add))
        if any(overlap(memory.of(residual), memory.written(each)) for each in until):
            return "an operation between it and the addition may change its residual"
        return Match(call, add, relu, residual, node)
    read = memory.of(*(call.arguments[name] for name in ("input", "weight", "bias")))
    statistics = memory.of(*(call.arguments[name] for name in STATISTICS))
    for each in _between(node, add):
        touched = memory.written(each) | (memory.read(each) if call.training else frozenset())
        if overlap(read, memory.written(each)) or overlap(statistics, touched):
            return "an operation between it and the addition may change its input"
    return Match(call, add, relu, residual, add)


def _same_layout(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have the same sizes and strides for all values of dynamic sizes."""
    a, b = fake(one), fake(other)
    if a is None or b is None or a.dim() != b.dim():
        return False
    pairs: list[tuple[Any, Any]] = [*zip(a.shape, b.shape), *zip(a.stride(), b.stride())]
    return all(statically_known_true(x == y) for x, y in pairs)


def _between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    node = start.next
    while node is not end:
        yield node
        node = node.next


def _after(start: fx.Node) -> Iterator[fx.Node]:
    node = start.next
    while node.op != "root":
        yield node
        node = node.next
