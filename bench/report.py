"""The Markdown report of a run: machine, summary, losses, then one table per group of cases."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import DIRECTION_TITLES, EPILOGUE_TITLES
from .markdown import table
from .providers import COPY, OURS, TITLES
from .results import Comparison, Record, Run
from .stats import Spread

MODE_TITLES = {
    "cpu": "CPU, inputs cycle through more than the last-level cache",
    "cold": "GPU, CUDA graph, L2 cold",
    "warm": "GPU, CUDA graph, one buffer (L2 warm)",
    "user": "GPU, module calls from Python",
}


def format_time(seconds: float) -> str:
    """Three significant digits, in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError("unreachable")


def format_spread(spread: Spread) -> str:
    """The median, and the distances of p20 and p80 from it in per cent."""
    below = 100 * (spread.p20 / spread.median - 1)
    above = 100 * (spread.p80 / spread.median - 1)
    return f"{format_time(spread.median)} ({below:+.0f} {above:+.0f}%)"


def format_ratio(ratio: float | None) -> str:
    """A speed-up; bold below 1."""
    if ratio is None:
        return "-"
    if ratio < 1.0:
        return f"**{ratio:.2f}**" if ratio < 0.995 else f"**{ratio:.3f}**"
    return f"{ratio:.2f}"


def _others(run: Run) -> list[str]:
    return [name for name in run.providers() if name != OURS]


def machine_lines(run: Run) -> list[str]:
    facts = run.machine
    dirty = {True: ", with uncommitted changes", False: "", None: ", state of the checkout unknown"}[facts.get("dirty")]
    lines = [
        f"- `{facts['command']}`, {facts['date']}",
        f"- commit {facts['commit'] or 'unknown'}{dirty}",
        f"- {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; last-level cache "
        f"{facts['last_level_cache_bytes'] >> 20} MiB; load average at the start {facts['load_average_at_start']}",
        f"- torch {facts['torch']}, Python {facts['python']}, {facts['system']}",
    ]
    if facts.get("settings"):
        lines.append("- set: " + ", ".join(f"`{name}={value}`" for name, value in facts["settings"].items()))
    if run.on_gpu:
        gpu = facts["gpu"]
        lines.append(
            f"- {gpu['name']} (capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"L2 {gpu['l2_bytes'] >> 20} MiB), CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"
        )
        for when in ("start", "end"):
            state = gpu.get(f"state_at_{when}")
            if state:
                lines.append(
                    f"- nvidia-smi at the {when}: " + ", ".join(f"{name} {value}" for name, value in state.items())
                )
        if run.device_copy:
            spread = Spread.of(run.device_copy)
            size = run.settings.get("copy_bytes", 1 << 30) >> 20
            lines.append(
                f"- device copy of {size} MiB, before and after the cases: {spread.median / 1e12:.2f} TB/s read and "
                f"written (p20 {spread.p20 / 1e12:.2f}, p80 {spread.p80 / 1e12:.2f})"
            )
    if facts.get("build"):
        lines.append("- build: " + ", ".join(f"{name} {value}" for name, value in facts["build"].items()))
    return lines


def case_line(records: Sequence[Record], reference: float | None) -> str:
    """One finished case: per direction, the time of bnkernels, speed-ups, and fraction of the copy bandwidth."""
    words = []
    for record in records:
        if OURS not in record.seconds:
            continue
        ratios = [f"{name} {format_ratio(record.ratio(name))}" for name in record.seconds if name not in (OURS, COPY)]
        if reference is not None:
            ratios.append(f"{100 * record.bandwidth(OURS) / reference:.0f}% of copy")
        words.append(
            f"{record.direction} {record.mode} {', '.join([format_time(record.spread(OURS).median), *ratios])}"
        )
    return "; ".join(words)


def _is_whole(records: Sequence[Record]) -> bool:
    """Whether the records of some batch cover all 53 layers of ResNet-50."""
    counts: dict[int, int] = {}
    for record in records:
        counts[record.batch] = counts.get(record.batch, 0) + record.count
    return any(count == 53 for count in counts.values())


def summary_table(run: Run) -> str:
    """One row per group and batch: geometric mean over the shapes, the minimum, and the whole network."""
    whole = any(_is_whole(records) for _, records in run.groups())
    header = ["mode", "direction", "dtype", "layout", "N", "shapes"]
    for other in _others(run):
        header += [f"{other}: geomean", "min", "at"] + ["53 layers"] * whole
    rows = []
    for (mode, direction, dtype, layout), records in run.groups():
        for batch in sorted({record.batch for record in records}):
            chosen = [record for record in records if record.batch == batch]
            row = [mode, direction, dtype, layout, str(batch), str(len(chosen))]
            for other in _others(run):
                compared = Comparison.of(chosen, other)
                if compared is None:
                    row += ["-"] * (3 + whole)
                    continue
                row += [format_ratio(compared.geomean), format_ratio(compared.least), compared.least_record.shape]
                row += [format_ratio(compared.network) if _is_whole(chosen) else "-"] * whole
            rows.append(row)
    return table(header, rows, left=4)


