"""The reading of machine code: listing, flow, constants, fast path, on snippets. Needs no compiler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.sass_constants import State, step
from bench.sass_flow import analyse
from bench.sass_listing import Function, disassemble, find_disassembler, function_at, parse_listing
from bench.sass_paths import FastPath, Kind, fast_path, in_flight, is_narrow, read_too_early

ROOT = Path(__file__).resolve().parents[2]


def control(sets: int = 7, waits: Sequence[int] = ()) -> int:
    return 7 << 49 | sets << 46 | sum(1 << board for board in waits) << 52


def listing(text: str, name: str = "_ZN3bnk12plain_kernelIfEEvv") -> str:
    """What nvdisasm would print, of an instruction or label a line; " ; sets=5 waits=0,1" behind it schedules it."""
    lines = [f".text.{name}:"]
    address = 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":") or line.startswith("//##"):
            lines.append(("\t" if line.startswith("/") else "") + line)
            continue
        code, _, schedule = line.partition(" ; ")
        fields = dict(part.split("=") for part in schedule.split())
        waits = [int(board) for board in fields.get("waits", "").split(",") if board]
        lines.append(f"        /*{address:04x}*/    {code} ;    /* 0x0000000000000000 */")
        lines.append(
            f"                                         /* {control(int(fields.get('sets', 7)), waits):#018x} */"
        )
        address += 16
    return "\n".join(lines)


def parse(text: str) -> Function:
    (function,) = parse_listing(listing(text).splitlines())
    return function


def only_path(text: str, kind: Kind = Kind.GLOBAL) -> FastPath | None:
    flow = analyse(parse(text))
    (loop,) = flow.loops
    return fast_path(flow, loop, kind, lambda each: True)


def test_what_counts_as_arithmetic():
    """Neither how a half is widened nor how ptxas makes a constant in the pipe of halves."""
    function = parse(
        """
    HFMA2.MMA R4, -RZ, RZ, 0, 0
    HADD2.F32 R5, -RZ, R6.H0_H0
    HFMA2.MMA R7, R8, R9, R10
    FFMA R11, R12, R13, R14
    """
    )
    assert [each.is_arithmetic for each in function.instructions] == [False, False, True, True]


# A window that may be cut, loaded either way; none at all if P1. Then a sum, with a branch an element for a cut window.
CUT = """
.L_loop:
    ISETP.GE.AND P1, PT, R2, R3, PT
    IMAD.MOV.U32 R9, RZ, RZ, RZ
    @P1 BRA `(.L_none)
    IMAD.WIDE R6, R2, R5, R10
    MOV R9, 0x4
.L_none:
    ISETP.GT.AND P2, PT, R9, RZ, PT
    @!P2 BRA `(.L_narrow)
    LDG.E.EF.128 R12, desc[UR4][R6.64] ; sets=2
    BRA `(.L_loaded)
.L_narrow:
    LDG.E.U16 R12, desc[UR4][R6.64] ; sets=3
    IMAD.U32 R12, R12, 0x10000, RZ ; waits=3
.L_loaded:
    ISETP.NE.AND P3, PT, R20, 0x4, PT
    @P3 BRA `(.L_cut)
    FADD R16, R16, R12 ; waits=2
    FADD R16, R16, R13
    FADD R16, R16, R14
    FADD R16, R16, R15
    BRA `(.L_next)
.L_cut:
    ISETP.LT.AND P4, PT, R20, 0x1, PT
    @P4 BRA `(.L_next)
    FADD R16, R16, R12 ; waits=2
