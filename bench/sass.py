"""What the main loops of each kernel are made of, as machine code: widths, loads in flight, instructions an element.

    python -m bench.sass [--arch sm_90] [-j N]

Compiles the device code of csrc/cuda/*.cu with the flags of setup.py and reads nvdisasm's listing. Needs nvcc and
nvdisasm (the toolkit's, or the one that comes with triton), no GPU.

A *main loop* is an innermost loop with a 16-byte access of a tensor in global memory, or of the copy of it that a block
keeps in shared memory. Loops of functions called *_in_double do not count: they run where sums overflowed. Each kernel
must have the main loops that LOOPS names; one that lost its 16-byte accesses is missed there. Of each, the *fast path*
is looked at: the turn that a thread makes when all its windows are whole and aligned (bench/sass_paths.py defines it).
A loop whose turn either loads from memory or takes the kept copy has one fast path for each.

A kernel goes through windows that are known to be whole in loops of their own (visit_tiles, in visit_vectors.cuh of
csrc/cuda), and through others, which it has to look at, in a second form of them:

  windows        whole, where all rows begin and end on 16 bytes; any, where they do not, and for the last few of a
                 thread. Of these the fast path is a tile that happens to be whole

  add            in a main loop's name: an epilogue's residual, which the fast path, as the longest, loads and adds.
                 With a ReLU alone a turn is shorter

  16-byte        16-byte global accesses on the fast path, of all global accesses on it
  in flight      16-byte loads under way when the first is waited for, of those that a turn has: what hides latency
  double         instructions on it for the double-precision units, an element
  instructions   on it, an element: 8 elements to a window of 16-bit ones, 4 of float, 2 of double
  of budget      that, over the issue slots that a multiprocessor's 128 lanes have while memory moves the loop's bytes:
                 SLOTS_PER_BYTE for each byte that the fast path reads and writes. At 1, issuing takes all the time that
                 moving takes, and one does not hide behind the other any more

An element that is kept goes through the loops that touch the kept copy, one that is not through the others: their sums
stand below a kernel's loops, for whole windows and for any. What is counted is what is issued, once; units that take
longer for an instruction (double precision, conversions to it) may be busy before all slots are used.
Exit code 0: as it must be; 1: a kernel is not (each is named); 2: it could not be looked at.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench, where this file is run as a script

from bench import device_code
from bench.markdown import table
from bench.registers import Usage, parse_ptxas
from bench.sass_flow import Flow, Loop, analyse
from bench.sass_listing import Function, Instruction, Place, disassemble, find_disassembler, function_at
from bench.sass_paths import FastPath, Kind, fast_path, in_flight, is_narrow, is_wide

# An H200: 132 multiprocessors of 128 lanes at 1.98 GHz, against the 4.3 TB/s of a device copy. For 16-bit elements that
# makes 31 slots an element forward (4 bytes) and 46 backward (6).
SLOTS_PER_BYTE = 132 * 128 * 1.98e9 / 4.3e12

# 16-byte loads that a thread must have in flight, and where it has fewer, by variant and loop of whole windows: behind
# a ReLU it holds an end of an interval for each of its columns as well. An entry that no longer holds is an offence.
IN_FLIGHT = 4
FEWER_IN_FLIGHT: dict[tuple[str, str], int] = {
    **{
        (f"resident_backward_kernel<{element}, {layout}> behind relu", "load, write"): 2
        for element in ("NS_8BFloat16E", "NS_4HalfE", "f", "d")
        for layout in (1, 2)
    },
    **{
        (f"{kernel}<{element}, 1> behind relu", role): 3
        for element in ("NS_8BFloat16E", "NS_4HalfE")
        for kernel, role in (("grad_sums_kernel", "load"), ("grad_input_kernel", "load, write"))
    },
    **{(f"normalize_kernel<{element}, 1> fused", "load, add, write"): 7 for element in ("NS_8BFloat16E", "NS_4HalfE")},
    ("resident_backward_kernel<f, 1> behind relu", "load, keep"): 7,
    ("resident_backward_kernel<f, 2> behind relu", "load, keep"): 7,
    ("resident_backward_kernel<d, 2> behind relu", "load, keep"): 4,
}

# The main loops of each kernel, by what their fast paths do.
LOOPS = {
    "statistics_kernel": {"load"},
    "normalize_kernel": {"load, write"},
    "grad_sums_kernel": {"load"},
    "grad_input_kernel": {"load, write"},
    "persistent_forward_kernel": {"load, keep", "kept", "load", "kept, write", "load, write"},
    "persistent_backward_kernel": {
        "load, keep",
        "kept, write",
        "load, write",
    },  # one loop for what is kept and what is not
}
# Kernels of which no turn of a loop of any windows can be told: two tensors' checks of every window, which ptxas has
# merged. They are held to whole windows alone. An entry that no longer holds is an offence as well.
UNTOLD = {f"grad_sums_kernel<{element}, 0>" for element in ("NS_8BFloat16E", "NS_4HalfE", "f", "d")}
UNTOLD |= {f"grad_sums_kernel<{element}, 0> behind relu" for element in ("NS_8BFloat16E", "NS_4HalfE", "f")}
# Kernels whose loop of whole windows, of one window a turn, ptxas has made one with that of any. As UNTOLD, and as
# FEWER_IN_FLIGHT, without entries that no longer hold.
MERGED = {
    f"resident_backward_kernel<{element}, 2> behind relu": {"load, write"} for element in ("NS_8BFloat16E", "NS_4HalfE")
}
# What is added to whole windows that are at hand is loaded ahead, all together; else one by one (ResidualTile, in
# epilogue.cuh).
ADDED_AHEAD = {("normalize_kernel", "load, add, write"), ("persistent_forward_kernel", "kept, add, write")}

# Tensors that a window is loaded of, where it is not one.
LOADED = {"grad_sums_kernel": 2, "grad_input_kernel": 2, "persistent_backward_kernel": 2}

# The functions through which the copy on chip is reached, wherever they are inlined.
KEPT_ACCESS = {"operator[]", "fetch_tile", "keep_tile"}
FALLBACK = re.compile(r"\w+_rescued")
# The function through which whole windows are visited, and the file of what is added to them.
WHOLE = "visit_whole"
EPILOGUE = "epilogue.cuh"

_ELEMENT = re.compile(r"_kernelI(NS_8BFloat16E|NS_4HalfE|f|d)")
_LAYOUT = re.compile(r"LayoutE(\d)E")
_EPILOGUE = re.compile(r"LayoutE\dELb1E")
_BYTES = {"NS_8BFloat16E": 2, "NS_4HalfE": 2, "f": 4, "d": 8}


@dataclass(frozen=True)
class MainLoop:
    kernel: str  # without template arguments
    place: Place  # in the kernel, of its first 16-byte access
    path: FastPath
    element_bytes: int

    def _wide(self, base: str) -> int:
        return self.path.count(lambda each: each.base == base and is_wide(each))

    @property
    def loads(self) -> int:
        return self._wide("LDG")

    @property
    def added(self) -> int:
        """Of the loads, those of a residual."""
        return self.path.count(is_added)

    @property
    def stores(self) -> int:
        return self._wide("STG")

    @property
    def kept_loads(self) -> int:
        return self._wide("LDS")

    @property
    def kept_stores(self) -> int:
        return self._wide("STS")

    @property
    def narrow(self) -> int:
        return self.path.count(is_narrow)

    @property
    def role(self) -> str:
        parts = {
            "load": self.loads - self.added,
            "kept": self.kept_loads,
            "add": self.added,
            "keep": self.kept_stores,
            "write": self.stores,
        }
        return ", ".join(part for part, count in parts.items() if count)

    @property
    def is_whole(self) -> bool:
        accesses = (each for each in self.path.instructions if (each.is_global or each.is_shared) and is_wide(each))
        return any(WHOLE in _functions(each.places) for each in accesses)

    @property
    def elements(self) -> int:
        windows = self.stores or (self.loads + self.kept_loads) / LOADED.get(self.kernel, 1)
        return round(windows * 16 / self.element_bytes)

    @property
    def in_flight(self) -> int:
        return in_flight(self.path)

    @property
    def doubles(self) -> float:
        return self.path.count(lambda each: each.is_double) / self.elements

    @property
    def instructions(self) -> float:
        return len(self.path.instructions) / self.elements

    @property
    def slots(self) -> float:
        return SLOTS_PER_BYTE * 16 * (self.loads + self.stores) / self.elements


@dataclass(frozen=True)
class Kernel:
    name: str  # as the linker knows it
    usage: Usage
    function: Function
    loops: tuple[MainLoop, ...]
    unknown: tuple[str, ...]  # what could not be told

    @property
    def plain_name(self) -> str:
        named = re.search(r"\d((?:[a-z]+_)+kernel)(?=I)", self.name)
        return named[1] if named else self.name

    def count(self, chosen: Callable[[Instruction], bool]) -> int:
        return sum(map(chosen, self.function.instructions))

    @property
    def epilogue(self) -> str:
        """Which, of device_code.EPILOGUES; empty: none."""
        return device_code.EPILOGUES.get(self.plain_name, "") if _EPILOGUE.search(self.name) else ""

    @property
    def variant(self) -> str:
        """Its name, with template arguments as the linker writes them: grad_sums_kernel<f, 0>, or ...> behind relu."""
        element, layout = _ELEMENT.search(self.name), _LAYOUT.search(self.name)
        name = f"{self.plain_name}<{element[1] if element else ''}, {layout[1] if layout else ''}>"
        return f"{name} {self.epilogue}".strip()

    @property
    def roles(self) -> set[str]:
        """The main loops that it must have, of whole windows."""
        writes = "add, write" if self.epilogue == "fused" else "write"
        return {role.replace("write", writes) for role in LOOPS.get(self.plain_name, set())} - MERGED.get(
            self.variant, set()
        )

    def totals(self) -> dict[str, list[MainLoop]]:
        """The loops that an element goes through: of whole windows or of any, where it is kept and where it is not."""
        found: dict[str, list[MainLoop]] = {}
        for windows, whole in (("whole", True), ("any", False)):
            loops = [loop for loop in self.loops if loop.is_whole is whole]
            kept = [loop for loop in loops if loop.kept_loads or loop.kept_stores]
            others = [loop for loop in loops if loop not in kept]
            if not kept:  # an element goes through one of them
                found |= {f"{windows}, {number}": [loop] for number, loop in enumerate(others)}
                continue
            found[f"{windows}, kept"] = largest(kept)
            if others and whole:  # one loop writes whole windows that are not kept, and others
                found[f"{windows}, not kept"] = largest(others)
        return found


def largest(loops: Iterable[MainLoop]) -> list[MainLoop]:
    """Of those that do the same with fewer or more windows a turn, the one with the most: where most elements go."""
    return list({loop.role: loop for loop in sorted(loops, key=lambda loop: loop.elements)}.values())


@cache
def _lines(file: str) -> tuple[str, ...]:
    path = Path(file)
    return tuple(path.read_text().splitlines()) if path.is_file() else ()


@cache
def _functions(places: tuple[Place, ...]) -> frozenset[str]:
    return frozenset(function_at(_lines(file), line) for file, line in places)


def is_window(instruction: Instruction) -> bool:
    """Of a 16-byte access: whether it is of a tensor's window or of the kept copy of one."""
    if instruction.is_global:
        return True
    return instruction.is_shared and bool(KEPT_ACCESS & _functions(instruction.places))


