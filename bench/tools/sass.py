"""Main loops of each kernel as machine code: widths of memory accesses, instructions per element, registers, spills.

    python -m bench.tools.sass [--arch sm_90] [-j N] [SOURCE.cu ...]

Compiles csrc/cuda/**/*.cu, or the sources given, with the flags of setup.py and reads nvdisasm's listing. Needs nvcc
and nvdisasm (from the toolkit or from the triton package), no GPU.

A loop is the code between a backward branch and its target. A *main loop* is an innermost loop with a 128-bit access of
global memory; a *full-vector* loop is a main loop in which every access of global and shared memory has 128 bits. The
kernels visit full vectors (FullVector, csrc/cuda/device/vector_access.cuh) in loops of their own, so each kernel must
have exactly the full-vector loops of LOOPS: a narrower access in one of them makes that loop a mixed loop, and it is
reported as missing. Vectors that may be partial are visited in mixed loops, which hold both widths.

  loop           what it does: `load` from global memory, read what is `cached` in shared memory, `cache` in shared
                 memory, `write` to global memory
  128-bit        128-bit accesses of global and shared memory in one iteration, of all such accesses
  loads          128-bit global loads in one iteration: at least MIN_LOADS in a full-vector loop, to hide their latency
  instructions   of a full-vector loop per element (8 elements per vector of a 16-bit dtype, 4 of float, 2 of double).
                 An upper bound: an instruction on a path that is rarely taken counts too
  of slots       instructions, divided by the issue slots of a multiprocessor while memory moves the bytes of the loop
                 (SLOTS_PER_BYTE). Above 1 the loop is bound by instruction issue rather than by memory

Exit code 0: all kernels conform; 1: some do not, and each is named; 2: the code could not be compiled or read.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.markdown import table
from bench.tools import device_code
from bench.tools.registers import Usage, parse_ptxas

# H200: 132 multiprocessors that issue 128 lanes at 1.98 GHz, against the 4.3 TB/s of a device copy. For 16-bit elements
# this is 31 slots per element forward (4 bytes) and 46 backward (6 bytes).
SLOTS_PER_BYTE = 132 * 128 * 1.98e9 / 4.3e12
# A full-vector loop of statistics_kernel holds the fallback in double for tiles whose squares overflow, which counts.
MAX_OF_SLOTS = {"statistics_kernel": 1.2}
MIN_LOADS = 4

# The full-vector loops of each kernel and their number. Vectors that a persistent kernel could not cache are read and
# written in a loop that visits full and partial vectors: always a mixed loop, so not in this table.
LOOPS: dict[str, Counter[str]] = {
    "statistics_kernel": Counter({"load": 1}),
    "normalize_kernel": Counter({"load, write": 1}),
    "grad_sums_kernel": Counter({"load": 1}),
    "grad_input_kernel": Counter({"load, write": 2}),  # backward of training and of evaluation
    # Caching loads 8 vectors per iteration, then 4.
    "persistent_forward_kernel": Counter({"load, cache": 2, "load": 1, "cached, write": 1}),
    "persistent_backward_kernel": Counter({"load, cache": 1, "cached, write": 1}),
}
# Tensors that a loop reads per element, where it is more than one.
TENSORS = {"grad_sums_kernel": 2, "persistent_backward_kernel": 2}

_BYTES = {"NS_8BFloat16E": 2, "NS_4HalfE": 2, "f": 4, "d": 8}
_KERNEL = re.compile(r"\d((?:[a-z]+_)+kernel)I(NS_8BFloat16E|NS_4HalfE|f|d)")
_EPILOGUE = re.compile(r"LayoutE\dELb1E")

_SECTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L\w+):$")
_CODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;$")
_TARGET = re.compile(r"`\((.+?)\)")
_INDIRECT = {"BRX", "BRXU", "JMP", "JMX", "JMXU"}


@dataclass(frozen=True)
class Instruction:
    operation: str  # "LDG.E.EF.128"
    target: int | None  # index of the instruction that a branch leads to

    @property
    def base(self) -> str:
        return self.operation.split(".", 1)[0]

    @property
    def bits(self) -> int:
        """Width of a memory access per thread."""
        for modifier in self.operation.split(".")[1:]:
            if modifier in {"U8", "S8"}:
                return 8
            if modifier in {"U16", "S16"}:
                return 16
            if modifier in {"64", "128", "256"}:
                return int(modifier)
        return 32


@dataclass(frozen=True)
class Function:
    name: str  # mangled
    instructions: tuple[Instruction, ...]


def parse_listing(lines: Iterable[str]) -> list[Function]:
    """The functions in the output of `nvdisasm -c`. ValueError for a line or a branch that is not understood."""
    functions: list[Function] = []
    name = ""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}

    def close() -> None:
        instructions = []
        for operation, operands in code:
            base = operation.split(".", 1)[0]
            if base in _INDIRECT:
                raise ValueError(f"{name}: indirect branch {operation}")
            target = _TARGET.search(operands) if base == "BRA" else None
            if target and target[1] not in labels:
                raise ValueError(f"{name}: no label {target[1]}")
            instructions.append(Instruction(operation, labels[target[1]] if target else None))
        if name:
            functions.append(Function(name, tuple(instructions)))

    for line in map(str.rstrip, lines):
        if section := _SECTION.match(line):
            close()
            name, code, labels = section[1], [], {}
        elif label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _CODE.match(line):
            code.append((found[1], found[2]))
        elif re.match(r"^\s+/\*[0-9a-f]{4,}\*/", line):
            raise ValueError(f"not understood: {line.strip()}")
    close()
    return functions


def innermost_loops(function: Function) -> list[tuple[Instruction, ...]]:
    """Code from the target of a backward branch to the branch, where it holds no other such range."""
    code = function.instructions
    ranges = {(each.target, at) for at, each in enumerate(code) if each.target is not None and each.target <= at}
    inner = [
        (first, last)
        for first, last in sorted(ranges)
        if not any(first <= start and end <= last for start, end in ranges - {(first, last)})
    ]
    return [code[first : last + 1] for first, last in inner]


@dataclass(frozen=True)
class MainLoop:
    kernel: str  # without template arguments
    element_bytes: int
    instructions: tuple[Instruction, ...]

    def wide(self, *bases: str) -> int:
        """128-bit accesses by these operations."""
        return sum(each.base in bases and each.bits >= 128 for each in self.instructions)

    @property
    def accesses(self) -> int:
        """Accesses of global memory, also through generic addresses, and of shared memory. Atomics do not count."""
        return sum(each.base in {"LDG", "STG", "LD", "ST", "LDS", "STS"} for each in self.instructions)

    @property
    def is_full(self) -> bool:
        return self.accesses == self.wide("LDG", "STG", "LDS", "STS")

    @property
    def loads(self) -> int:
        return self.wide("LDG")

    @property
    def stores(self) -> int:
        return self.wide("STG")

    @property
    def role(self) -> str:
        parts = {"cached": "LDS", "load": "LDG", "cache": "STS", "write": "STG"}
        return ", ".join(part for part, base in parts.items() if self.wide(base))

    @property
    def elements(self) -> float:
        """Per iteration of a full-vector loop."""
        return (self.stores or self.loads / TENSORS.get(self.kernel, 1)) * 16 / self.element_bytes

    @property
    def instructions_per_element(self) -> float:
        return len(self.instructions) / self.elements

    @property
    def of_slots(self) -> float:
        return len(self.instructions) / (SLOTS_PER_BYTE * 16 * (self.loads + self.stores))


@dataclass(frozen=True)
class Kernel:
    usage: Usage
    plain_name: str  # without template arguments
    local_accesses: int  # loads and stores of local memory
    loops: tuple[MainLoop, ...]

    @property
    def name(self) -> str:
        return self.usage.kernel

    @property
    def expected_loops(self) -> Counter[str]:
        loops = LOOPS.get(self.plain_name, Counter())
        if self.plain_name == "persistent_forward_kernel" and _EPILOGUE.search(self.name):  # it loads the residual
            loops = loops - Counter({"cached, write": 1}) + Counter({"cached, load, write": 1})
        return loops


def read_kernel(function: Function, usage: Usage) -> Kernel:
    named = _KERNEL.search(function.name)
    loops: list[MainLoop] = []
    if named:
        all_loops = [MainLoop(named[1], _BYTES[named[2]], code) for code in innermost_loops(function)]
        loops = [loop for loop in all_loops if loop.loads or loop.stores]
    local = sum(each.base in {"LDL", "STL"} for each in function.instructions)
    return Kernel(usage, named[1] if named else function.name, local, tuple(loops))


def find_disassembler(nvcc: Path | None = None) -> Path:
    """nvdisasm of the toolkit, on PATH, or of the triton package. RuntimeError if there is none."""
    candidates = [nvcc.parent / "nvdisasm"] if nvcc else []
    if on_path := shutil.which("nvdisasm"):
        candidates.append(Path(on_path))
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidates.append(Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm")
    for tool in candidates:
        if os.access(tool, os.X_OK):
            return tool
    raise RuntimeError(
        "nvdisasm not found: install the toolkit's (package cuda-nvdisasm) or triton (pip install triton)"
    )


def disassemble(tool: Path, cubin: bytes) -> list[Function]:
    """RuntimeError with nvdisasm's output if it fails."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm failed with exit code {done.returncode}:\n{done.stderr}")
    return parse_listing(done.stdout.splitlines())


