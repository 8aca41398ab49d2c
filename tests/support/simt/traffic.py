"""The bytes that BatchNorm moves in ResNet-50, planned and counted: `python tests/support/simt/traffic.py >
docs/traffic.md`.

For each BatchNorm layer, in both layouts, forward and backward, at two batch sizes, in bfloat16:

    planned   what plan_pass says for an H200
    counted   what the kernels read and write when the host runs them on that device and batch, both 32 times smaller

The small device has the same shared memory per element, so the same part of the tensor can stay on chip. Rows,
channels and alignments are the layer's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from bench.markdown import table  # noqa: E402
from bench.shapes import LayerShape, resnet50  # noqa: E402
from bnkernels.testing import Inputs  # noqa: E402
from simt.common import requested  # noqa: E402
from simt.plans import Limits, Plan  # noqa: E402
from simt.server import How, Run, Server  # noqa: E402

BATCHES = (32, 256)
LAYOUTS = ("channels_first", "channels_last")
DIRECTIONS = ("forward", "backward")
TENSORS = {"forward": ("x", "y"), "backward": ("x", "grad_y", "grad_x")}
DTYPE = torch.bfloat16

SCALE = 32
H200 = Limits(132)
# Of 132 multiprocessors the plan leaves 8 to other kernels, of 4 none: 124 / 32 are 4 with 31/32 of the shared memory
# each.
SMALL = Limits(4, shared_per_multiprocessor=H200.shared_per_multiprocessor * 31 // 32)


@dataclass(frozen=True)
class Cell:
    """One layer, in one layout and direction."""

    layer: LayerShape
    batch: int
    layout: str
    direction: str
    plan: Plan
    """The plan for the H200."""
    small_plan: Plan
    launches: int
    """The plan for the small device, and the bytes read and written there of the layer's tensors ..."""
    counted: tuple[int, int]
    exchanged: tuple[int, int]
    """... and of scratch memory."""
    asked_twice: int
    """Bytes that two threads read, one for a row that ends inside a vector and one for the row that begins there."""


def problem(layer: LayerShape, batch: int, layout: str) -> tuple[int, int, int]:
    """Outer, channels, inner."""
    pixels = layer.height * layer.width
    return (batch, layer.channels, pixels) if layout == "channels_first" else (batch * pixels, layer.channels, 1)