def is_added(instruction: Instruction) -> bool:
    """Of a window of what an epilogue adds."""
    wide = instruction.is_global and instruction.is_load and is_wide(instruction)
    return wide and any(Path(file).name == EPILOGUE for file, _ in instruction.places)


def find_main_loops(kernel: str, element_bytes: int, flow: Flow) -> tuple[list[MainLoop], list[str]]:
    """A kernel's, and what could not be told."""
    found: list[MainLoop] = []
    unknown = [f"a cycle with two entries: blocks {before} and {after}" for before, after in flow.irreducible]
    own: dict[Loop, list[Instruction]] = {}
    for number, block in enumerate(flow.blocks):
        if (loop := flow.innermost(number)) is not None:
            own.setdefault(loop, []).extend(block.instructions)
    for loop in flow.loops:
        wide = [each for each in own[loop] if (each.is_global or each.is_shared) and is_wide(each) and is_window(each)]
        if not wide or any(FALLBACK.fullmatch(name) for each in wide for name in _functions(each.places)):
            continue
        place = wide[0].places[-1] if wide[0].places else ("", 0)
        paths: list[FastPath] = []
        for kind in Kind:
            path = fast_path(flow, loop, kind, is_window)
            if path is None:
                unknown.append(f"no turn of the loop at {place[0]}:{place[1]} is without contradiction")
            elif path not in paths:
                paths.append(path)
        found += [MainLoop(kernel, place, path, element_bytes) for path in paths]
    return found, unknown