def losses(run: Run) -> list[str]:
    """One line per case in which another provider was faster than bnkernels."""
    lines = []
    for record in run.records:
        for other in _others(run):
            ratio = record.ratio(other)
            if ratio is None or ratio >= 1.0:
                continue
            ours, native = record.spread(OURS), record.spread(other)
            within = "; the spreads overlap" if ours.overlaps(native) else ""
            lines.append(
                f"- {record.label()}: {TITLES[other]} {format_time(native.median)}, "
                f"bnkernels {format_time(ours.median)} ({format_ratio(ratio)}{within})"
            )
    return lines


def overall(run: Run, other: str) -> str | None:
    """One line per mode and direction: geometric mean and minimum over its cases."""
    sentences = []
    for mode, direction in dict.fromkeys((record.mode, record.direction) for record in run.records):
        chosen = [record for record in run.records if (record.mode, record.direction) == (mode, direction)]
        compared = Comparison.of(chosen, other)
        if compared is not None:
            sentences.append(
                f"- against {TITLES[other]}, {DIRECTION_TITLES[direction]}, {mode}: "
                f"geometric mean {compared.geomean:.2f}x, least {compared.least:.2f}x "
                f"({compared.least_record.label()}), {compared.cases} case{'s' * (compared.cases != 1)}"
            )
    return "\n".join(sentences) or None


def detail_table(run: Run, records: Sequence[Record]) -> str:
    names = [name for name in run.providers() if any(name in record.seconds for record in records)]
    others = [name for name in names if name != OURS]
    header = ["N", "C x H x W", "layers", *names, *[f"{name}/{OURS}" for name in others], "GB/s", "of copy"]
    rows = []
    for record in records:
        reference = run.reference_bandwidth(record)
        achieved = record.bandwidth(OURS) if OURS in record.seconds else None
        row = [str(record.batch), record.shape, str(record.count)]
        for name in names:
            mark = "†" if record.method.get(name, "").startswith("events") else ""
            row.append(format_spread(record.spread(name)) + mark if name in record.seconds else "-")
        row += [format_ratio(record.ratio(name)) for name in others]
        row += [
            "-" if achieved is None else f"{achieved / 1e9:.1f}" if achieved < 1e11 else f"{achieved / 1e9:.0f}",
            "-" if achieved is None or reference is None else f"{100 * achieved / reference:.0f}%",
        ]
        rows.append(row)
    return table(header, rows, left=2)


def tolerance_lines(run: Run) -> list[str]:
    """The number of results checked against the reference, and each result outside the bound."""
    outside = [row for row in run.tolerance if not row.passed]
    worst = max((row for row in run.tolerance if row.provider == OURS), key=lambda row: row.worst, default=None)
    lines = [
        "Each provider's result in each case was checked elementwise against the float64 reference before it was "
        f"timed: {len(run.tolerance)} results, {len(outside)} outside the bound."
    ]
    if worst is not None:
        lines.append(
            f"Largest error / bound of bnkernels: {worst.worst:.3f} ({worst.where} of {worst.case}, {worst.direction})."
        )
    lines += [
        f"- outside: {TITLES[row.provider]}, {row.case}, {row.direction}: {row.worst:.3g} times the bound "
        f"at {row.where}; its time is reported nevertheless"
        for row in outside
    ]
    return lines


def render(run: Run, plot: str | None = None) -> str:
    """The report of a run; `plot` is the file name of the picture in the same folder."""
    where = run.machine["gpu"]["name"] if run.on_gpu else run.machine["cpu"]
    parts = [f"# {EPILOGUE_TITLES[run.epilogue]} on {where}", "\n".join(machine_lines(run))]
    if run.epilogue:
        parts.append(
            "bnkernels computes the epilogue in the BatchNorm kernels. torch's layer is followed by torch's in-place "
            "operations, which torch.compile may fuse; in 16 bits they round in between, which the bound excludes."
        )
    if run.failed:
        parts.append("\n".join(f"- **failed**: {line}" for line in run.failed))
    if run.notes:
        parts.append("\n".join(f"- note: {note}" for note in run.notes))
    parts.append("\n".join(tolerance_lines(run)))
    if plot:
        parts.append(f"![speed by shape]({plot})")
    copy = "the device copy above" if run.device_copy else "a copy of the same tensor in the same rounds"
    parts += [
        "## Summary",
        "Ratios are median times of the other provider over those of bnkernels in the same run: above 1 bnkernels is "
        "faster, below 1 (**bold**) slower. The geometric mean is over the distinct shapes; `53 layers` is the ratio "
        "of the sums over all layers of ResNet-50.",
        summary_table(run),
    ]
    sentences = [text for other in _others(run) if (text := overall(run, other))]
    if sentences:
        parts.append("\n".join(sentences))
    lost = losses(run)
    parts += ["## Losses", "\n".join(lost) if lost else "None: no other provider has a lower median in any case."]
    parts += [
        "## All cases",
        "Median of the samples, with the distances of the 20th and 80th percentile in brackets. GB/s: the bytes that "
        "must move (each input read once, each output written once) over the time of bnkernels; `of copy`: the "
        f"fraction of the bandwidth of {copy}.",
    ]
    if any(method.startswith("events") for record in run.records for method in record.method.values()):
        parts.append(
            "† CUDA graph capture failed: timed by events around calls from Python, including gaps between launches."
        )
    for (mode, direction, dtype, layout), records in run.groups():
        title = f"### {DIRECTION_TITLES[direction]}, {dtype}, {layout} ({MODE_TITLES[mode]})"
        parts += [title, detail_table(run, records)]
    return "\n\n".join(parts) + "\n"
