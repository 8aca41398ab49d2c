"""Plots a run: on a CPU the speed-up by shape, on a GPU the achieved bandwidth against a device copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from .cases import DIRECTION_TITLES, EPILOGUE_TITLES
from .providers import COPY, OURS, TITLES
from .results import Record, Run
from .stats import Spread

_COLORS = {OURS: "#c1272d", "eager": "#0000a7", "compiled": "#008176", COPY: "#808080"}
_MARKERS = {"nchw": "o", "nhwc": "s"}
_SHADES = {"fp32": "#0000a7", "bf16": "#c1272d", "fp16": "#eecc16"}


def _footer(run: Run) -> str:
    where = run.machine["gpu"]["name"] if run.on_gpu else f"{run.machine['cpu']}, {run.machine['threads']} threads"
    return (
        f"{where}; torch {run.machine['torch']}; commit {str(run.machine['commit'])[:10]}; {run.machine['date'][:10]}"
    )


def _ratio_panel(axes: Axes, records: list[Record], other: str) -> None:
    """One dot per case, one row per shape; x is the speed-up, and bars span p20 to p80 of both times."""
    shapes = list(dict.fromkeys(record.shape for record in records))
    kinds = sorted({(record.dtype, record.layout) for record in records}, reverse=True)
    for offset, (dtype, layout) in enumerate(kinds):
        chosen = [r for r in records if (r.dtype, r.layout) == (dtype, layout) and r.ratio(other) is not None]
        if not chosen:
            continue
        rows = [shapes.index(record.shape) + 0.7 * ((offset + 0.5) / len(kinds) - 0.5) for record in chosen]
        ratios = [record.spread(other).median / record.spread(OURS).median for record in chosen]
        low = [record.spread(other).p20 / record.spread(OURS).p80 for record in chosen]
        high = [record.spread(other).p80 / record.spread(OURS).p20 for record in chosen]
        axes.errorbar(
            ratios,
            rows,
            xerr=([r - lo for r, lo in zip(ratios, low)], [hi - r for r, hi in zip(ratios, high)]),
            fmt=_MARKERS[layout],
            color=_SHADES[dtype],
            markerfacecolor=_SHADES[dtype] if layout == "nchw" else "white",
            markersize=4.5,
            elinewidth=0.8,
            label=f"{dtype} {layout}",
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"))
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    for boundary in range(1, len(shapes)):
        axes.axhline(boundary - 0.5, color="#e5e5e5", linewidth=0.6, zorder=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _width(columns: Sequence[object]) -> float:
    """Figure width in inches: that of the panels, at least that of the title and the legend."""
    return max(9.0, 1.2 + 3.9 * len(columns))


def plot_ratios(run: Run, path: Path) -> None:
    """Speed-up over nn.BatchNorm2d; one column of panels per direction, one row per batch."""
    directions = list(dict.fromkeys(record.direction for record in run.records))
    batches = sorted({record.batch for record in run.records})
    figure, panels = plt.subplots(
        len(batches),
        len(directions),
        figsize=(_width(directions), 1.4 + 4.4 * len(batches)),
        sharey=True,
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for row, batch in zip(panels, batches):
        for axes, direction in zip(row, directions):
            chosen = [r for r in run.records if (r.batch, r.direction) == (batch, direction)]
            _ratio_panel(axes, chosen, "eager")
            axes.set_title(f"{DIRECTION_TITLES[direction]}, N = {batch}", fontsize=10)
            axes.label_outer()
    for axes in panels[-1]:
        axes.set_xlabel("time of torch / time of bnkernels")
    for row in panels:
        row[0].set_ylabel("channels x height x width")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False)
    figure.suptitle(
        f"{EPILOGUE_TITLES[run.epilogue]}: speed-up over torch, by layer of ResNet-50 (right of 1x: bnkernels wins)\n"
        + _footer(run),
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_bandwidth(run: Run, path: Path) -> None:
    """Achieved floor bytes/s over tensor size; one column of panels per direction, one row per dtype and layout."""
    records = [record for record in run.records if record.mode == "cold"]
    directions = list(dict.fromkeys(record.direction for record in records))
    rows = sorted({(record.dtype, record.layout) for record in records})
    figure, panels = plt.subplots(
        len(rows),
        len(directions),
        figsize=(_width(directions), 1.4 + 2.6 * len(rows)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    ceiling = Spread.of(run.device_copy).median / 1e9 if run.device_copy else None
    for row, (dtype, layout) in zip(panels, rows):
        row[0].set_ylabel(f"{dtype} {layout}\nfloor bytes / time [GB/s]")
        for axes, direction in zip(row, directions):
            chosen = [r for r in records if (r.dtype, r.layout, r.direction) == (dtype, layout, direction)]
            for name in run.providers():
                points = sorted((r.tensor_bytes / 2**20, r.bandwidth(name) / 1e9) for r in chosen if name in r.seconds)
                axes.plot(
                    [size for size, _ in points],
                    [rate for _, rate in points],
                    "o-" if name == OURS else "s--",
                    color=_COLORS[name],
                    markersize=4,
                    linewidth=1,
                    label=TITLES[name],
                )
            if ceiling is not None:
                axes.axhline(ceiling, color=_COLORS[COPY], linewidth=1, label="device copy")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_ylim(bottom=0)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
    for axes, direction in zip(panels[0], directions):
        axes.set_title(DIRECTION_TITLES[direction], fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("size of x [MiB]")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False)
    figure.suptitle(
        f"{EPILOGUE_TITLES[run.epilogue]}: achieved bandwidth, L2 cold, ResNet-50 layers (higher is better)\n"
        + _footer(run),
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot(run: Run, path: Path) -> None:
    """Writes the plot of the run as a PNG."""
    if any(record.mode == "cold" for record in run.records):
        plot_bandwidth(run, path)
    else:
        plot_ratios(run, path)