def look_at(compiled: device_code.Compiled, disassembler: Path) -> list[Kernel]:
    """The kernels of one source. ValueError where the listing is not understood."""
    usages = {usage.kernel: usage for usage in parse_ptxas(compiled.ptxas_log)}
    kernels = []
    for function in disassemble(disassembler, compiled.cubin):
        element = _ELEMENT.search(function.name)
        loops: list[MainLoop] = []
        unknown: list[str] = []
        if element:
            kernel = Kernel(function.name, usages[function.name], function, (), ())
            loops, unknown = find_main_loops(kernel.plain_name, _BYTES[element[1]], analyse(function))
        kernels.append(Kernel(function.name, usages[function.name], function, tuple(loops), tuple(unknown)))
    return kernels


def measure(sources: Iterable[Path], arch: str, jobs: int) -> list[Kernel]:
    nvcc = device_code.find_nvcc()
    disassembler = find_disassembler(nvcc)
    with ThreadPoolExecutor(jobs) as pool:  # -lineinfo as in setup.py: it changes no instruction
        work = [pool.submit(device_code.compile_device_code, nvcc, source, arch, ["-lineinfo"]) for source in sources]
        kernels = [kernel for done in work for kernel in look_at(done.result(), disassembler)]
    return list({kernel.name: kernel for kernel in kernels}.values())  # the finishing kernels are in each source


