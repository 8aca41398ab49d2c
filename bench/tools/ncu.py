"""DRAM bytes and launches of each call from hardware counters (Nsight Compute), against the floor.

    python -m bench.tools.ncu [--batch 256] [--shapes 64x112x112,..] [--out FILE.md]

Runs itself under ncu. For each case the profiled sequence is

    marker, the call's kernels, marker, a read of a buffer much larger than L2

The read evicts the dirty lines of the call from L2: its DRAM writes belong to the call. A read of the same buffer
before the sequence evicts the inputs of the call from L2. Clocks and caches are not controlled: a kernel may find in L2
what the previous kernel of the same call left, as in a program.
Exit code 0: measured; 77: ncu is missing or may not read the counters (the reason is printed); 1: any other error.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cases import Case, make_buffers
from ..cli import parse_shapes
from ..cuda import free_memory, l2_bytes
from ..markdown import table
from ..providers import EAGER, OURS, Provider, make_call

Call = tuple[Case, str, str]  # case, direction, provider

SKIPPED = 77
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
MARKER = "lgamma"  # part of the name of a kernel that BatchNorm never launches
FLUSH_L2_MULTIPLE = 4
DIRECTIONS = ("forward", "backward", "eval")
PROVIDERS = (OURS, EAGER)
DEFAULT_SHAPES = "64x112x112,256x56x56,1024x14x14,2048x7x7"


@dataclass(frozen=True)
class Kernel:
    """One launch in ncu's report."""

    name: str
    read_bytes: float
    written_bytes: float
    nanoseconds: float


@dataclass(frozen=True)
class Traffic:
    """One call: its launches and their DRAM bytes."""

    kernels: tuple[Kernel, ...]
    evicted_bytes: float  # written during the following read

    @property
    def read_bytes(self) -> float:
        return sum(kernel.read_bytes for kernel in self.kernels)

    @property
    def written_bytes(self) -> float:
        return sum(kernel.written_bytes for kernel in self.kernels) + self.evicted_bytes


def parse_csv(text: str) -> list[Kernel]:
    """The launches in the output of `ncu --csv --page raw --print-units base`. ValueError without a table."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if not rows:
        raise ValueError("no table in ncu's output")
    missing = [name for name in ("Kernel Name", *METRICS) if name not in rows[0]]
    if missing:
        raise ValueError(f"no column {missing[0]} in ncu's output")

    def number(cell: str) -> float:
        return float(cell.replace(",", ""))

    # The row below the header holds the units.
    return [
        Kernel(row["Kernel Name"], *(number(row[metric]) for metric in METRICS)) for row in rows if row["Kernel Name"]
    ]


def split_calls(kernels: Iterable[Kernel]) -> list[Traffic]:
    """Groups launches into calls by the markers. ValueError if markers and launches do not alternate as above."""
    groups: list[list[Kernel]] = []
    for kernel in kernels:
        if MARKER in kernel.name:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
        else:
            raise ValueError(f"{kernel.name} before the first marker")
    if len(groups) % 2 or not all(groups):
        raise ValueError(f"{len(groups)} groups of launches, {sum(not group for group in groups)} of them empty")
    return [
        Traffic(tuple(call), sum(kernel.written_bytes for kernel in flush))
        for call, flush in zip(groups[::2], groups[1::2])
    ]


def plan(options: argparse.Namespace) -> Iterator[Call]:
    """The calls in the order of the worker."""
    for shape in parse_shapes(options.shapes):
        for layout in ("nchw", "nhwc"):
            case = Case(shape, options.batch, layout, options.dtype)
            for direction in DIRECTIONS:
                for name in PROVIDERS:
                    yield case, direction, name


def work(options: argparse.Namespace) -> None:
    """The profiled program."""
    device = torch.device("cuda")
    flush = torch.ones(FLUSH_L2_MULTIPLE * l2_bytes(device) // 4, device=device)
    marker = torch.ones(1, device=device)
    torch.lgamma(marker)
    for case, direction, name in plan(options):
        buffers = make_buffers(case, device)
        call = make_call(Provider.make(name, case, device), direction, [buffers])
        results = [call(0)]  # loads the kernels and fills the allocator's cache for the call below
        results.clear()
        flush.sum()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.lgamma(marker)
        results.append(call(0))
        torch.lgamma(marker)
        flush.sum()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del buffers, call
        results.clear()
        free_memory()


class Skip(Exception):
    """ncu cannot measure on this machine."""


def profile(arguments: Sequence[str]) -> str:
    """Runs the worker under ncu and returns its CSV. Skip if ncu cannot measure on this machine."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise Skip("ncu is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
        command += ["--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off"]
        command += ["--log-file", str(log), sys.executable, "-m", "bench.tools.ncu", "--worker", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        text = log.read_text() if log.exists() else ""
    complaints = [line for line in (text + done.stdout).splitlines() if "==ERROR==" in line]
    refused = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler", "driver resource")
    for line in complaints:
        if any(word in line for word in refused):
            raise Skip(line.replace("==ERROR==", "").strip())
    if done.returncode != 0:
        raise RuntimeError(f"ncu failed with exit code {done.returncode}:\n{text[-2000:]}\n{done.stdout[-4000:]}")
    return text


def render(calls: Sequence[Call], traffic: Sequence[Traffic]) -> str:
    """One row per call: launches, bytes against the floor, and the sum of the kernels' durations."""
    if len(calls) != len(traffic):
        raise ValueError(f"expected {len(calls)} calls in ncu's output, got {len(traffic)}")
    rows = []
    for (case, direction, name), one in zip(calls, traffic):
        floor = case.floor_bytes(direction)
        total = one.read_bytes + one.written_bytes
        microseconds = sum(kernel.nanoseconds for kernel in one.kernels) / 1e3
        rows.append(
            [str(case), direction, name, str(len(one.kernels)), f"{floor / 1e6:.1f}", f"{one.read_bytes / 1e6:.1f}"]
            + [f"{one.written_bytes / 1e6:.1f}", f"{total / floor:.3f}", f"{microseconds:.0f}"]
        )
    header = ["case", "direction", "", "launches", "floor MB", "read MB", "written MB", "bytes/floor", "µs under ncu"]
    return table(header, rows, left=3)


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(
        prog="python -m bench.tools.ncu", description="DRAM bytes of each call against the floor."
    )
    parse.add_argument("--shapes", default=DEFAULT_SHAPES, help=f"default: {DEFAULT_SHAPES}")
    parse.add_argument("--batch", type=int, default=256)
    parse.add_argument("--dtype", default="bf16")
    parse.add_argument("--out", type=Path, metavar="FILE", help="also write the table to this file")
    parse.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parse.parse_args(arguments)
    if options.worker:
        work(options)
        return 0
    passed = ["--shapes", options.shapes, "--batch", str(options.batch), "--dtype", options.dtype]
    try:
        text = profile(passed)
    except Skip as reason:
        print(f"skipped: {reason}")
        return SKIPPED
    report = render(list(plan(options)), split_calls(parse_csv(text)))
    print(report)
    if options.out is not None:
        options.out.write_text("# DRAM bytes by hardware counters\n\n" + report + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
