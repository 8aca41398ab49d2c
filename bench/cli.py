"""The command line: `python -m bench [--quick | --full] [options]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import cuda, harness, machine
from .cases import DTYPES, EPILOGUES, FLOOR_TENSORS, LAYOUTS, MAX_RING, Case
from .files import replace_text
from .providers import BUILDERS, COMPILED, TITLES, why_no_compiler
from .report import case_line, render
from .results import Run
from .sampling import Effort
from .shapes import SHAPE_SETS, LayerShape

EFFORTS = {
    ("cpu", "quick"): Effort(sample_s=4e-3, budget_s=0.3, min_rounds=5, max_rounds=15),
    ("cpu", "default"): Effort(sample_s=10e-3, budget_s=1.5, min_rounds=7, max_rounds=31),
    ("cpu", "full"): Effort(sample_s=20e-3, budget_s=5.0, min_rounds=15, max_rounds=101),
    ("cuda", "quick"): Effort(sample_s=1e-3, budget_s=0.1, min_rounds=9, max_rounds=31),
    ("cuda", "default"): Effort(sample_s=2e-3, budget_s=0.3, min_rounds=11, max_rounds=31),
    ("cuda", "full"): Effort(sample_s=5e-3, budget_s=1.0, min_rounds=21, max_rounds=101),
}


@dataclass(frozen=True)
class Defaults:
    """What to run unless options override it."""

    batch: tuple[int, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]


DEFAULTS = {
    ("cpu", "quick"): Defaults((8,), ("fp32", "bf16"), ("forward", "eval", "step")),
    ("cpu", "default"): Defaults((8, 32), ("fp32", "bf16"), ("forward", "eval", "step")),
    ("cuda", "quick"): Defaults((32, 256), ("fp32", "bf16"), ("forward", "backward", "step")),
    ("cuda", "default"): Defaults((32, 256), ("fp32", "bf16", "fp16"), ("forward", "backward", "eval", "step")),
}


def _one_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: comma-separated names from `known`."""
    names = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(part.strip() for part in text.split(",") if part.strip())
        unknown = [name for name in chosen if name not in names]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(
                f"expected names among {', '.join(names)}, got {', '.join(unknown) or 'none'}"
            )
        return chosen

    return parse


def parse_shapes(text: str) -> tuple[LayerShape, ...]:
    """An argparse type: a named set of shapes.py, or comma-separated shapes CxHxW."""
    if text in SHAPE_SETS:
        return SHAPE_SETS[text]()
    try:
        sizes = [tuple(int(size) for size in part.split("x")) for part in text.split(",")]
        shapes = tuple(LayerShape(*size) for size in sizes if len(size) == 3 and min(size) > 0)
    except ValueError:
        shapes = ()
    if not shapes or len(shapes) != len(text.split(",")):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(SHAPE_SETS)}, or shapes such as 64x56x56, got {text!r}"
        )
    return shapes


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1:
        raise argparse.ArgumentTypeError(f"expected comma-separated positive numbers, got {text!r}")
    return batches


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times bnkernels, nn.BatchNorm2d and its torch.compile on ResNet-50's BatchNorm layers. "
        "Checks every result against the float64 reference first. Writes <date>-<machine>-<what>.json, .md and .png.",
    )
    effort = parse.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="four shapes, few samples")
    effort.add_argument("--full", action="store_true", help="many samples; the compiled layer in every direction")
    parse.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if available, else the CPU"
    )
    parse.add_argument(
        "--shapes", type=parse_shapes, metavar="NAME|CxHxW,..", help="resnet50 (default), quick, tiny, or shapes"
    )
    parse.add_argument("--batch", type=_batches, metavar="N,..", help="default: 8,32 on a CPU, 32,256 on a GPU")
    parse.add_argument("--dtypes", type=_one_of(DTYPES), metavar="D,..", help=f"of {', '.join(DTYPES)}")
    parse.add_argument("--layouts", type=_one_of(LAYOUTS), metavar="L,..", help=f"of {', '.join(LAYOUTS)}")
    parse.add_argument(
        "--directions", type=_one_of(FLOOR_TENSORS), metavar="D,..", help=f"of {', '.join(FLOOR_TENSORS)}"
    )
    parse.add_argument(
        "--epilogue",
        choices=[name for name in EPILOGUES if name],
        default="",
        help="operations after BatchNorm: in bnkernels' kernels, and as in-place torch operations after torch's layer",
    )
    parse.add_argument("--providers", type=_one_of(BUILDERS), metavar="P,..", help=f"of {', '.join(BUILDERS)}")
    parse.add_argument(
        "--modes", type=_one_of(cuda.MODES), metavar="M,..", help="GPU only: cold, warm, user; default: cold,warm"
    )
    parse.add_argument(
        "--budget", type=float, metavar="S", help="seconds per case and direction; default: the preset's"
    )
    parse.add_argument(
        "--max-ring",
        type=int,
        default=MAX_RING,
        metavar="N",
        help=f"most buffers to cycle through, default: {MAX_RING}",
    )
    parse.add_argument(
        "--copy-mib",
        type=int,
        default=cuda.COPY_BYTES >> 20,
        metavar="M",
        help="size of the device copy on a GPU, default: 1024",
    )
    parse.add_argument("--threads", type=int, metavar="T", help="CPU threads, default: torch's")
    parse.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="default: out/bench")
    parse.add_argument(
        "--name",
        metavar="WHAT",
        help="last part of the file names, default: quick, default or full, and the epilogue",
    )
    parse.add_argument("--no-plot", action="store_true")
    parse.add_argument(
        "--json-only", action="store_true", help="write no report and no plot; --render makes them later"
    )
    parse.add_argument(
        "--render", type=Path, metavar="JSON", help="measure nothing; write the report of this run again"
    )
    return parse