def read_kernels(compiled: device_code.Compiled, disassembler: Path) -> list[Kernel]:
    """The kernels of one source. ValueError if the listing is not understood."""
    usages = {usage.kernel: usage for usage in parse_ptxas(compiled.ptxas_log)}
    return [read_kernel(function, usages[function.name]) for function in disassemble(disassembler, compiled.cubin)]


def measure(sources: Iterable[Path], arch: str, jobs: int) -> list[Kernel]:
    nvcc = device_code.find_nvcc()
    disassembler = find_disassembler(nvcc)
    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(device_code.compile_device_code, nvcc, source, arch) for source in sources]
        kernels = [kernel for done in work for kernel in read_kernels(done.result(), disassembler)]
    return list({kernel.name: kernel for kernel in kernels}.values())  # several sources hold the finalize kernels


def offences(kernel: Kernel) -> list[str]:
    """One line for each rule that the kernel breaks."""
    found = []
    if not kernel.usage.in_registers or kernel.local_accesses:
        found.append(f"local memory: {kernel.usage.stack_bytes} bytes of stack, {kernel.local_accesses} accesses")
    full = [loop for loop in kernel.loops if loop.is_full]
    roles = Counter(loop.role for loop in full)
    for role in sorted(roles | kernel.expected_loops):
        if roles[role] != kernel.expected_loops[role]:
            found.append(f"{roles[role]} full-vector loops '{role}', expected {kernel.expected_loops[role]}")
    for loop in full:
        if 0 < loop.loads < MIN_LOADS:
            found.append(f"loop '{loop.role}': {loop.loads} loads per iteration, expected {MIN_LOADS} or more")
        if loop.of_slots > (limit := MAX_OF_SLOTS.get(kernel.plain_name, 1)):
            found.append(f"loop '{loop.role}': {loop.of_slots:.2f} of the issue slots, expected {limit} at most")
    return found


