"""python -m bnkernels.check: checks the numerical results of this installation.

Every available backend (the CPU; CUDA if built and a GPU is present) runs the cases of bnkernels.testing through
bnkernels.batch_norm and autograd. The results are compared with the float64 reference. torch's layer is included for
comparison only.

Exit code: 0 all within bounds, 1 something out of bounds, 2 could not run.

With --env it runs no checks, and prints the information on machine and installation that a bug report needs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import bnkernels

from ..testing import Case, cases, fused_cases
from . import environment, progress, report
from .runner import Result, is_out_of_memory, run_case

WITHIN, OUT_OF_BOUNDS, COULD_NOT_RUN = 0, 1, 2


class CannotRun(Exception):
    """The check could not run, for the given reason."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bnkernels.check",
        description="Numerical check of this installation against a float64 reference.",
        epilog="Exit code: 0 all within bounds, 1 something out of bounds, 2 could not run.",
    )
    tier = parser.add_mutually_exclusive_group()
    for name, text in (
        ("quick", "several hundred small cases, under 30 seconds (the default)"),
        ("full", "several thousand cases, including shapes of real networks: minutes"),
        ("huge", "more than 2^31 elements: needs 100 GB of memory and a 16 GB device"),
    ):
        tier.add_argument(f"--{name}", dest="tier", action="store_const", const=name, help=text)
    tier.add_argument(
        "--env", action="store_true", help="run no checks; print the information for a bug report, and exit with 0"
    )
    tier.add_argument("--case", action="append", metavar="NAME", help="run only this case, in detail; may be repeated")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: every backend of this installation)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE; - for standard output")
    return parser.parse_args(argv)


def _devices(wanted: str | None) -> list[torch.device]:
    built = bool(bnkernels.build_info()["with_cuda"])
    if wanted is None:
        return [torch.device("cpu")] + ([torch.device("cuda")] if built and torch.cuda.is_available() else [])
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise CannotRun(f"no such device: {wanted}") from None
    if device.type not in ("cpu", "cuda"):
        raise CannotRun(f"bnkernels has no backend for {device.type}")
    if device.type == "cuda":
        if not built:
            raise CannotRun("this bnkernels was built without CUDA (see bnkernels.build_info())")
        if not torch.cuda.is_available():
            raise CannotRun("torch finds no usable GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise CannotRun(f"no such device: {device}: torch finds {torch.cuda.device_count()} GPU(s)")
    return [device]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{bnkernels.build_info()['simd']}, {torch.get_num_threads()} threads"


def _run(chosen: list[Case], device: torch.device) -> report.Backend:
    results: list[Result] = []
    stopped = None
    start = time.monotonic()
    with progress.bar(len(chosen)) as bar:
        for case in chosen:
            bar.set_description_str(f"{device} {case.distribution}", refresh=False)
            try:
                results.append(run_case(case, device))
            except Exception as error:
                # A faulting kernel makes the device unusable, so an error after a failed case is a consequence of it.
                if all(r.ok for r in results):
                    raise
                stopped = f"{case}: {type(error).__name__}: {error}"
                break
            bar.update()
    return report.Backend(device, _device_name(device), tuple(results), time.monotonic() - start, stopped)


def _print_environment(file: Path | None) -> int:
    found = environment.environment()
    text = environment.as_text(found) if file is None else json.dumps(found, indent=1)
    if file is None or str(file) == "-":
        print(text)
    else:
        file.write_text(text + "\n")
    return WITHIN


def _check(arguments: argparse.Namespace) -> int:
    if arguments.env:
        return _print_environment(arguments.json)
    tier = arguments.tier or "quick"
    try:
        chosen = [Case.parse(name) for name in arguments.case] if arguments.case else [*cases(tier), *fused_cases(tier)]
    except ValueError as error:
        raise CannotRun(str(error)) from None
    devices = _devices(arguments.device)
    # If the JSON goes to standard output, the text goes to standard error.
    out = sys.stderr if str(arguments.json) == "-" else sys.stdout

    def say(text: str = "") -> None:
        print(text, file=out, flush=True)

    v = report.versions()
    say(f"bnkernels {v['bnkernels']}, torch {v['torch']}, python {v['python']}")
    backends = []
    for device in devices:
        backend = _run(chosen, device)
        backends.append(backend)
        say(f"\n{device} ({backend.name})\n")
        if arguments.case:
            for result in backend.results:
                say(report.details(result, device) + "\n")
        else:
            say(report.LEGEND + "\n")
            say(report.table(backend))
    for backend in backends:
        say(report.summary(backend))
    if arguments.json is not None:
        text = json.dumps(report.as_json("case" if arguments.case else tier, backends), indent=1, allow_nan=False)
        if out is sys.stderr:
            print(text)
        else:
            arguments.json.write_text(text + "\n")
    return WITHIN if all(b.ok for b in backends) else OUT_OF_BOUNDS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check with argv (default: sys.argv[1:]) and returns the exit code."""
    arguments = _arguments(argv)
    try:
        return _check(arguments)
    except CannotRun as error:
        reason = str(error)
    except OSError as error:
        reason = str(error)
    except Exception as error:  # a failure of the check, torch or the machine, not of the results
        reason = f"out of memory: {error}" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
    print(f"bnkernels.check could not run: {reason}", file=sys.stderr)
    return COULD_NOT_RUN
