"""What the studies of this folder share: arguments, claims and their verdicts, tables, and the report of a run.

A study repeats what a source claims with this package's layers, and judges it. A claim is a sentence of the source, a
measured figure for each seed, and the limit that the figure of *every* seed must keep; limits have a margin, so that
what holds does so on another machine too. The exit code is 0 when every verdict is the one that docs/why.md tells of:
what is known not to hold is `expected=False`, and is news as well if it suddenly holds.

    python examples/study.py out/examples docs/why.md     # the reports and plots of a run into the document

Each study writes <out>/<name>.md and <out>/<name>.png, which the document holds between two marks.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import matplotlib
import torch
from tqdm import tqdm

import bnkernels as bnk

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# One colour for each kind of network, the same in all plots, distinct in grey too.
WITH_BN, WITHOUT_BN, THIRD, FOURTH = "#204080", "#f0a030", "#40a060", "#c03060"

QUICK = "a quick run, which judges nothing: "

Item = TypeVar("Item")


@dataclass(frozen=True)
class Claim:
    """A sentence of a source, and by what it is judged."""

    source: str
    statement: str
    measure: str
    values: Sequence[float]  # of each seed
    at_least: float | None = None
    at_most: float | None = None
    expected: bool = True

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"a claim has one limit, got at_least={self.at_least} and at_most={self.at_most}")
        if not self.values:
            raise ValueError(f"a claim needs a figure for each seed, got none: {self.measure}")

    def keeps(self, value: float) -> bool:
        """NaN keeps nothing."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most

    @property
    def holds(self) -> bool:
        return all(self.keeps(value) for value in self.values)

    @property
    def limit(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    @property
    def verdict(self) -> str:
        kept = sum(self.keeps(value) for value in self.values)
        return f"{'holds' if self.holds else 'DOES NOT HOLD'} ({kept} of {len(self.values)} seeds)"

    @property
    def by_seed(self) -> str:
        return ", ".join(f"{value:.3g}" for value in self.values)

    def row(self) -> list[str]:
        return [f"{self.statement} ({self.source})", self.measure, self.by_seed, self.limit, self.verdict]

    def __str__(self) -> str:
        return (
            f"{self.verdict}: {self.statement} ({self.source})\n    {self.measure}: {self.by_seed}; limit {self.limit}"
        )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns also stand under each other where it is read as text."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def bar(items: Iterable[Item], what: str) -> Iterable[Item]:
    """A progress bar that leaves nothing behind, and is silent where no one watches."""
    return tqdm(items, desc=what, leave=False, disable=None)


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every study takes. description: the study's docstring."""
    result = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    result.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    result.add_argument("--quick", action="store_true", help="so few steps that it only shows that all of it runs")
    result.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--out", type=Path, default=Path("out/examples"), help="folder of the report and the plot")
    return result


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = arguments.parse_args(argv)
    if args.seeds < 1:
        arguments.error(f"--seeds: got {args.seeds}, expected 1 or more")
    return args


@dataclass
class Report:
    """Of one run of one study."""

    name: str
    args: argparse.Namespace
    claims: list[Claim] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # Markdown, each with a line above that says what it shows
    started: float = field(default_factory=time.perf_counter)

    def show(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table, and keeps it for the report."""
        self.tables.append(f"{title}\n\n{table(header, rows)}")
        print(f"\n{self.tables[-1]}")

    def finish(self, figure: Figure) -> int:
        """Writes plot and report, prints the verdicts, and returns the exit code."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        plot = self.args.out / f"{self.name}.png"
        figure.savefig(plot, dpi=100)
        plt.close(figure)
        print("", *self.claims, sep="\n")
        verdicts = table(["claim", "measured", "by seed", "limit", "verdict"], [claim.row() for claim in self.claims])
        seconds = f"{time.perf_counter() - self.started:.0f} s"
        taken = f"{QUICK if self.args.quick else ''}{seconds} on {machine(self.args.device)}"
        text = "\n\n".join([verdicts, *self.tables, f"Measured in {taken}."])
        (self.args.out / f"{self.name}.md").write_text(text + "\n")
        print(f"\nPlot and report: {plot} and .md ({taken})")
        regressions = [claim for claim in self.claims if claim.holds != claim.expected]
        for claim in regressions:
            print(f"NEWS: {'holds' if claim.holds else 'does not hold'}, unlike docs/why.md: {claim.statement}")
        return 1 if regressions else 0


def machine(device: torch.device) -> str:
    """The device in words, with the versions that figures depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        simd = bnk.build_info()["simd"]
        name = f"{os.cpu_count()} cores, {platform.machine()} ({simd}), {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by examples/study.py -->", f"<!-- end of {name} -->"


def fill(reports: Path, document: Path) -> list[str]:
    """Puts each report between its marks in the document, and its plot beside it; returns the names."""
    text = document.read_text()
    pictures = document.parent / document.stem
    pictures.mkdir(exist_ok=True)
    names = sorted(path.stem for path in reports.glob("*.md"))
    for name in names:
        report = (reports / f"{name}.md").read_text()
        if QUICK in report:
            raise ValueError(f"{reports / name}.md is of a run with --quick, which judges nothing: run it whole")
        first, last = marks(name)
        if text.count(first) != 1 or text.count(last) != 1:
            raise ValueError(f"{document} needs the lines '{first}' and '{last}' once each, for {reports / name}.md")
        before, rest = text.split(first)
        after = rest.split(last)[1]
        picture = f"![The plot of examples/{name}.py]({document.stem}/{name}.png)"
        text = f"{before}{first}\n\n{picture}\n\n{report}\n{last}{after}"
        shutil.copyfile(reports / f"{name}.png", pictures / f"{name}.png")
    document.write_text(text)
    return names


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description="Puts the reports of a run of the studies into the document.")
    arguments.add_argument("reports", type=Path, help="where the studies have written, e.g. out/examples")
    arguments.add_argument("document", type=Path, help="e.g. docs/why.md")
    args = arguments.parse_args(argv)
    print(f"{args.document}: {', '.join(fill(args.reports, args.document))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
