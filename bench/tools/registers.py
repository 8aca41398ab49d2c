"""Registers, spills and static shared memory of each kernel, as ptxas reports them. Needs nvcc, no GPU.

    python -m bench.tools.registers [--arch sm_80,sm_90] [-j N]

Compiles csrc/cuda/**/*.cu to cubin for each architecture, with the flags of setup.py, and prints one table. A spill or
a stack frame (an array in local memory) is an error unless ALLOWED has its reason.
Exit code 0: no kernel uses local memory without permission; 1: some do; 2: the code does not compile.
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

from bench.markdown import table
from bench.tools import device_code
from bench.tools.device_code import ARCHS, demangle

# Substring of "demangled name on architecture" -> reason why the spills or the stack frame are harmless.
ALLOWED: dict[str, str] = {}


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture. Bytes are per thread, except for static shared memory, which is per CTA."""

    kernel: str  # mangled name
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
    """Parses the output of `nvcc -Xptxas -v`. ValueError if the figures of a kernel are missing."""
    usages = []
    entry: re.Match[str] | None = None
    frame: re.Match[str] | None = None
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            if entry is not None:
                raise ValueError(f"no register count for {entry[1]}")
            entry, frame = match, None
        elif match := _FRAME.search(line):
            # Device functions that were not inlined have such a line too; that of the entry comes first.
            frame = frame or match
        elif match := _USED.search(line):
            if entry is None or frame is None:
                raise ValueError(f"figures without a kernel: {line}")
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
    """All kernels of the sources on all architectures, with `jobs` parallel compilers."""
    nvcc = device_code.find_nvcc()
    with ThreadPoolExecutor(jobs) as pool:
        work = [
            pool.submit(device_code.compile_device_code, nvcc, source, arch) for arch in archs for source in sources
        ]
        return [usage for done in work for usage in parse_ptxas(done.result().ptxas_log)]


def cell(usage: Usage | None) -> str:
    """Registers per thread, and in bold the use of local memory, if any."""
    if usage is None:
        return "-"
    if usage.in_registers:
        return str(usage.registers)
    spilled = usage.spill_store_bytes + usage.spill_load_bytes
    return f"{usage.registers} **stack {usage.stack_bytes} B, spills {spilled} B**"


def render(usages: Sequence[Usage], archs: Sequence[str]) -> str:
    """One row per kernel: registers by architecture, and the largest static shared memory."""
    names = demangle(sorted({usage.kernel for usage in usages}))
    by_place = {(usage.kernel, usage.arch): usage for usage in usages}
    rows = []
    for kernel, name in sorted(names.items(), key=lambda pair: pair[1]):
        found = [by_place.get((kernel, arch)) for arch in archs]
        shared = max(usage.shared_bytes for usage in found if usage is not None)
        rows.append([f"`{name}`", *[cell(usage) for usage in found], str(shared)])
    return table(["kernel (registers per thread)", *archs, "shared B"], rows)


def offenders(usages: Iterable[Usage]) -> list[str]:
    """One line per kernel that uses local memory and is not in ALLOWED."""
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
        parse.error(f"expected architectures such as sm_90, got {options.arch}")
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
    print(
        f"\n{count} kernels on {len(archs)} architectures; {len(bad)} use local memory, {allowed} more are allowed to"
    )
    for line in bad:
        print(f"  {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
