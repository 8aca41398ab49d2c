"""What each kernel costs a multiprocessor: registers, spills and shared memory, as ptxas reports them. Needs no GPU.

    python -m bench.registers [--arch sm_80,sm_90] [-j N]

Compiles the device code of csrc/cuda/*.cu for each architecture, with the flags of setup.py, to cubin only, and prints
one table. Every kernel of this package is one that a call launches, so each must keep its values in registers: a spill,
or an array that went to local memory (a stack frame), is an error unless ALLOWED says why it is not.
Exit code 0: none; 1: some; 2: it did not compile.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench, where this file is run as a script

from bench import device_code
from bench.device_code import ARCHS, demangle
from bench.markdown import table

# Kernel (a substring of the demangled name, "on", architecture) -> why its spills or stack frame do no harm.
ALLOWED: dict[str, str] = {}


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture. Bytes are per thread, but for shared memory (static, per block)."""

    kernel: str  # as the linker knows it
    arch: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int

    @property
    def in_registers(self) -> bool:
        return self.stack_bytes == self.spill_store_bytes == self.spill_load_bytes == 0


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '(sm_\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_ptxas(log: str) -> list[Usage]:
    """The kernels in what `nvcc -Xptxas -v` prints. ValueError for an entry whose figures are missing."""
    usages = []
    entry: re.Match[str] | None = None
    frame: re.Match[str] | None = None
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            if entry is not None:
                raise ValueError(f"no register count for {entry[1]}")
            entry, frame = match, None
        elif match := _FRAME.search(line):
            # Device functions that were not inlined have such a line too; the entry's own comes first.
            frame = frame or match
        elif match := _USED.search(line):
            if entry is None or frame is None:
                raise ValueError(f"figures of no kernel: {line}")
            shared = _SHARED.search(line)
            usages.append(
                Usage(
                    kernel=entry[1],
                    arch=entry[2],
                    registers=int(match[1]),
                    stack_bytes=int(frame[1]),
                    spill_store_bytes=int(frame[2]),
                    spill_load_bytes=int(frame[3]),
                    shared_bytes=int(shared[1]) if shared else 0,
                )
            )
            entry = frame = None
    if entry is not None:
        raise ValueError(f"no register count for {entry[1]}")
    return usages


def measure(sources: Iterable[Path], archs: Iterable[str], jobs: int) -> list[Usage]:
    """All kernels of the sources on all architectures, `jobs` compilers at a time."""
    nvcc = device_code.find_nvcc()
    with ThreadPoolExecutor(jobs) as pool:
        work = [
            pool.submit(device_code.compile_device_code, nvcc, source, arch) for arch in archs for source in sources
        ]
        return [usage for done in work for usage in parse_ptxas(done.result().ptxas_log)]


def cell(usage: Usage | None) -> str:
    """Registers a thread; in bold with what went to local memory, if anything did."""
    if usage is None:
        return "-"
    if usage.in_registers:
        return str(usage.registers)
    spilled = usage.spill_store_bytes + usage.spill_load_bytes
    return f"{usage.registers} **stack {usage.stack_bytes} B, spills {spilled} B**"


def render(usages: Sequence[Usage], archs: Sequence[str]) -> str:
    """The table: a row for each kernel, registers by architecture, static shared memory (the largest of all)."""
    names = demangle(sorted({usage.kernel for usage in usages}))
    by_place = {(usage.kernel, usage.arch): usage for usage in usages}
    rows = []
    for kernel, name in sorted(names.items(), key=lambda pair: pair[1]):
        found = [by_place.get((kernel, arch)) for arch in archs]
        shared = max(usage.shared_bytes for usage in found if usage is not None)
        rows.append([f"`{name}`", *[cell(usage) for usage in found], str(shared)])
    return table(["kernel (registers a thread)", *archs, "shared B"], rows)


def offenders(usages: Iterable[Usage]) -> list[str]:
    """A line for every kernel that uses local memory without leave."""
    bad = [usage for usage in usages if not usage.in_registers]
    names = demangle(sorted({usage.kernel for usage in bad})) if bad else {}
    lines = [f"{names[usage.kernel]} on {usage.arch}: {cell(usage)}" for usage in bad]
    return [line for line in lines if not any(part in line for part in ALLOWED)]


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description="Registers, spills and shared memory of each kernel by architecture.")
    parse.add_argument("--arch", default=",".join(ARCHS), metavar="A,..", help=f"default: {','.join(ARCHS)}")
    parse.add_argument("-j", "--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    options = parse.parse_args(arguments)
    archs = options.arch.split(",")
    if not all(device_code.is_arch(arch) for arch in archs):
        parse.error(f"architectures are written sm_90, not {options.arch}")
    try:
        usages = measure(device_code.sources(), archs, max(1, options.jobs))
    except (RuntimeError, ValueError) as error:  # BuildError is a RuntimeError
        print(error, file=sys.stderr)
        return 2
    if not usages:
        print("no kernel found in csrc/cuda", file=sys.stderr)
        return 2
    print(render(usages, archs))
    bad = offenders(usages)
    count = len({usage.kernel for usage in usages})
    allowed = sum(not usage.in_registers for usage in usages) - len(bad)
    print(f"\n{count} kernels on {len(archs)} architectures; {len(bad)} use local memory, and {allowed} with leave")
    for line in bad:
        print(f"  {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
