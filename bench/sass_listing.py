"""Machine code as nvdisasm lists it: instructions, what they touch, where in the source they are from.

An instruction carries its scheduling word beside its operation: which of a warp's six scoreboards it sets (and leaves
when its result is there), and which it waits for before it issues. NVIDIA does not document the word; its place and
fields have been the same since Volta (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking",
2018, section 2.1). tests/tooling/test_sass.py holds the reading to the code itself: no load's result may be read before a wait.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# A position in the source, innermost first where functions were inlined.
Place = tuple[str, int]


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@!P0", or "" where it always executes
    operation: str  # "LDG.E.EF.128"
    operands: tuple[str, ...]
    control: int  # the upper half of its encoding
    places: tuple[Place, ...] = ()

    @property
    def base(self) -> str:
        return self.operation.split(".", 1)[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.operation.split(".")[1:])

    @property
    def sets(self) -> int | None:
        """The scoreboard that is up until the result is there."""
        board = self.control >> 46 & 7
        return None if board == 7 else board

    @property
    def waits(self) -> frozenset[int]:
        """The scoreboards that must be down before it issues."""
        mask = self.control >> 52 & 0x3F
        return frozenset(board for board in range(6) if mask >> board & 1)

    @property
    def is_global(self) -> bool:
        """Global memory, also through a generic address. Atomics are left out: no tensor is accessed by them."""
        return self.base in {"LDG", "STG", "LD", "ST"}

    @property
    def is_shared(self) -> bool:
        return self.base in {"LDS", "STS"}

    @property
    def is_local(self) -> bool:
        return self.base in {"LDL", "STL"}

    @property
    def is_load(self) -> bool:
        return self.base in {"LDG", "LDS", "LD", "LDL"}

    @property
    def is_store(self) -> bool:
        return self.base in {"STG", "STS", "ST", "STL"}

    @property
    def is_asynchronous_copy(self) -> bool:
        """From global to shared memory, past the registers."""
        return self.base in {"LDGSTS", "UBLKCP", "UBLKPF", "UTMALDG", "UTMASTG"}

    @property
    def bits(self) -> int:
        """Of a memory access, for each thread."""
        for modifier in self.modifiers:
            if modifier in {"U8", "S8"}:
                return 8
            if modifier in {"U16", "S16"}:
                return 16
            if modifier in {"64", "128", "256"}:
                return int(modifier)
        return 32

    @property
    def is_double(self) -> bool:
        """Goes through the units for double precision, or through their slow conversions."""
        if self.base in {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}:
            return True
        return self.base in {"F2F", "I2F", "F2I", "FRND"} and "F64" in self.modifiers

    @property
    def is_arithmetic(self) -> bool:
        """Adds or multiplies floating-point values (a conversion, a selection or a comparison is not it)."""
        if self.base == "HADD2":
            return "F32" not in self.modifiers  # with it: how a half is widened
        if self.base == "HFMA2" and self.operands[1:3] == ("-RZ", "RZ"):
            return False  # how ptxas makes a constant
        return self.base in {"FADD", "FMUL", "FFMA", "DADD", "DMUL", "DFMA", "HMUL2", "HFMA2"}

    @property
    def target(self) -> str | None:
        """The label that is named, of a branch or a call."""
        for operand in self.operands:
            if match := re.fullmatch(r"`\((.+)\)", operand):
                return match[1]
        return None

    @property
    def is_conditional(self) -> bool:
        """Of a branch: whether it may go on to the next instruction."""
        return (bool(self.guard) and self.guard != "@PT") or len(self.operands) > 1 or "DIV" in self.modifiers

    @property
    def writes(self) -> tuple[int, ...]:
        """The general registers that hold its result."""
        if self.is_store or not self.operands or (first := _register(self.operands[0])) is None:
            return ()
        count = 1
        if self.is_load:
            count = max(1, self.bits // 32)
        elif self.base in {"DADD", "DMUL", "DFMA", "CS2R"} or "WIDE" in self.modifiers or "64" in self.modifiers:
            count = 1 if self.base == "CS2R" and "32" in self.modifiers else 2
        elif self.base == "F2F" and self.modifiers[0] == "F64":
            count = 2
        return tuple(range(first, first + count))

    @property
    def reads(self) -> tuple[int, ...]:
        """The general registers that are named in its other operands (of a wider value, the first of them)."""
        operands = self.operands if self.is_store else self.operands[1:]
        return tuple(int(number) for operand in operands for number in re.findall(r"\bR(\d+)\b", operand))


def _register(operand: str) -> int | None:
    match = re.fullmatch(r"R(\d+)(?:\.\w+)*", operand)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Function:
    """One kernel, with the helpers that the compiler put behind it: labels by the index that they stand before."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_SECTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^\s*([.$\w]+):$")