def offences(kernel: Kernel) -> list[str]:
    """What is not as it must be."""
    found = [*kernel.unknown]
    if kernel.variant in UNTOLD:
        found = [] if found else ["every loop is told: no longer to be named in UNTOLD"]
    if not kernel.usage.in_registers or kernel.count(lambda each: each.is_local):
        found.append(f"local memory: a stack frame of {kernel.usage.stack_bytes} bytes")
    roles = {loop.role for loop in kernel.loops if loop.is_whole}
    found += [f"no main loop '{role}' of whole windows" for role in sorted(kernel.roles - roles)]
    found += [f"a loop '{role}' of its own: not to be named in MERGED" for role in sorted(roles - kernel.roles)]
    for loop in kernel.loops:
        where = f"loop '{loop.role}' at {Path(loop.place[0]).name}:{loop.place[1]}"
        if loop.narrow:
            found.append(f"{where}: {loop.narrow} narrow global accesses on the fast path")
        if calls := loop.path.count(lambda each: each.base == "CALL"):
            found.append(f"{where}: {calls} calls on the fast path")
        ahead = loop.is_whole and (kernel.plain_name, loop.role) in ADDED_AHEAD
        together = loop.loads if ahead else loop.loads - loop.added
        fewer = FEWER_IN_FLIGHT.get((kernel.variant, loop.role))
        if together and loop.in_flight < min(fewer or IN_FLIGHT, IN_FLIGHT):
            found.append(f"{where}: {loop.in_flight} loads in flight")
        if fewer and loop.is_whole and loop.in_flight != fewer:
            found.append(f"{where}: {loop.in_flight} loads in flight, not what FEWER_IN_FLIGHT names")
        if loop.in_flight < min(fewer or together, together):
            found.append(f"{where}: of {together} loads a turn, {loop.in_flight} are in flight together")
    for name, loops in kernel.totals().items():
        instructions, slots = sum(loop.instructions for loop in loops), sum(loop.slots for loop in loops)
        if instructions > slots:
            found.append(f"an element, {name}: {instructions:.1f} instructions, {slots:.1f} slots")
    return found


