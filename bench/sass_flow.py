"""Control flow of machine code: basic blocks, dominators, natural loops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.sass_listing import Function, Instruction

Edge = tuple[int, int]

_ENDS = {"EXIT", "RET", "KILL", "BPT"}
_INDIRECT = {"BRX", "BRXU", "JMP", "JMX", "JMXU"}


@dataclass(frozen=True)
class Block:
    start: int
    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]  # where its last branch is taken, first the next instruction


@dataclass(frozen=True)
class Loop:
    """All blocks from which a latch is reached without passing the header, which dominates them."""

    header: int
    blocks: frozenset[int]
    latches: frozenset[int]


@dataclass(frozen=True)
class Flow:
    blocks: tuple[Block, ...]
    loops: tuple[Loop, ...]
    # Retreating edges to a block that does not dominate: such a cycle has two entries and is no natural loop.
    irreducible: tuple[Edge, ...]

    def innermost(self, block: int) -> Loop | None:
        """The smallest loop that a block is in."""
        return min(
            (loop for loop in self.loops if block in loop.blocks), key=lambda loop: len(loop.blocks), default=None
        )


def split_blocks(function: Function) -> tuple[Block, ...]:
    """ValueError for an indirect branch: where it leads cannot be told."""
    code = function.instructions
    starts = {0, *(index for index in function.labels.values() if index < len(code))}
    for index, instruction in enumerate(code):
        if instruction.base in _INDIRECT:
            raise ValueError(f"{function.name}: indirect branch at {instruction.address:#x}")
        if instruction.base in _ENDS or instruction.base == "BRA":
            starts.add(index + 1)
        if instruction.base == "WARPSYNC" and instruction.target:
            starts.add(index + 1)
    order = sorted(start for start in starts if start < len(code))
    number = {start: block for block, start in enumerate(order)}
    blocks = []
    for start, end in zip(order, [*order[1:], len(code)]):
        last = code[end - 1]
        following = [number[end]] if end < len(code) else []
        successors: list[int] = following
        if last.base in _ENDS:
            successors = following if last.guard else []
        elif last.base == "BRA" or (last.base == "WARPSYNC" and last.target):
            if last.target not in function.labels:
                raise ValueError(f"{function.name}: no label {last.target}")
            may_go_on = last.is_conditional or last.base == "WARPSYNC"
            successors = [*(following if may_go_on else []), number[function.labels[last.target]]]
        blocks.append(Block(start, code[start:end], tuple(dict.fromkeys(successors))))
    return tuple(blocks)


def reverse_postorder(successors: dict[int, list[int]], entry: int) -> list[int]:
    order: list[int] = []
    seen = {entry}
    stack = [(entry, iter(successors.get(entry, ())))]
    while stack:
        block, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(successors.get(following, ()))))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def predecessors_of(edges: Iterable[Edge]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for before, after in edges:
        found.setdefault(after, []).append(before)
    return found


def dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """Immediate dominators (Cooper, Harvey & Kennedy, "A Simple, Fast Dominance Algorithm", 2001)."""
    rank = {block: position for position, block in enumerate(order)}
    immediate = {order[0]: order[0]}

    def meet(a: int, b: int) -> int:
        while a != b:
            while rank[a] > rank[b]:
                a = immediate[a]
            while rank[b] > rank[a]:
                b = immediate[b]
        return a

    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [before for before in predecessors[block] if before in immediate]
            chosen = known[0]
            for other in known[1:]:
                chosen = meet(chosen, other)
            if immediate.get(block) != chosen:
                immediate[block] = chosen
                changed = True
    return immediate


def analyse(function: Function) -> Flow:
    """Of what is reached from the kernel's entry: helpers behind it are reached by calls alone, and are left out."""
    blocks = split_blocks(function)
    successors = {number: list(block.successors) for number, block in enumerate(blocks)}
    order = reverse_postorder(successors, 0)
    rank = {block: position for position, block in enumerate(order)}
    predecessors = predecessors_of((block, after) for block in order for after in successors[block])
    immediate = dominators(order, predecessors)

    def dominates(a: int, b: int) -> bool:
        while rank[b] > rank[a]:
            b = immediate[b]
        return a == b

    latches: dict[int, set[int]] = {}
    irreducible = []
    for block in order:
        for after in successors[block]:
            if rank[after] > rank[block]:
                continue
            if dominates(after, block):
                latches.setdefault(after, set()).add(block)
            else:
                irreducible.append((block, after))
    loops = []
    for header, ends in latches.items():
        body = {header, *ends}
        waiting = [block for block in ends if block != header]
        while waiting:
            for before in predecessors[waiting.pop()]:
                if before not in body:
                    body.add(before)
                    waiting.append(before)
        loops.append(Loop(header, frozenset(body), frozenset(ends)))
    return Flow(blocks, tuple(sorted(loops, key=lambda loop: loop.header)), tuple(irreducible))
