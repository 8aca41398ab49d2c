"""Draws docs/figures/speedup.png, the plot of README.md, from committed measurements.

python docs/plot.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "bench/results/2026-11-23-amd-epyc-2-cores-resnet50.json"
WHOLE_STEPS = ROOT / "docs/why.md"  # the table of studies/cifar_style_speedrun.py
OUTPUT = ROOT / "docs/figures/speedup.png"

BATCH = 32
COLORS = {"fp32": "#0000a7", "bf16": "#c1272d"}
LAYOUTS = {"nchw": ("o", "NCHW"), "nhwc": ("s", "channels_last")}


def whole_step_ratios(page: str, layout: str) -> list[float]:
    """Time of a step with nn.BatchNorm2d over that of the converted network, by seed, from a table of why.md."""
    (row,) = re.findall(
        rf"^\|.+\| nn.BatchNorm2d, {layout} / converted, median step times +\|(.+)\|$", page, re.MULTILINE
    )
    return [float(value) for value in row.split("|")[0].split(",")]


def main() -> None:
    run = json.loads(RUN.read_text())
    machine = run["machine"]
    records = [one for one in run["records"] if (one["direction"], one["batch"]) == ("step", BATCH)]
    shapes = list(dict.fromkeys(one["shape"] for one in records))
    page = WHOLE_STEPS.read_text()

    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    series = [(dtype, layout) for dtype in COLORS for layout in LAYOUTS]
    for index, (dtype, layout) in enumerate(series):
        marker, title = LAYOUTS[layout]
        offset = 0.16 * (index - (len(series) - 1) / 2)
        chosen = [one for one in records if (one["dtype"], one["layout"]) == (dtype, layout)]
        ratios = [
            statistics.median(one["seconds"]["eager"]) / statistics.median(one["seconds"]["ours"]) for one in chosen
        ]
        rows = [shapes.index(one["shape"]) + offset for one in chosen]
        if dtype == "fp32":
            ratios.append(statistics.median(whole_step_ratios(page, title)))
            rows.append(len(shapes) + 0.5 + offset)
        face = COLORS[dtype] if layout == "nchw" else "white"
        axes.plot(
            ratios, rows, marker, color=COLORS[dtype], markerfacecolor=face, markersize=5.5, label=f"{dtype} {title}"
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.axhline(len(shapes) - 0.25, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xlim(0.85, 9.5)
    axes.set_yticks([*range(len(shapes)), len(shapes) + 0.5], [*shapes, "whole training step,\nsmall ResNet, 1 thread"])
    axes.set_ylim(len(shapes) + 1.1, -0.6)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of torch / time of bnkernels (right of 1x: bnkernels is faster)")
    axes.set_ylabel("BatchNorm layer, channels x height x width")
    axes.legend(loc="lower right", frameon=True, fontsize=9)
    axes.set_title(
        f"CPU, forward + backward of training: each BatchNorm layer of ResNet-50 alone, N = {BATCH}; a whole step\n"
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}",
        fontsize=10,
    )
    figure.savefig(OUTPUT, dpi=110)
    print(OUTPUT)


if __name__ == "__main__":
    main()