def render(kernels: Sequence[Kernel], names: dict[str, str]) -> str:
    rows = []
    for kernel in kernels:
        spills = kernel.usage.spill_store_bytes + kernel.usage.spill_load_bytes
        columns = [f"`{names[kernel.name]}`", str(kernel.usage.registers), str(spills)]
        for loop in kernel.loops:
            wide = loop.wide("LDG", "STG", "LDS", "STS")
            per_element = [f"{loop.instructions_per_element:.1f}", f"{loop.of_slots:.2f}"] if loop.is_full else ["", ""]
            kind = "full" if loop.is_full else "mixed"
            rows.append([*columns, loop.role, kind, f"{wide}/{loop.accesses}", str(loop.loads), *per_element])
            columns = ["", "", ""]
        if not kernel.loops:
            rows.append([*columns, *[""] * 6])
    header = ["kernel", "registers", "spills B", "loop", "vectors", "128-bit", "loads", "instructions", "of slots"]
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description="Main loops of each kernel as machine code.")
    parse.add_argument("sources", nargs="*", type=Path, metavar="SOURCE.cu", help="default: all of csrc/cuda")
    parse.add_argument("--arch", default="sm_90", help="default: sm_90")
    parse.add_argument("-j", "--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    options = parse.parse_args(arguments)
    if not device_code.is_arch(options.arch):
        parse.error(f"expected an architecture such as sm_90, got {options.arch}")
    try:
        kernels = measure(options.sources or device_code.sources(), options.arch, max(1, options.jobs))
    except (RuntimeError, ValueError) as error:  # BuildError is a RuntimeError
        print(error, file=sys.stderr)
        return 2
    if not kernels:
        print("no kernel found in csrc/cuda", file=sys.stderr)
        return 2
    names = device_code.demangle([kernel.name for kernel in kernels])
    kernels.sort(key=lambda kernel: names[kernel.name])
    print(f"Main loops on {options.arch}\n\n{render(kernels, names)}\n")
    bad = [f"  {names[kernel.name]}: {line}" for kernel in kernels for line in offences(kernel)]
    print("\n".join([f"{len(kernels)} kernels, {len(bad)} offences", *bad]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