.L_next:
    IADD3 R2, R2, 0x1, RZ
    ISETP.LT.AND P0, PT, R2, R4, PT
    @P0 BRA `(.L_loop)
    EXIT
"""


def test_listing_is_parsed():
    function = parse(
        """
        //## File "/src/a/../walk.cuh", line 68 inlined at "/src/kernel.cuh", line 9
        //## File "/src/kernel.cuh", line 9
        LDG.E.EF.128 R20, desc[UR12][R26.64+0x10] ; sets=5 waits=0,3
        @!P4 STG.E.U16 desc[UR12][R26.64], R21
        //## File "/src/kernel.cuh", line 10
        F2F.F64.F32 R4, R20.reuse
        .L_x_1:
        @P0 EXIT
        BRA `(.L_x_1)
        """
    )
    load, store, widen, leave, back = function.instructions
    assert (load.is_global, load.is_load, load.bits, load.sets, load.waits) == (True, True, 128, 5, {0, 3})
    assert load.writes == (20, 21, 22, 23) and load.reads == (26,)
    assert load.places == store.places == (("/src/walk.cuh", 68), ("/src/kernel.cuh", 9))
    assert (store.guard, store.is_store, store.bits, store.sets, store.writes) == ("@!P4", True, 16, None, ())
    assert set(store.reads) == {21, 26} and is_narrow(store)
    assert widen.is_double and widen.writes == (4, 5) and widen.places == (("/src/kernel.cuh", 10),)
    assert function.labels == {".L_x_1": 3} and leave.guard == "@P0"
    assert back.target == ".L_x_1" and not back.is_conditional


def test_a_listing_that_is_not_understood_is_refused():
    text = listing("LDG.E R1, desc[UR4][R2.64]\nEXIT")
    with pytest.raises(ValueError, match="no scheduling word"):
        parse_listing(text.splitlines()[:-1])
    with pytest.raises(ValueError, match="not understood"):
        parse_listing([line.replace("EXIT ;", "EXIT") for line in text.splitlines()])
    with pytest.raises(ValueError, match="indirect branch"):
        analyse(parse("BRX R2 -0x10\nEXIT"))
    with pytest.raises(ValueError, match="no label"):
        analyse(parse("BRA `(.L_elsewhere)"))


def test_loops_nest():
    flow = analyse(
        parse(
            """
            MOV R1, 0x0
            .L_outer:
            MOV R2, 0x0
            .L_inner:
            IADD3 R2, R2, 0x1, RZ
            @P0 BRA `(.L_inner)
            IADD3 R1, R1, 0x1, RZ
            @P1 BRA `(.L_outer)
            EXIT
            .L_padding:
            BRA `(.L_padding)
            """
        )
    )
    outer, inner = flow.loops  # the padding is never reached
    assert inner.blocks < outer.blocks and flow.irreducible == ()
    assert flow.innermost(inner.header) == inner and flow.innermost(outer.header) == outer
    assert flow.innermost(0) is None


def test_a_cycle_with_two_entries_is_told():
    flow = analyse(parse("@P0 BRA `(.L_b)\n.L_a:\nMOV R1, R2\n.L_b:\nMOV R2, R1\n@P1 BRA `(.L_a)\nEXIT"))
    assert flow.loops == () and len(flow.irreducible) == 1


def test_fast_path_is_of_a_whole_window():
    """Not of the shorter turns: without a window (then it is not loaded), and cut (then not all is added up)."""
    path = only_path(CUT)
    assert path is not None
    operations = [each.operation for each in path.instructions]
    assert operations.count("LDG.E.EF.128") == 1 and operations.count("FADD") == 4
    assert "IMAD.WIDE" in operations and path.count(is_narrow) == 0
    assert in_flight(path) == 1 and read_too_early(path) == []


def test_a_branch_with_two_predicates_is_taken_where_both_hold():
    """As ptxas writes it where two windows must be whole. Without a window P2 is known, and P5 does not matter."""
    both = CUT.replace("@!P2 BRA `(.L_narrow)", "@P2 BRA P5, `(.L_wide)\nBRA `(.L_narrow)\n.L_wide:")
    path = only_path(both)
    assert path is not None and "IMAD.WIDE" in [each.operation for each in path.instructions]


def test_what_is_computed_in_full_was_found_to_exist():
    """A copy on chip is read in any case; only which sums are taken tells whether there is a window."""
    kept = """
        .L_loop:
        ISETP.GE.AND P1, PT, R2, R3, PT
        IMAD.MOV.U32 R9, RZ, RZ, RZ
        LDS.128 R12, [R6] ; sets=2
        @P1 BRA `(.L_none)
        LEA R9, R2, R5, 0x3
        .L_none:
        ISETP.NE.AND P2, PT, R9, 0x8, PT
        @!P2 BRA `(.L_whole)
        ISETP.LT.AND P4, PT, R20, 0x1, PT
        @P4 BRA `(.L_next)
        FADD R16, R16, R12 ; waits=2
        BRA `(.L_next)
        .L_whole:
        FADD R16, R16, R12 ; waits=2
        FADD R16, R16, R13
        FADD R16, R16, R14
        FADD R16, R16, R15
        .L_next:
        @P0 BRA `(.L_loop)
        EXIT
        """
    path = only_path(kept, Kind.SHARED)
    assert path is not None
    operations = [each.operation for each in path.instructions]
    assert operations.count("FADD") == 4 and "LEA" in operations


def test_a_way_without_a_window_is_followed_where_nothing_contradicts_it():
    path = only_path(CUT.replace("ISETP.GT.AND P2, PT, R9, RZ, PT", "ISETP.GT.AND P2, PT, R8, RZ, PT"))
    assert path is not None and "IMAD.WIDE" not in [each.operation for each in path.instructions]


def test_no_turn_without_contradiction_is_told():
    text = CUT.replace("MOV R9, 0x4", "MOV R9, 0x0")
    assert only_path(text) is None


def test_a_narrow_access_that_every_turn_passes_is_found():
    text = CUT.replace("IADD3 R2, R2, 0x1, RZ", "@P6 STG.E.U16 desc[UR4][R8.64], R16\nIADD3 R2, R2, 0x1, RZ")
    path = only_path(text)
    assert path is not None and path.count(is_narrow) == 1


