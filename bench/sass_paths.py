"""The fast path of a loop: the turn that a thread makes when all its windows are whole and aligned.

A kernel's loop holds, for every window, a 16-byte access and, for a window that is cut or misaligned, accesses element
by element. Which blocks a thread passes when nothing is cut is found from the machine code alone, in whatever order
ptxas put it. A turn is a way from the loop's header to a latch that enters no block twice (a loop within it counts as
one turn of it). Of all turns, the fast path

  1. has the most 16-byte accesses of the kind that is asked for (Kind), then the most of the other kind, then the
     fewest narrower accesses of global memory, then the fewest calls;
  2. does not contradict itself (sass_constants.py): a window that the turn found not to exist is not loaded;
  3. brings the most loaded words to an addition or multiplication: a turn that loads and then computes nothing is none;
     What was chosen so is held fixed, and 2 applies again: what is computed in full was also found to exist;
  4. has the fewest blocks, then the fewest instructions: what tells cut windows apart costs branches or instructions.

Its instructions are a lower bound where step 4 leaves out a block that a thread also passes. A predicated instruction
counts wherever it is: it takes its slot when its predicate is false, and it may be true.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.sass_constants import Ways
from bench.sass_flow import Edge, Flow, Loop, predecessors_of, reverse_postorder
from bench.sass_listing import Instruction

WIDE_BITS = 128

# Ways of unequal blocks that are followed at a time in step 3. More than loops of whole windows have.
_BEAM = 64


class Kind(enum.Enum):
    GLOBAL = "global"
    SHARED = "shared"  # the copy that a block keeps on chip


@dataclass(frozen=True)
class FastPath:
    blocks: tuple[int, ...]
    instructions: tuple[Instruction, ...]

    def count(self, chosen: Callable[[Instruction], bool]) -> int:
        return sum(map(chosen, self.instructions))


def is_wide(instruction: Instruction) -> bool:
    return instruction.bits >= WIDE_BITS


def is_narrow(instruction: Instruction) -> bool:
    """A narrow access of global memory."""
    return instruction.is_global and not is_wide(instruction)


def fast_path(flow: Flow, loop: Loop, kind: Kind, is_window: Callable[[Instruction], bool]) -> FastPath | None:
    """is_window: of the 16-byte accesses, those that are of a tensor or its copy. None if no turn is left."""
    edges = _acyclic(flow, loop)
    successors: dict[int, list[int]] = {}
    for before, after in sorted(edges):
        successors.setdefault(before, []).append(after)
    order = reverse_postorder(successors, loop.header)

    def weight(block: int) -> tuple[int, int, int, int]:
        code = flow.blocks[block].instructions
        wide = [each for each in code if is_wide(each) and is_window(each)]
        on_chip = sum(each.is_shared for each in wide)
        from_memory = sum(each.is_global for each in wide)
        asked, other = (from_memory, on_chip) if kind is Kind.GLOBAL else (on_chip, from_memory)
        return asked, other, -sum(map(is_narrow, code)), -sum(each.base == "CALL" for each in code)

    best, ends = _best(order, edges, loop.latches, {block: weight(block) for block in order})

    def along(kept: frozenset[Edge]) -> list[int]:
        return [block for block in order if block == loop.header or any(block in edge for edge in kept)]

    used = _words_used(flow, loop, order)
    edges, fixed = best, frozenset[int]()
    while True:
        edges = Ways(flow.blocks, along(edges), edges, ends).feasible()
        if not edges and loop.header not in ends:
            return None
        path = _shortest(flow, along(edges), edges, ends, used)
        computing = frozenset(block for block in path.blocks if used[block])
        if computing <= fixed:
            break
        fixed |= computing
        for block in computing:
            edges = _through(along(edges), edges, block)
    way = frozenset(zip(path.blocks, path.blocks[1:]))
    return path if not way or Ways(flow.blocks, path.blocks, way, path.blocks[-1:]).feasible() == way else None


def _through(order: Sequence[int], edges: frozenset[Edge], block: int) -> frozenset[Edge]:
    """The edges of all ways through a block."""
    ahead, behind = {block}, {block}
    for other in order:
        if other in ahead:
            ahead |= {after for before, after in edges if before == other}
    for other in reversed(order):
        if other in behind:
            behind |= {before for before, after in edges if after == other}
    return frozenset((before, after) for before, after in edges if before in ahead or after in behind)


def _acyclic(flow: Flow, loop: Loop) -> frozenset[Edge]:
    """The loop's edges, less those back to a header: its own or that of a loop within it."""
    backward = {(latch, inner.header) for inner in flow.loops for latch in inner.latches}
    return frozenset(
        (block, after)
        for block in loop.blocks
        for after in flow.blocks[block].successors
        if after in loop.blocks and (block, after) not in backward
    )


