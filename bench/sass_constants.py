"""Which ways through a piece of machine code contradict themselves.

Registers and predicates are followed as known constants or as unknown, along the ways that are left: a way on which a
branch is taken whose predicate is known to be the other value is none that a thread can go. Only what matters to the
branches is modelled: moves, integer comparisons and logic on predicates; any other result is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from bench.sass_flow import Block, Edge, predecessors_of
from bench.sass_listing import Instruction

# Of "R5", "UR4": an unsigned 32-bit integer; of "P0", "UP0": 0 or 1. What is not there is unknown.
State = dict[str, int]

_NAME = re.compile(r"!?-?~?\|?(U?P\d|U?R\d+)(?:\.reuse)?\|?$")
_PREDICATE = re.compile(r"U?P(\d|T)$")


def _value(operand: str, state: Mapping[str, int]) -> int | None:
    negated = operand.startswith("!")
    name = operand.lstrip("!").removesuffix(".reuse")
    if name in {"PT", "UPT"}:
        return 0 if negated else 1
    if name in {"RZ", "URZ", "SRZ"}:
        return 0
    if re.fullmatch(r"-?0x[0-9a-f]+", name):
        return int(name, 16) & 0xFFFFFFFF
    known = state.get(name)
    return 1 - known if known is not None and negated else known


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


_COMPARE = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _comparison(instruction: Instruction, state: Mapping[str, int]) -> int | None:
    """ISETP.GE.U32.AND P0, PT, a, b, Pc: what goes to P0."""
    modifiers = instruction.modifiers
    left, right, also = (_value(operand, state) for operand in instruction.operands[2:5])
    holds: int | None = None
    if left is not None and right is not None and "EX" not in modifiers:
        if "U32" not in modifiers:
            left, right = _signed(left), _signed(right)
        holds = int(_COMPARE[modifiers[0]](left, right)) if modifiers[0] in _COMPARE else None
    if "AND" in modifiers:
        return 0 if 0 in (holds, also) else 1 if (holds, also) == (1, 1) else None
    if "OR" in modifiers:
        return 1 if 1 in (holds, also) else 0 if (holds, also) == (0, 0) else None
    return None


def _logic(instruction: Instruction, state: Mapping[str, int]) -> int | None:
    """PLOP3.LUT P0, PT, a, b, c, table, 0x0: bit 4a + 2b + c of the table, if it does not hang on what is unknown."""
    choices = [
        (0, 1) if (value := _value(operand, state)) is None else (value,) for operand in instruction.operands[2:5]
    ]
    table = int(instruction.operands[5], 16)
    results = {table >> (4 * a + 2 * b + c) & 1 for a in choices[0] for b in choices[1] for c in choices[2]}
    return results.pop() if len(results) == 1 else None


def written(instruction: Instruction) -> tuple[str, ...]:
    """Every register and predicate whose value changes."""
    if instruction.is_store or not instruction.operands:
        return ()
    names = [f"R{number}" for number in instruction.writes]
    for position, operand in enumerate(instruction.operands[:3]):
        is_predicate = _PREDICATE.fullmatch(operand) is not None
        if position > 0 and not is_predicate:
            if _PREDICATE.fullmatch(instruction.operands[0]) and position == 1 and _NAME.fullmatch(operand):
                names.append(operand.removesuffix(".reuse"))
            break
        if _NAME.fullmatch(operand):
            names.append(operand)
    if instruction.base == "R2P":
        names += [f"P{number}" for number in range(7)]
    if names and names[0].startswith("UR") and ("64" in instruction.modifiers or "WIDE" in instruction.modifiers):
        names.append(f"UR{int(names[0][2:]) + 1}")
    return tuple(names)


_MOVES = {"MOV": 1, "UMOV": 1, "CS2R": 1}


def step(instruction: Instruction, state: State) -> None:
    guard = _value(instruction.guard[1:], state) if instruction.guard else 1
    if guard == 0:
        return
    results: dict[str, int | None] = dict.fromkeys(written(instruction))
    operands = instruction.operands
    if instruction.base in _MOVES:
        value = _value(operands[1], state)
        results = dict.fromkeys(results, value)
    elif instruction.operation.startswith("IMAD.MOV") and operands[1:3] == ("RZ", "RZ"):
        results[operands[0]] = _value(operands[3], state)
    elif instruction.base in {"SEL", "USEL"}:
        chosen, left, right = (_value(operands[position], state) for position in (3, 1, 2))
        results[operands[0]] = left if chosen == 1 else right if chosen == 0 else left if left == right else None
    elif instruction.base in {"ISETP", "UISETP"} and operands[0] in results:
        results[operands[0]] = _comparison(instruction, state)
    elif instruction.base in {"PLOP3", "UPLOP3"} and operands[0] in results:
        results[operands[0]] = _logic(instruction, state)
    for name, value in results.items():
        if value is not None and (guard == 1 or state.get(name) == value):
            state[name] = value
        else:
            state.pop(name, None)


def branch_states(block: Block, state: State) -> dict[int, State]:
    """The blocks that may follow, each with what is known there."""
    last = block.instructions[-1]
    conditions = [*([last.guard[1:]] if last.guard else []), *last.operands[:-1]]
    names = [condition.lstrip("!") for condition in conditions]
    is_plain = last.base == "BRA" and "DIV" not in last.modifiers and all(map(_PREDICATE.fullmatch, names))
    if len(block.successors) < 2 or not is_plain or not conditions:
        return dict.fromkeys(block.successors, state)
    # Taken where all of its predicates hold: "@P3 BRA P4, target" has two.
    known = [_value(condition, state) for condition in conditions]
    following, target = block.successors
    found = {}
    if 0 not in known:
        found[target] = {**state, **{n: int(not c.startswith("!")) for n, c in zip(names, conditions)}}
    if open_ones := [at for at, value in enumerate(known) if value != 1]:
        found[following] = state
        if len(open_ones) == 1:
            name, condition = names[open_ones[0]], conditions[open_ones[0]]
            found[following] = {**state, name: int(condition.startswith("!"))}
    return found


class Ways:
    """The ways through an acyclic piece of a flow graph, from its entry to any of its ends."""

    def __init__(self, blocks: Sequence[Block], order: Sequence[int], edges: Iterable[Edge], ends: Iterable[int]):
        self.blocks = blocks
        self.order = list(order)
        self.entry = self.order[0]
        self.ends = frozenset(ends)
        self.edges = frozenset(edges)
        self._relevant = self._slice()

    def _slice(self) -> dict[int, list[Instruction]]:
        """Of each block, the instructions on which a branch may hang."""
        code = [instruction for block in self.order for instruction in self.blocks[block].instructions]
        outputs = {id(instruction): written(instruction) for instruction in code}
        wanted: set[str] = set()
        for block in self.order:
            last = self.blocks[block].instructions[-1]
            if len(self.blocks[block].successors) > 1:
                wanted |= _mentioned([last.guard[1:], *last.operands[:-1]])
        modelled = {*_MOVES, "SEL", "USEL", "ISETP", "UISETP", "PLOP3", "UPLOP3", "IMAD"}
        size = -1
        while size != len(wanted):
            size = len(wanted)
            for instruction in code:
                if instruction.base in modelled and wanted.intersection(outputs[id(instruction)]):
                    if instruction.base != "IMAD" or instruction.operation.startswith("IMAD.MOV"):
                        wanted |= _mentioned(instruction.operands)
                    wanted |= _mentioned([instruction.guard[1:]])
        return {
            block: [
                instruction
                for instruction in self.blocks[block].instructions
                if wanted.intersection(outputs[id(instruction)])
            ]
            for block in self.order
        }

    def _reaches(self, edges: frozenset[Edge], ends: frozenset[int]) -> bool:
        """Whether, with what is known on them, the edges lead from the entry to one of the ends."""
        before = predecessors_of(edges)
        leaving: dict[Edge, State] = {}
        for block in self.order:
            if block == self.entry:
                state: State = {}
            else:
                arriving = [leaving[other, block] for other in before.get(block, ()) if (other, block) in leaving]
                if not arriving:
                    continue
                state = dict(arriving[0])
                for other_state in arriving[1:]:
                    state = {name: value for name, value in state.items() if other_state.get(name) == value}
            if block in ends:
                return True
            for instruction in self._relevant[block]:
                step(instruction, state)
            for after, known in branch_states(self.blocks[block], state).items():
                if (block, after) in edges:
                    leaving[block, after] = known
        return False

    def _goes_through(self, edges: frozenset[Edge], edge: Edge) -> bool:
        """Whether a way that uses an edge leads to an end."""
        ahead, behind = {edge[1]}, {edge[0]}
        for block in self.order:
            if block in ahead:
                ahead |= {after for before, after in edges if before == block}
        for block in reversed(self.order):
            if block in behind:
                behind |= {before for before, after in edges if after == block}
        left = {other for other in edges if other == edge or other[0] in ahead or other[1] in behind}
        return self._reaches(frozenset(left), self.ends & ahead)

    def feasible(self) -> frozenset[Edge]:
        """The edges, less those through which every way contradicts itself. Empty if nothing is left."""
        edges = self.edges
        if not self._reaches(edges, self.ends):
            return frozenset()
        changed = True
        while changed:
            changed = False
            leaving: dict[int, list[Edge]] = {}
            for edge in sorted(edges):
                leaving.setdefault(edge[0], []).append(edge)
            for block in self.order:
                choices = leaving.get(block, [])
                for edge in choices:
                    if len(choices) > 1 and edge in edges and not self._goes_through(edges, edge):
                        edges = self._connected(edges - {edge})
                        changed = True
        return edges

    def _connected(self, edges: frozenset[Edge]) -> frozenset[Edge]:
        """Those that lie on a way from the entry to an end."""
        ahead = {self.entry}
        for block in self.order:
            if block in ahead:
                ahead |= {after for before, after in edges if before == block}
        behind = set(self.ends)
        for block in reversed(self.order):
            if block in behind:
                behind |= {before for before, after in edges if after == block}
        return frozenset((before, after) for before, after in edges if before in ahead and after in behind)


def _mentioned(operands: Iterable[str]) -> set[str]:
    return {match[1] for operand in operands if (match := _NAME.fullmatch(operand))}