def _ratio(instructions: float, slots: float) -> str:
    return f"{instructions / slots:.2f}" if slots else "-"


def render_loops(kernels: Sequence[Kernel], names: dict[str, str]) -> str:
    rows = []
    for kernel in kernels:
        for loop in kernel.loops:
            wide = loop.loads + loop.stores
            rows.append(
                [
                    f"`{names[kernel.name]}`",
                    loop.role,
                    "whole" if loop.is_whole else "any",
                    f"{Path(loop.place[0]).name}:{loop.place[1]}",
                    f"{wide}/{wide + loop.narrow}" if wide else "-",
                    f"{loop.in_flight}/{loop.loads}" if loop.loads else "-",
                    f"{loop.doubles:.2f}",
                    f"{loop.instructions:.1f}",
                    _ratio(loop.instructions, loop.slots),
                ]
            )
        for name, loops in kernel.totals().items():
            instructions, slots = sum(loop.instructions for loop in loops), sum(loop.slots for loop in loops)
            doubles = sum(loop.doubles for loop in loops)
            if len(loops) == 1:
                continue
            rows.append(
                [
                    f"`{names[kernel.name]}`",
                    f"**sum, {name}**",
                    "",
                    "",
                    "",
                    "",
                    f"{doubles:.2f}",
                    f"**{instructions:.1f}**",
                    f"**{_ratio(instructions, slots)}**",
                ]
            )
    header = ["kernel", "main loop", "windows", "at", "16-byte", "in flight", "double", "instructions", "of budget"]
    return table(header, rows, left=4)


def render_kernels(kernels: Sequence[Kernel], names: dict[str, str]) -> str:
    """Of whole kernels, slow paths and all."""

    def widths(kernel: Kernel, load: bool) -> str:
        counts = Counter(each.bits for each in kernel.function.instructions if each.is_global and each.is_load is load)
        return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True)) or "-"

    rows = [
        [
            f"`{names[kernel.name]}`",
            str(kernel.usage.registers),
            str(kernel.usage.spill_store_bytes + kernel.usage.spill_load_bytes),
            str(kernel.usage.shared_bytes),
            widths(kernel, load=True),
            widths(kernel, load=False),
            str(kernel.count(lambda each: each.base == "BAR")),
            str(kernel.count(lambda each: each.is_double)),
            str(len(kernel.function.instructions)),
        ]
        for kernel in kernels
    ]
    header = ["kernel", "registers", "spills B", "shared B", "global loads, bits", "global stores, bits"]
    return table([*header, "barriers", "double", "instructions"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description="What the main loops of each kernel are made of, as machine code.")
    parse.add_argument("--arch", default="sm_90", help="default: sm_90")
    parse.add_argument("-j", "--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    options = parse.parse_args(arguments)
    if not device_code.is_arch(options.arch):
        parse.error(f"an architecture is written sm_90, not {options.arch}")
    try:
        kernels = measure(device_code.sources(), options.arch, max(1, options.jobs))
    except (RuntimeError, ValueError) as error:  # BuildError is a RuntimeError
        print(error, file=sys.stderr)
        return 2
    if not kernels:
        print("no kernel found in csrc/cuda", file=sys.stderr)
        return 2
    names = device_code.demangle([kernel.name for kernel in kernels])
    kernels.sort(key=lambda kernel: names[kernel.name])
    print(f"Whole kernels on {options.arch}\n\n{render_kernels(kernels, names)}\n")
    print(f"Main loops on {options.arch}, fast path, an element\n\n{render_loops(kernels, names)}\n")
    bad = [(kernel, found) for kernel in kernels if (found := offences(kernel))]
    loops = sum(len(kernel.loops) for kernel in kernels)
    print(f"{len(kernels)} kernels, {loops} fast paths; {len(bad)} kernels are not as they must be")
    for kernel, found in bad:
        for line in found:
            print(f"  {names[kernel.name]}: {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