@pytest.mark.parametrize("together", [True, False])
def test_loads_in_flight(together: bool):
    loads = [f"LDG.E.128 R{12 + 4 * i}, desc[UR4][R6.64] ; sets={i}" for i in range(4)]
    sums = [f"FADD R{40 + i}, R{40 + i}, R{12 + 4 * i} ; waits={i}" for i in range(4)]
    body = [*loads, *sums] if together else [line for pair in zip(loads, sums) for line in pair]
    path = only_path("\n".join([".L_loop:", *body, "@P0 BRA `(.L_loop)", "EXIT"]))
    assert path is not None and in_flight(path) == (4 if together else 1)


def test_loads_that_share_a_scoreboard_are_waited_for_together():
    body = [f"LDG.E.128 R{12 + 4 * i}, desc[UR4][R6.64] ; sets={i // 2}" for i in range(4)]
    body += ["FADD R40, R40, R12 ; waits=0", "FADD R41, R41, R20 ; waits=1"]
    path = only_path("\n".join([".L_loop:", *body, "@P0 BRA `(.L_loop)", "EXIT"]))
    assert path is not None and in_flight(path) == 4 and read_too_early(path) == []
    unwaited = parse("FADD R40, R40, R12").instructions[0]
    assert read_too_early(FastPath(path.blocks, (path.instructions[0], unwaited))) == [unwaited]


def test_loads_of_shared_memory_end_in_their_order():
    """Waiting for the second is waiting for the first, which has no scoreboard; a third is still under way."""
    body = (
        "LDS.128 R12, [R6]\nLDS.128 R16, [R7] ; sets=1\nLDS.128 R20, [R8]\nFADD R1, R1, R16 ; waits=1\nFADD R2, R2, R12"
    )
    known = parse(body).instructions
    assert read_too_early(FastPath((0,), known)) == []
    third = parse("FADD R3, R3, R20").instructions[0]
    assert read_too_early(FastPath((0,), (*known, third))) == [third]
    unwaited = parse("FADD R2, R2, R12").instructions[0]
    assert read_too_early(FastPath((0,), (*known[:3], unwaited))) == [unwaited]


def known_after(text: str, state: State) -> State:
    for instruction in parse(text).instructions:
        step(instruction, state)
    return state


def test_constants():
    assert known_after("CS2R R4, SRZ\nMOV R6, 0xffffffff", {}) == {"R4": 0, "R5": 0, "R6": 0xFFFFFFFF}
    assert known_after("ISETP.LT.AND P0, PT, R6, RZ, PT", {"R6": 0xFFFFFFFF})["P0"] == 1
    assert known_after("ISETP.LT.U32.AND P0, PT, R6, RZ, PT", {"R6": 0xFFFFFFFF})["P0"] == 0
    # Whatever is unknown, "and false" is false and "or true" is true.
    assert known_after("ISETP.GT.AND.EX P0, PT, R1, R2, PT, P1", {}) == {}
    assert known_after("ISETP.GT.AND P0, PT, R1, R2, P1", {"P1": 0})["P0"] == 0
    assert known_after("ISETP.GT.OR P0, PT, R1, R2, !P1", {"P1": 0})["P0"] == 1
    assert known_after("PLOP3.LUT P2, PT, P0, P1, PT, 0xa8, 0x0", {"P1": 1})["P2"] == 1
    assert "P2" not in known_after("PLOP3.LUT P2, PT, P0, P1, PT, 0xa8, 0x0", {"P1": 0, "P2": 1})
    # A result that is not modelled, and one that may not be written, are unknown.
    assert known_after("IADD3 R4, P1, R5, R6, RZ", {"R4": 1, "P1": 1, "R5": 2}) == {"R5": 2}
    assert known_after("@P3 MOV R4, 0x2", {"R4": 1}) == {}
    assert known_after("@P3 MOV R4, 0x2", {"R4": 1, "P3": 0}) == {"R4": 1, "P3": 0}


def test_functions_of_the_source_are_told_by_line():
    source = (ROOT / "csrc" / "cuda" / "kernels" / "persistent_forward.cuh").read_text().splitlines()

    def at(text: str) -> str:
        (line,) = [number for number, line in enumerate(source, 1) if text in line]
        return function_at(source, line)

    assert at("add(element, values[element] - pivot[element % kColumns]);") == "add_tile"
    assert at("load_vectors(x, accesses, bits, HintedLoads{evict_last()});") == "sum_deviations"
    assert at("cache_vectors(cache, accesses, first, bits);") == "persistent_forward_kernel"


def test_disassembler_that_is_missing_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        find_disassembler(tmp_path / "nvcc")
    tool = tmp_path / "nvdisasm"
    tool.write_text("#!/bin/sh\necho not a cubin >&2\nexit 3\n")
    tool.chmod(0o755)
    assert find_disassembler(tmp_path / "nvcc") == tool
    with pytest.raises(RuntimeError, match="exit code 3"):
        disassemble(tool, b"")