def _best(
    order: Sequence[int], edges: frozenset[Edge], latches: frozenset[int], weight: dict[int, tuple[int, ...]]
) -> tuple[frozenset[Edge], frozenset[int]]:
    """The edges and the ends of all ways from the first block to a latch whose blocks' weights add up to the most."""
    Weight = tuple[int, ...]

    def add(a: Weight, b: Weight) -> Weight:
        return tuple(x + y for x, y in zip(a, b))

    before = predecessors_of(edges)
    after: dict[int, list[int]] = {}
    for start, end in edges:
        after.setdefault(start, []).append(end)
    arriving: dict[int, Weight] = {order[0]: weight[order[0]]}
    for block in order[1:]:
        known = [arriving[other] for other in before.get(block, ()) if other in arriving]
        if known:
            arriving[block] = add(max(known), weight[block])
    nothing = tuple(0 for _ in weight[order[0]])
    leaving: dict[int, Weight] = {}
    for block in reversed(order):
        known = [add(leaving[other], weight[other]) for other in after.get(block, ()) if other in leaving]
        if block in latches:
            known.append(nothing)
        if known:
            leaving[block] = max(known)
    most = add(weight[order[0]], leaving[order[0]])
    best = frozenset(
        (start, end)
        for start, end in edges
        if start in arriving and end in leaving and add(add(arriving[start], weight[end]), leaving[end]) == most
    )
    return best, frozenset(latch for latch in latches if arriving.get(latch) == most)


# How a loaded word gets from its register to where it is computed with.
_CONVERSIONS = {"MOV", "SHL", "SHF", "LOP3", "PRMT", "SEL", "FSEL", "F2F", "HADD2", "USEL", "I2F"}


def _words_used(flow: Flow, loop: Loop, order: Sequence[int]) -> dict[int, int]:
    """Of each block, as a bit set: the words of wide loads that may reach an addition or multiplication in it."""
    first_bit: dict[int, int] = {}
    for block in order:
        for instruction in flow.blocks[block].instructions:
            if instruction.is_load and is_wide(instruction):
                first_bit[instruction.address] = 4 * len(first_bit)
    used = dict.fromkeys(order, 0)
    entering: dict[int, dict[int, int]] = {block: {} for block in order}
    inside = set(order)
    changed = True
    while changed:
        changed = False
        for block in order:
            held = dict(entering[block])
            for instruction in flow.blocks[block].instructions:
                arriving = 0
                for register in instruction.reads:
                    arriving |= held.get(register, 0)
                if instruction.is_arithmetic:
                    used[block] |= arriving
                carries = instruction.base in _CONVERSIONS or instruction.operation.startswith(("IMAD.U32", "IMAD.MOV"))
                for position, register in enumerate(instruction.writes):
                    if instruction.address in first_bit:
                        now = 1 << (first_bit[instruction.address] + position)
                    else:
                        now = arriving if carries else 0
                    held[register] = now | (held.get(register, 0) if instruction.guard else 0)
            for after in flow.blocks[block].successors:
                if after not in inside:
                    continue
                for register, words in held.items():
                    if words & ~entering[after].get(register, 0):
                        entering[after][register] = entering[after].get(register, 0) | words
                        changed = True
    return used


def _shortest(
    flow: Flow, order: Sequence[int], edges: frozenset[Edge], ends: frozenset[int], covered: dict[int, int]
) -> FastPath:
    """Steps 3 and 4: every block keeps the ways to it that cannot yet be told apart."""
    before = predecessors_of(edges)
    # words that were used -> (blocks, instructions, the way)
    Labels = dict[int, tuple[int, int, tuple[int, ...]]]
    labels: dict[int, Labels] = {}
    for block in order:
        cost = len(flow.blocks[block].instructions)
        found: Labels = {}
        arriving = (
            [(0, (0, 0, ()))]
            if block == order[0]
            else [item for other in before[block] for item in labels[other].items()]
        )
        for words, (blocks, instructions, way) in arriving:
            label = (blocks + 1, instructions + cost, (*way, block))
            reached = words | covered[block]
            if reached not in found or label < found[reached]:
                found[reached] = label
        ranked = sorted(found.items(), key=lambda item: (-item[0].bit_count(), item[1]))
        labels[block] = dict(ranked[:_BEAM])
    _, (_, _, way) = min(
        (item for end in sorted(ends) if end in labels for item in labels[end].items()),
        key=lambda item: (-item[0].bit_count(), item[1]),
    )
    return FastPath(way, tuple(each for block in way for each in flow.blocks[block].instructions))


def in_flight(path: FastPath) -> int:
    """The most wide loads of global memory that are under way when a turn waits for one of them.

    A load is under way from its issue until an instruction waits for its scoreboard. The turn is taken twice, as loads
    of one turn may be waited for in the next.
    """
    most = 0
    under_way: list[int | None] = []
    for instruction in [*path.instructions, *path.instructions]:
        if any(board in instruction.waits for board in under_way):
            most = max(most, len(under_way))
            under_way = [board for board in under_way if board not in instruction.waits]
        if instruction.is_load and instruction.is_global and is_wide(instruction):
            under_way.append(instruction.sets)
    return most


def read_too_early(path: FastPath) -> list[Instruction]:
    """Instructions that read what a wide load brings before anything waited for it: there is none unless the scheduling
    words are misread.

    Loads of shared memory end in the order in which they were issued, so that a wait for one is for all before it:
    ptxas gives such a load no scoreboard of its own where a later one is waited for anyway.
    """
    pending: list[Instruction] = []
    early = []
    for instruction in path.instructions:
        waited = [load.sets in instruction.waits for load in pending]
        shared = [at for at, load in enumerate(pending) if load.is_shared and waited[at]]
        pending = [
            load
            for at, load in enumerate(pending)
            if not waited[at] and not (load.is_shared and shared and at < shared[-1])
        ]
        early += [instruction] * any(register in load.writes for load in pending for register in instruction.reads)
        if instruction.is_load and is_wide(instruction):
            pending.append(instruction)
    return early