def inputs_of(layer: LayerShape, batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(layer.channels)
    x = torch.randn(layer.input_shape(batch), generator=generator).to(DTYPE)
    one = torch.ones(layer.channels)
    return Inputs(x, x, one, one, one.clone(), one.clone(), torch.tensor(0), True, 0.1, 1e-5)


def cell(server: Server, layer: LayerShape, batch: int, layout: str, direction: str, inputs: Inputs, run: Run) -> Cell:
    operation = "forward_train" if direction == "forward" else "backward"
    names = TENSORS[direction]
    (small_plan,) = run.plans
    asked_twice = 0
    if small_plan.layout == "channels_first":
        once = inputs.x.numel() * inputs.x.element_size()
        asked_twice = (len(names) - 1) * (requested(inputs, False, 0, 0) - once)
    assert asked_twice == 0 or small_plan.predicted == small_plan.floor  # of the tensors that are read once

    def moved(*names: str) -> tuple[int, int]:
        return (
            sum(launch.read[name] for launch in run.launches for name in names),
            sum(launch.written[name] for launch in run.launches for name in names),
        )

    return Cell(
        layer,
        batch,
        layout,
        direction,
        server.plan(operation, problem(layer, batch, layout), "bfloat16", H200),
        small_plan,
        len(run.launches),
        moved(*names),
        moved("scratch"),
        asked_twice,
    )


def cells(server: Server) -> Iterator[Cell]:
    """`server`: run_kernels in the plain build."""
    for layer in resnet50():
        for batch in BATCHES:
            inputs = inputs_of(layer, batch // SCALE)
            for layout in LAYOUTS:
                last = layout == "channels_last"
                forward = server.forward_train(inputs, How(limits=SMALL), channels_last=last)
                mean, invstd = forward.outputs.mean, forward.outputs.invstd
                assert mean is not None and invstd is not None
                backward = server.backward(inputs, mean, invstd, How(limits=SMALL), channels_last=last)
                for direction, run in zip(DIRECTIONS, (forward, backward)):
                    yield cell(server, layer, batch, layout, direction, inputs, run)


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = """# Memory traffic of ResNet-50's BatchNorm layers

Printed by `python tests/support/simt/traffic.py`; a test compares. bfloat16, 224x224 images, training. Bytes of a
layer's activations over the floor, which is 2 tensors forward (x, y) and 3 backward (x, grad_y, grad_x). PyTorch's
native kernels move 3 and 5, a ratio of 1.5 and 1.67.

- *plan*: on an H200, CTAs per group x groups that run concurrently, and the fraction of the data that stays on chip if
  it is below 100%. *packed*: rows of several channels are processed as columns of one row. *cluster*: the groups are
  clusters. *two-pass*: the two-pass path, several launches.
- *planned*: the plan's prediction for that device.
- *exchange*: the partials that the CTAs of a group exchange, in addition. Each CTA reads all of them or its part: 3 MB
  of scratch memory at most; none in a cluster, whose CTAs read each other's shared memory.
- *counted*: the kernels, executed thread by thread on the host for a device and a batch that are both 32 times smaller
  (4 multiprocessors with 31/32 of the shared memory each: of the H200's 132 the plan leaves 8 free). The cached data
  are split over fewer CTAs there, so the two columns may differ. A 16-byte vector that two rows share is counted twice.
"""


def ratio(part: int, whole: int) -> str:
    return f"{part / whole:.3f}"


def plan_words(plan: Plan) -> str:
    if plan.path == "two_pass":
        return "two-pass"
    cached_vectors = 2 - plan.predicted[0] / plan.floor[0]
    packed = "packed " if plan.layout == "packed" else ""
    cluster = "cluster " if plan.group == "cluster" else ""
    return f"{packed}{cluster}{plan.group_size} x {plan.groups}" + (
        "" if cached_vectors == 1 else f", {100 * cached_vectors:.0f}%"
    )


def figures(cells: list[Cell]) -> list[str]:
    """planned, exchange, counted: totals over all layers of these shapes."""

    def total(values: list[tuple[int, int]]) -> int:
        return sum(one.layer.count * sum(pair) for one, pair in zip(cells, values))

    floor = total([one.plan.floor for one in cells])
    return [
        ratio(total([one.plan.predicted for one in cells]), floor),
        ratio(total([one.plan.exchanged for one in cells]), floor),
        ratio(total([one.counted for one in cells]), total([one.small_plan.floor for one in cells])),
    ]


def page(all_cells: list[Cell]) -> str:
    header = ["layer", "layers"]
    for direction in DIRECTIONS:
        header += [direction, "planned", "exchange", "counted"]
    parts = [PAGE]
    for layout in LAYOUTS:
        for batch in BATCHES:
            here = [one for one in all_cells if (one.layout, one.batch) == (layout, batch)]
            by_direction = [[one for one in here if one.direction == direction] for direction in DIRECTIONS]
            rows = []
            for pair in zip(*by_direction):
                row = [pair[0].layer.name, str(pair[0].layer.count)]
                for one in pair:
                    row += [plan_words(one.plan), *figures([one])]
                rows.append(row)
            total = ["all", str(sum(one.layer.count for one in by_direction[0]))]
            for some in by_direction:
                total += ["", *figures(some)]
            parts.append(
                f"## {layout.replace('_', '-').capitalize()}, N = {batch}\n\n" + table(header, [*rows, total]) + "\n"
            )
    return "\n".join(parts)


def main() -> None:
    server = Server("plain")
    print(page(list(cells(server))), end="")
    server.close()


if __name__ == "__main__":
    main()