def make_plan(options: argparse.Namespace) -> harness.Plan:
    """The options with all defaults filled in. SystemExit if the device is not available."""
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch.cuda.is_available() is False")
    preset = "quick" if options.quick else "full" if options.full else "default"
    defaults = DEFAULTS[kind, "quick" if options.quick else "default"]
    effort = EFFORTS[kind, preset]
    if options.budget is not None:
        effort = Effort(effort.sample_s, options.budget, effort.min_rounds, effort.max_rounds)
    shapes = options.shapes or SHAPE_SETS["quick" if options.quick else "resnet50"]()
    cases = [
        Case(shape, batch, layout, dtype, options.epilogue)
        for dtype in options.dtypes or defaults.dtypes
        for layout in options.layouts or tuple(LAYOUTS)
        for batch in options.batch or defaults.batch
        for shape in shapes
    ]
    modes: Sequence[str] = ("cpu",)
    if kind == "cuda":
        modes = options.modes or ("cold", "warm")
    return harness.Plan(
        device=torch.device(kind),
        cases=cases,
        directions=options.directions or defaults.directions,
        providers=options.providers or tuple(BUILDERS),
        modes=modes,
        effort=effort,
        compile_all=options.full,
        copy_bytes=options.copy_mib << 20,
        max_ring=options.max_ring,
    )


def _without_compiler(plan: harness.Plan, run: Run) -> harness.Plan:
    """The plan, without the compiled provider if torch.compile does not work; the report notes it."""
    if COMPILED not in plan.providers:
        return plan
    why = why_no_compiler(plan.device)
    if why is None:
        return plan
    run.notes.append(f"no figures of {TITLES[COMPILED]}: it does not work in this environment ({why})")
    print(run.notes[-1], file=sys.stderr)
    return replace(plan, providers=tuple(name for name in plan.providers if name != COMPILED))


def _progress(cases: Iterable[Case]) -> Iterable[Case]:
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    bar: Iterable[Case] = tqdm(cases, unit="case", file=sys.stderr, dynamic_ncols=True, smoothing=0, disable=None)
    return bar


def file_of(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def write(run: Run, stem: Path, plot: bool, report: bool = True) -> list[Path]:
    """Writes stem.json; with `report`, stem.md; with `plot` and if matplotlib is installed, stem.png."""
    written = [file_of(stem, ".json")]
    run.save(written[0])
    if not report:
        return written
    picture = None
    if plot and run.records:
        try:
            from .plot import plot as draw
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
        else:
            picture = file_of(stem, ".png")
            draw(run, picture)
            written.append(picture)
    text = file_of(stem, ".md")
    replace_text(text, render(run, picture.name if picture else None))
    return [*written, text]


INTERRUPTED = 130  # the exit status by the convention of shells


def _measure(plan: harness.Plan, run: Run, file: Path) -> int:
    """Runs the cases and returns the exit status. `file` always holds the finished cases."""
    seen = 0

    def finished(case: Case) -> None:
        nonlocal seen
        run.save(file)
        records, seen = run.records[seen:], len(run.records)
        if not sys.stderr.isatty():  # no progress bar: log each case
            reference = run.reference_bandwidth(records[0]) if records else None
            print(f"{case}: {case_line(records, reference) or 'no time'}", flush=True)

    try:
        harness.execute(plan, run, _progress, finished)
    except KeyboardInterrupt:
        run.notes.append("interrupted: not all cases were measured")
        return INTERRUPTED
    return 1 if run.failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status. 0: all cases measured and written; 1: some failed, the others are written; 2: usage error;
    130: interrupted, with what was measured before written."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.render is not None:
        run = Run.load(options.render)
        for path in write(run, options.render.with_suffix(""), not options.no_plot):
            print(path)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = make_plan(options)
    preset = "quick" if options.quick else "full" if options.full else "default"
    facts = machine.describe(plan.device, arguments)
    run = Run(
        machine=facts,
        settings={
            "preset": preset,
            "sample_s": plan.effort.sample_s,
            "budget_s": plan.effort.budget_s,
            "rounds": [plan.effort.min_rounds, plan.effort.max_rounds],
            "compile_all": plan.compile_all,
            "copy_bytes": plan.copy_bytes,
            "max_ring": plan.max_ring,
        },
    )
    plan = _without_compiler(plan, run)
    load = facts["load_average_at_start"]
    if plan.device.type == "cpu" and load is not None and load > 0.5 * facts["cores"]:
        run.notes.append(f"the machine was busy when the run began (load average {load}): expect wide spreads")
    what = options.name or "-".join(filter(None, (preset, options.epilogue.replace("+", "-"))))
    stem = options.out / f"{facts['date'][:10]}-{machine.slug(facts)}-{what}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    status = _measure(plan, run, file_of(stem, ".json"))
    written = write(run, stem, not options.no_plot, not options.json_only)
    print(render(run).split("## All cases")[0].rstrip())
    print("\nwritten: " + ", ".join(str(path) for path in written))
    for line in run.failed:
        print(f"failed: {line}", file=sys.stderr)
    return status
