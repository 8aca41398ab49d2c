"""python -m mutants [--area AREA] [-k WORDS] [-j JOBS] [--out DIR] [--resume] [--list]: see mutants/__init__.py.

Prints a line for each mutant, and writes a Markdown table to DIR/mutants.md and the outcomes to DIR/outcomes.jsonl.
Exit code 0: at least 95% are killed and each survivor is explained; 1: not so; 2: a mutant could not be tested.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.markdown import table

from . import AREAS, Mutant, catalogue
from .runner import ROOT, Outcome, run

REQUIRED = 0.95


def render(areas: dict[str, list[Outcome]]) -> str:
    rows, details = [], []
    for area, outcomes in areas.items():
        killed = sum(bool(each.killed_by) for each in outcomes)
        rows.append([area, *map(str, (len(outcomes), killed, sum(each.survived for each in outcomes)))])
        for each in sorted(outcomes, key=lambda outcome: (outcome.mutant.file, outcome.mutant.fault)):
            fate = each.error and f"ERROR: {each.error.splitlines()[0]}"
            fate = fate or (f"`{each.killed_by}`" if each.killed_by else f"**survives**: {each.mutant.survives or '?'}")
            details.append([f"`{each.mutant.file}`", each.mutant.fault.replace("|", "\\|"), fate])
    total = [sum(int(row[column]) for row in rows) for column in (1, 2, 3)]
    rows.append(["all", *map(str, total)])
    return "\n\n".join(
        [
            table(["area", "mutants", "killed", "survive"], rows),
            table(["file", "fault", "killed by"], details, left=3),
            "",
        ]
    )


def key(mutant: Mutant) -> str:
    """The identity of a mutant: the change itself and the tests that must detect it."""
    return json.dumps([mutant.file, mutant.old, mutant.new, mutant.tests])


def recorded(file: Path, mutants: Sequence[Mutant]) -> list[Outcome]:
    """The outcomes of an earlier run, for the mutants that it killed."""
    lines = file.read_text().splitlines() if file.exists() else []
    killed = {each["key"]: each for each in map(json.loads, lines) if each["killed_by"]}
    known = [(mutant, killed[key(mutant)]) for mutant in mutants if key(mutant) in killed]
    return [Outcome(mutant, each["killed_by"], seconds=each["seconds"]) for mutant, each in known]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--area", action="append", choices=AREAS, help="may be given several times (default: all)")
    parser.add_argument("-k", default="", help="only mutants whose fault or file contains this")
    parser.add_argument("-j", "--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "mutants")
    parser.add_argument("--resume", action="store_true", help="skips mutants that an earlier run in DIR killed")
    parser.add_argument("--list", action="store_true", help="lists the mutants without running them")
    args = parser.parse_args(arguments)
    chosen = {
        area: [each for each in mutants if args.k in each.fault or args.k in each.file]
        for area, mutants in catalogue().items()
        if area in (args.area or AREAS)
    }
    if args.list:
        for area, mutants in chosen.items():
            for mutant in mutants:
                print(f"{area:9}  {mutant.file}: {mutant.fault}")
        return 0
    area_of = {mutant: area for area, mutants in chosen.items() for mutant in mutants}
    outcomes: dict[str, list[Outcome]] = {area: [] for area in chosen}
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "outcomes.jsonl"
    if not args.resume:
        record.unlink(missing_ok=True)
    for outcome in recorded(record, list(area_of)):
        outcomes[area_of.pop(outcome.mutant)].append(outcome)
    for outcome in run(list(area_of), args.out, args.jobs):
        outcomes[area_of[outcome.mutant]].append(outcome)
        entry = {"key": key(outcome.mutant), "killed_by": outcome.killed_by, "seconds": round(outcome.seconds)}
        with record.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        fate = f"ERROR {outcome.error}" if outcome.error else outcome.killed_by or "SURVIVES"
        print(f"{outcome.seconds:5.0f} s  {outcome.mutant.file}: {outcome.mutant.fault}: {fate}", flush=True)
        (args.out / "mutants.md").write_text(render(outcomes))
    every = [outcome for found in outcomes.values() for outcome in found]
    print(render(outcomes))
    if any(outcome.error for outcome in every):
        return 2
    killed = sum(bool(outcome.killed_by) for outcome in every)
    unexplained = [outcome for outcome in every if outcome.survived and not outcome.mutant.survives]
    return 0 if not unexplained and killed >= REQUIRED * len(every) else 1


if __name__ == "__main__":
    sys.exit(main())
