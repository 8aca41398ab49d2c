"""Shared by the studies: command line, claims and their verdicts, and the report of a run.

A study reproduces a source's claims with this package's layers and judges them. A claim is a sentence of the source,
one measured value per seed, and the limit that the values of *all* seeds must meet. Limits have a margin, so that a
verdict does not depend on the machine. The exit code is 0 if every verdict is the one in docs/why.md. A claim that is
known not to hold has `expected=False`; if it holds after all, that counts as a regression too.

    python -m studies.study out/studies docs/why.md     # inserts the reports and plots of a run into the document

Each study writes <out>/<name>.md and <out>/<name>.png. The document has two marker lines around each report.
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
from bench.markdown import table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# The colours of the kinds of networks in all plots. They also differ in greyscale.
WITH_BN, WITHOUT_BN, THIRD, FOURTH = "#204080", "#f0a030", "#40a060", "#c03060"

QUICK = "a quick run, not a measurement: "

Item = TypeVar("Item")


@dataclass(frozen=True)
class Claim:
    """A sentence of a source, and the measured values that it is judged by."""

    source: str
    statement: str
    measure: str
    values: Sequence[float]  # one per seed
    at_least: float | None = None
    at_most: float | None = None
    expected: bool = True

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            limits = f"at_least={self.at_least} and at_most={self.at_most}"
            raise ValueError(f"expected exactly one of at_least and at_most, got {limits}")
        if not self.values:
            raise ValueError(f"expected one value per seed, got none: {self.measure}")

    def is_met_by(self, value: float) -> bool:
        """Whether value is within the limit; false for NaN."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most

    @property
    def holds(self) -> bool:
        return all(self.is_met_by(value) for value in self.values)

    @property
    def limit(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    @property
    def verdict(self) -> str:
        met = sum(self.is_met_by(value) for value in self.values)
        return f"{'holds' if self.holds else 'DOES NOT HOLD'} ({met} of {len(self.values)} seeds)"

    @property
    def by_seed(self) -> str:
        return ", ".join(f"{value:.3g}" for value in self.values)

    def row(self) -> list[str]:
        return [f"{self.statement} ({self.source})", self.measure, self.by_seed, self.limit, self.verdict]

    def __str__(self) -> str:
        return (
            f"{self.verdict}: {self.statement} ({self.source})\n    {self.measure}: {self.by_seed}; limit {self.limit}"
        )


def progress_bar(items: Iterable[Item], description: str) -> Iterable[Item]:
    """A progress bar that is erased at the end, and disabled if stderr is not a terminal."""
    return tqdm(items, desc=description, leave=False, disable=None)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every study. description: the study's docstring."""
    result = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    result.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    result.add_argument("--quick", action="store_true", help="only a few steps, to check that the study runs")
    result.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--out", type=Path, default=Path("out/studies"), help="folder of the report and the plot")
    return result


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = arguments.parse_args(argv)
    if args.seeds < 1:
        arguments.error(f"--seeds: got {args.seeds}, expected 1 or more")
    return args


@dataclass
class Report:
    """The report of one run of one study."""

    name: str
    args: argparse.Namespace
    claims: list[Claim] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # Markdown, each below its title
    started: float = field(default_factory=time.perf_counter)

    def show(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table and adds it to the report."""
        self.tables.append(f"{title}\n\n{table(header, list(rows), left=len(header))}")
        print(f"\n{self.tables[-1]}")

    def finish(self, figure: Figure) -> int:
        """Writes the plot and the report, prints the verdicts, and returns the exit code."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        plot = self.args.out / f"{self.name}.png"
        figure.savefig(plot, dpi=100)
        plt.close(figure)
        print("", *self.claims, sep="\n")
        header = ["claim", "measured", "by seed", "limit", "verdict"]
        verdicts = table(header, [claim.row() for claim in self.claims], left=len(header))
        seconds = f"{time.perf_counter() - self.started:.0f} s"
        measured_in = f"{QUICK if self.args.quick else ''}{seconds} on {machine(self.args.device)}"
        text = "\n\n".join([verdicts, *self.tables, f"Measured in {measured_in}."])
        (self.args.out / f"{self.name}.md").write_text(text + "\n")
        print(f"\nPlot and report: {plot} and .md ({measured_in})")
        regressions = [claim for claim in self.claims if claim.holds != claim.expected]
        for claim in regressions:
            print(f"REGRESSION: {'holds' if claim.holds else 'does not hold'}, unlike docs/why.md: {claim.statement}")
        return 1 if regressions else 0


def machine(device: torch.device) -> str:
    """The device, and the versions that times depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        simd = bnk.build_info()["simd"]
        name = f"{os.cpu_count()} cores, {platform.machine()} ({simd}), {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by studies/study.py -->", f"<!-- end of {name} -->"


def insert_reports(reports: Path, document: Path) -> list[str]:
    """Inserts each report between its markers in the document and copies its plot; returns the names."""
    text = document.read_text()
    pictures = document.parent / document.stem
    pictures.mkdir(exist_ok=True)
    names = sorted(path.stem for path in reports.glob("*.md"))
    for name in names:
        report = (reports / f"{name}.md").read_text()
        if QUICK in report:
            raise ValueError(f"{reports / name}.md was written with --quick: run the study without it")
        first, last = markers(name)
        if text.count(first) != 1 or text.count(last) != 1:
            raise ValueError(f"{document} needs the lines '{first}' and '{last}' once each, for {reports / name}.md")
        before, rest = text.split(first)
        after = rest.split(last)[1]
        picture = f"![The plot of studies/{name}.py]({document.stem}/{name}.png)"
        text = f"{before}{first}\n\n{picture}\n\n{report}\n{last}{after}"
        shutil.copyfile(reports / f"{name}.png", pictures / f"{name}.png")
    document.write_text(text)
    return names


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description="Inserts the reports of the studies into the document.")
    arguments.add_argument("reports", type=Path, help="the --out folder of the studies, e.g. out/studies")
    arguments.add_argument("document", type=Path, help="e.g. docs/why.md")
    args = arguments.parse_args(argv)
    print(f"{args.document}: {', '.join(insert_reports(args.reports, args.document))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
