"""The reports of the check: tables as text, and JSON for CI."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

import bnkernels

from ..testing import DTYPE_PAIRS, EPILOGUES, FAMILIES, GRADS, REPORT_FROM, WEIGHTS, Case, ErrorReport, K
from .runner import Result, worst_ratio

FORMAT = 1
"""Version of the JSON format: incremented when a field changes its meaning or is removed."""

_RULE = "-" * 79


@dataclass(frozen=True)
class Backend:
    """The results of one device."""

    device: torch.device
    name: str
    results: tuple[Result, ...]
    seconds: float
    stopped: str | None = None
    """Why the run stopped after a failed case, or None if all cases ran."""

    @property
    def ok(self) -> bool:
        return self.stopped is None and all(r.ok for r in self.results)

    @property
    def worst(self) -> Result:
        return max(self.results, key=lambda r: r.ratio)


def ratio_text(ratio: float) -> str:
    """At most 7 characters: 0.04, 17.3, 2.9e+09, inf."""
    if math.isinf(ratio):
        return "inf"
    if ratio == 0 or 0.01 <= ratio < 100:
        return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
    return "<0.01" if ratio < 0.01 else f"{ratio:.1e}"


def command(case: Case, device: torch.device) -> str:
    """The command line that reproduces a case."""
    return f"python -m bnkernels.check --device {device} --case {case}"


@dataclass(frozen=True)
class Grouping:
    """A grouping of the cases. title: of the table and the JSON field; order: the groups in order."""

    title: str
    of: Callable[[Case], str]
    order: tuple[str, ...]

    def __call__(self, results: Iterable[Result]) -> dict[str, list[Result]]:
        groups: dict[str, list[Result]] = {name: [] for name in self.order}
        for result in results:
            groups[self.of(result.case)].append(result)
        return {name: group for name, group in groups.items() if group}


def _dtypes(dtype: str, parameters: str) -> str:
    return dtype if dtype == parameters else f"{dtype}+{parameters}"


GROUPINGS = (
    Grouping("activations", lambda case: case.distribution, tuple(FAMILIES)),
    Grouping("gradients", lambda case: case.grad, tuple(GRADS)),
    Grouping("weights", lambda case: case.weight, tuple(WEIGHTS)),
    Grouping(
        "dtypes", lambda case: _dtypes(case.dtype, case.parameters), tuple(_dtypes(*pair) for pair in DTYPE_PAIRS)
    ),
    Grouping("epilogues", lambda case: case.epilogue or "none", tuple(name or "none" for name in EPILOGUES)),
)


_SHORT = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def _mark(ratio: float) -> str:
    return "!" if ratio > 1 else "*" if ratio * K >= REPORT_FROM else " "


def _where(error_reports: tuple[ErrorReport, ...]) -> str:
    worst = max(error_reports, key=lambda v: v.ratio, default=None)
    return f"{worst.quantity} {_SHORT[worst.dtype]}" if worst is not None and worst.ratio > 0 else "-"


def _worst_native(results: Iterable[Result]) -> Result | None:
    judged = [r for r in results if r.native is not None]
    return max(judged, key=lambda r: worst_ratio(r.native or ()), default=None)


def table(backend: Backend) -> str:
    """Tables of the worst error over bound per group, for bnkernels and torch, and its output. 79 columns."""
    lines = []
    for group in GROUPINGS:
        lines.append(f"{group.title:<17}{'cases':>5}{'bnkernels':>11} in{'torch':>24}  in")
        lines.append(_RULE)
        for name, results in group(backend.results).items():
            worst = max(results, key=lambda r: r.ratio)
            where = "see below" if worst.problems else _where(worst.ours)
            line = f"{name:<17}{len(results):>5}{ratio_text(worst.ratio):>10}{_mark(worst.ratio)} {where:<17}"
            native = _worst_native(results)
            if native is None or native.native is None:
                line += f"{'n/a':>9}"
            else:
                line += f"{ratio_text(worst_ratio(native.native)):>9}  {_where(native.native)}"
            lines.append(line.rstrip())
        lines.append("")
    return "\n".join(lines)


def summary(backend: Backend, limit: int = 5) -> str:
    """The result of a backend, and the command that reproduces its worst case."""
    failed = sorted((r for r in backend.results if not r.ok), key=lambda r: -r.ratio)
    count = len(backend.results)
    worst = backend.worst
    lines = []
    if failed:
        lines.append(
            f"{backend.device}: FAILED, {len(failed)} of {count} cases out of bounds ({backend.seconds:.0f} s)"
        )
        for result in failed[:limit]:
            said = [*result.problems, *(str(v) for v in result.ours if not v.ok)]
            lines += ["", command(result.case, backend.device), *(f"    {text}" for text in said)]
        if len(failed) > limit:
            lines += ["", f"... and {len(failed) - limit} more"]
        if backend.stopped is not None:
            lines += ["", f"stopped after these: {backend.stopped}"]
    else:
        lines.append(f"{backend.device}: ok, {count} cases within bounds, worst {ratio_text(worst.ratio)} of 1")
        lines[-1] += f" ({backend.seconds:.0f} s)"
        lines.append(f"    {command(worst.case, backend.device)}")
    return "\n".join(lines)


def details(result: Result, device: torch.device) -> str:
    """The results of one case for each output."""
    lines = [str(result.case), f"on {device}", ""]
    lines.append(f"{'':<14}{'error/bound':>11}  {'got':>14}{'expected':>15}{'bound':>10}  at")
    lines.append(_RULE)
    for title, error_reports in (("bnkernels", result.ours), ("torch", result.native)):
        if error_reports is None:
            lines.append(f"{title}: does not support this input")
            continue
        lines.append(title)
        for v in error_reports:
            index = ",".join(map(str, v.index))
            ratio = ratio_text(v.ratio) + _mark(v.ratio)
            lines.append(f"  {v.quantity:<12}{ratio:>11}  {v.got:>14.7g}{v.expected:>15.7g}{v.bound:>10.2g}  {index}")
    lines += [f"! {problem}" for problem in result.problems]
    return "\n".join(lines)


LEGEND = (
    "Worst error over bound of each row, compared with float64. The limit is 1; the\n"
    f"rounding of the output is not counted.  ! out of bounds   * above {REPORT_FROM / K:.2f}"
)


def _number(value: float) -> float | str:
    """Non-finite values become strings, because JSON does not support them."""
    return value if math.isfinite(value) else str(value)


def _error_report_json(error_report: ErrorReport) -> dict[str, object]:
    return {
        "quantity": error_report.quantity,
        "ratio": _number(error_report.ratio),
        "index": list(error_report.index),
        "got": _number(error_report.got),
        "expected": _number(error_report.expected),
        "bound": _number(error_report.bound),
        "dtype": str(error_report.dtype).removeprefix("torch."),
    }


def _result_json(result: Result, error_reports: tuple[ErrorReport, ...] | None) -> dict[str, object] | None:
    if error_reports is None:
        return None
    worst = max(error_reports, key=lambda v: v.ratio, default=None)
    return {"case": str(result.case), "worst": None if worst is None else _error_report_json(worst)}


def _group_json(results: list[Result]) -> dict[str, object]:
    ours, native = max(results, key=lambda r: r.ratio), _worst_native(results)
    return {
        "cases": len(results),
        "passed": all(r.ok for r in results),
        "ratio": _number(ours.ratio),
        "bnkernels": _result_json(ours, ours.ours),
        "torch": None if native is None else _result_json(native, native.native),
    }


def _backend_json(backend: Backend) -> dict[str, object]:
    failed = [r for r in backend.results if not r.ok]
    return {
        "device": str(backend.device),
        "name": backend.name,
        "passed": backend.ok,
        "stopped": backend.stopped,
        "seconds": round(backend.seconds, 3),
        "cases": len(backend.results),
        "worst": {"ratio": _number(backend.worst.ratio), "command": command(backend.worst.case, backend.device)},
        **{
            group.title: {name: _group_json(results) for name, results in group(backend.results).items()}
            for group in GROUPINGS
        },
        "failures": [
            {
                "case": str(r.case),
                "command": command(r.case, backend.device),
                "problems": list(r.problems),
                "out_of_bounds": [_error_report_json(v) for v in r.ours if not v.ok],
            }
            for r in failed
        ],
    }


def versions() -> dict[str, str | None]:
    return {
        "bnkernels": bnkernels.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def as_json(tier: str, backends: list[Backend]) -> dict[str, object]:
    """The complete report. Ratios are error over bound; non-finite values are strings."""
    return {
        "format": FORMAT,
        "tier": tier,
        "passed": all(b.ok for b in backends),
        "versions": versions(),
        "build": bnkernels.build_info(),
        "tolerance": {"K": K, "report_from": REPORT_FROM},
        "backends": [_backend_json(b) for b in backends],
    }