_PLACE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)( inlined at)?')
_CODE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/$")
_CONTROL = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/$")


def parse_listing(lines: Iterable[str]) -> list[Function]:
    """The functions in what `nvdisasm -c -hex -gi` prints. ValueError where an instruction is not understood."""
    functions: list[Function] = []
    name = ""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    places: list[Place] = []
    fresh = True
    pending: re.Match[str] | None = None

    def close() -> None:
        nonlocal instructions, labels
        if pending is not None:
            raise ValueError(f"no scheduling word: {pending[0]}")
        if name:
            functions.append(Function(name, tuple(instructions), labels))
        instructions, labels = [], {}

    for line in lines:
        line = line.rstrip()
        if pending is not None:
            control = _CONTROL.match(line)
            if control is None:
                raise ValueError(f"no scheduling word: {pending[0]}")
            operands = tuple(part.strip() for part in pending[4].split(",")) if pending[4] else ()
            instructions.append(
                Instruction(
                    int(pending[1], 16), pending[2] or "", pending[3], operands, int(control[1], 16), tuple(places)
                )
            )
            pending, fresh = None, True
        elif code := _CODE.match(line):
            pending = code
        elif place := _PLACE.match(line):
            if fresh:  # the chain of one instruction, which those behind it share until the next chain
                places, fresh = [], False
            # nvdisasm tells each caller twice: at the end of one line, and as the next line.
            places.append((os.path.normpath(place[1]), int(place[2])))
        elif section := _SECTION.match(line):
            close()
            name, places = section[1], []
        elif label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif re.match(r"^\s+/\*[0-9a-f]{4,}\*/", line):
            raise ValueError(f"not understood: {line.strip()}")
    close()
    return functions


def find_disassembler(nvcc: Path | None = None) -> Path:
    """nvdisasm: of the toolkit, on PATH, or of the triton package. RuntimeError that names the remedy if nowhere."""
    beside = [nvcc.parent / "nvdisasm"] if nvcc else []
    if on_path := shutil.which("nvdisasm"):
        beside.append(Path(on_path))
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        beside.append(Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm")
    for tool in beside:
        if os.access(tool, os.X_OK):
            return tool
    raise RuntimeError(
        "no nvdisasm: install the toolkit's (package cuda-nvdisasm), or triton, which brings one (pip install triton)"
    )


def disassemble(tool: Path, cubin: bytes) -> list[Function]:
    """RuntimeError with nvdisasm's output where it fails."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-c", "-hex", "-gi", file.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm failed with exit code {done.returncode}:\n{done.stderr}")
    return parse_listing(done.stdout.splitlines())


def function_at(lines: Sequence[str], number: int) -> str:
    """The name of the function that a source line (from 1) lies in: of the definition last begun before it."""
    for line in reversed(lines[:number]):
        if re.match(r"\s*(template|//)", line):
            continue
        starts = re.search(r"\b(BNK_DEVICE|__global__|__device__)\b", line)
        if starts and (named := re.search(r"(operator\[\]|\w+)\(", line[starts.end() :])):
            return named[1]
        if kernel := re.match(r"(\w+_kernel)\(", line):
            return kernel[1]
        if kernel := re.search(r"\bBNK_KERNEL\w*\([^()]*\) (\w+)\(", line):
            return kernel[1]
    return ""
