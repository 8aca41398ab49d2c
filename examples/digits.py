"""Train a small residual network on real images with nn.BatchNorm2d, converted and fused, and compare the three.

    python examples/digits.py                  # or: make demo

The three networks start from the same weights, see the same batches in the same order, and alternate step by step:

- with nn.BatchNorm2d,
- after `bnk.convert`, which replaces its layers by bnkernels' layers,
- after `bnk.fuse` as well, which fuses each ReLU, or addition and ReLU, into the BatchNorm before it.

In float64 the trainings are the same up to rounding near 1e-16, and the losses of the first steps agree to about that.
In float32, the usual dtype, rounding near 1e-7 moves activations across the kink of a ReLU, and within an epoch the
networks differ, as those of any two runs with different orders of summation. Their accuracies must be equally high.

The network is the ResNet for CIFAR-10 of He et al. 2015 with 14 layers; the images are scikit-learn's handwritten
digits (1,797 scans of 8x8 pixels, from the UCI repository, which the package contains). Prints the progress
of the training and the cost of a step, writes a plot, and exits with 1 unless every claim above holds and all networks
reach 97% on images not trained on.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import bnkernels as bnk

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

REQUIRED_ACCURACY = 0.97
# Tolerances, relative to the largest magnitude. In float64: the losses of all steps, and the gradients of the first. In
# float32: the first loss. In both: the outputs of a trained network after it is converted and fused.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-5}
# Convolutions in float64 are slow, and a wrong layer is visible in the first step.
FLOAT64_EPOCHS = 1

NN, CONVERTED, FUSED = "nn.BatchNorm2d", "converted", "fused"
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    NN: lambda model: model,
    CONVERTED: lambda model: bnk.convert(model),
    FUSED: lambda model: bnk.fuse(bnk.convert(model)),
}
COLOURS = {NN: "#f0a030", CONVERTED: "#204080", FUSED: "#c03060"}


class Block(nn.Module):
    """The basic residual block of He et al. 2015: two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def network() -> nn.Sequential:
    """Three stages of two blocks, 16 to 64 channels, as for CIFAR-10."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 32, 1),
        Block(32, 64, 2),
        Block(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@dataclass
class Images:
    """Images as (N, 1, 8, 8) with mean 0 and deviation 1, and their digits as (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Images, Images]:
    """Four fifths of the digits to train on and one fifth to test with, drawn by seed."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).to(dtype).unsqueeze(1)
    labels = torch.from_numpy(digits.target[order]).long()
    held_out = len(labels) // 5
    mean, std = images[held_out:].mean(), images[held_out:].std()
    images = (images - mean) / std
    return (
        Images(images[held_out:].to(device), labels[held_out:].to(device)),
        Images(images[:held_out].to(device), labels[:held_out].to(device)),
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel in each direction and filled up with the background."""
    count, _, height, width = images.shape
    down, right = torch.randint(3, (2, count, 1), generator=generator).to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    each = torch.arange(count, device=images.device)
    moved = padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    # One channel is always contiguous(), but convolutions would take the strides of the permute for channels_last.
    return moved.clone(memory_format=torch.contiguous_format)


@dataclass
class Run:
    """One of the three networks, its optimizer, and its losses, times and accuracies."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step
    losses: list[float] = field(default_factory=list)  # of each epoch, the mean
    accuracies: list[float] = field(default_factory=list)  # after each epoch, on the test images

    def step(self, images: Tensor, labels: Tensor) -> None:
        started = now(images.device)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.seconds.append(now(images.device) - started)
        self.schedule.step()
        self.step_losses.append(loss.item())

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        self.model.eval()
        logits: Tensor = self.model(images)
        self.model.train()
        return logits

    def finish_epoch(self, test: Images, steps: int) -> None:
        self.losses.append(float(np.mean(self.step_losses[-steps:])))
        self.accuracies.append(float((self.logits(test.images).argmax(1) == test.labels).double().mean()))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def gradient_difference(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of any gradient, relative to the largest magnitude of its parameter's."""
    pairs = [(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters())]
    return largest(relative_difference(p, q) for p, q in pairs if p is not None and q is not None)


def largest(values: Iterable[float]) -> float:
    """The largest value; NaN if any is NaN."""
    return float(np.max(list(values)))


class Race:
    """The three networks in one dtype, trained in alternating steps, and the difference of their first gradients."""

    def __init__(self, dtype: torch.dtype, args: argparse.Namespace) -> None:
        self.dtype = dtype
        self.data, self.test = load(args.device, dtype, args.seed)
        self.steps_per_epoch = len(self.data) // args.batch_size
        self.first_gradients = 0.0
        self.runs: dict[str, Run] = {}
        torch.manual_seed(args.seed)
        original = network().to(args.device, dtype)
        for name, change in VARIANTS.items():
            model = change(copy.deepcopy(original))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
            total = args.epochs * self.steps_per_epoch
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=total)
            self.runs[name] = Run(model, optimizer, schedule)

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def bnkernels_runs(self) -> list[Run]:
        return [self.runs[CONVERTED], self.runs[FUSED]]

    def step(self, images: Tensor, labels: Tensor) -> None:
        order = list(self.runs.values())
        turn = len(order[0].seconds) % len(order)  # every network goes first equally often
        for run in order[turn:] + order[:turn]:
            run.step(images, labels)
        if len(order[0].seconds) == 1:
            baseline = self.runs[NN].model
            self.first_gradients = largest(gradient_difference(run.model, baseline) for run in self.bnkernels_runs)

    def loss_differences(self, run: Run) -> list[float]:
        """The difference of each step's loss from nn.BatchNorm2d's, relative to the latter's largest loss."""
        baseline = self.runs[NN].step_losses
        return [abs(a - b) / max(baseline) for a, b in zip(run.step_losses, baseline)]


NAMES = " | ".join(f"{name:>9}" for name in VARIANTS)
HEADER = f"{'':5} | training loss{'':{len(NAMES) - 13}} | test accuracy\nepoch | {NAMES} | {NAMES}"


def row(race: Race) -> str:
    runs = [(max(9, len(name)), run) for name, run in race.runs.items()]
    losses = [f"{run.losses[-1]:{width}.5f}" for width, run in runs]
    accuracies = [f"{run.accuracies[-1]:{width}.2%}" for width, run in runs]
    return " | ".join([f"{len(runs[0][1].losses):5d}", *losses, *accuracies])


def train(dtype: torch.dtype, args: argparse.Namespace) -> Race:
    """Trains the three networks and prints one row per epoch."""
    race = Race(dtype, args)
    data, test, steps = race.data, race.test, race.steps_per_epoch
    epochs = min(args.epochs, FLOAT64_EPOCHS) if dtype == torch.float64 else args.epochs
    generator = torch.Generator().manual_seed(args.seed)
    print(f"\n{race.name}: {len(data)} images to train on, {len(test)} to test with\n{HEADER}")
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(data), generator=generator).split(args.batch_size)[:steps]
        for chosen in tqdm(order, desc=f"{race.name}, epoch {epoch}/{epochs}", leave=False, disable=None):
            indices = chosen.to(args.device)
            race.step(shifted(data.images[indices], generator), data.labels[indices])
        for run in race.runs.values():
            run.finish_epoch(test, steps)
        tqdm.write(row(race))
    return race


def checks(race: Race) -> Iterator[tuple[bool, str, str]]:
    """The conditions after a race: whether each holds, its description, and the measured value."""
    allowed = AGREEMENT[race.dtype]
    baseline = race.runs[NN]
    modules = [module for run in race.bnkernels_runs for module in run.model.modules()]
    layers = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    all_converted = all(type(layer) is bnk.BatchNorm2d for layer in layers)
    yield all_converted, "every layer converted", f"{len(layers)} in two networks"
    differences = [race.loss_differences(run) for run in race.bnkernels_runs]
    if race.dtype == torch.float64:
        yield race.first_gradients <= allowed, "the first gradients agree", f"{race.first_gradients:.1e}"
        apart = largest(value for each in differences for value in each)
        yield apart <= allowed, f"the losses of all {len(baseline.seconds)} steps agree", f"{apart:.1e}"
    else:
        apart = largest(each[0] for each in differences)
        yield apart <= allowed, "the first losses agree", f"{apart:.1e}"
    for name in (CONVERTED, FUSED):
        model = VARIANTS[name](copy.deepcopy(baseline.model)).eval()
        after = relative_difference(model(race.test.images).detach(), baseline.logits(race.test.images))
        yield after <= allowed, f"the network trained with nn.BatchNorm2d, {name}, computes the same", f"{after:.1e}"
    if race.dtype == torch.float32:
        worst = min(run.accuracies[-1] for run in race.runs.values())
        yield worst > REQUIRED_ACCURACY, f"test accuracy of all three above {REQUIRED_ACCURACY:.0%}", f"{worst:.2%}"


def saved_bytes(model: nn.Module, batch: Images) -> tuple[int, int]:
    """Bytes that autograd saves in one forward for its backward, and the part that is inputs of convolutions.

    Distinct storages are counted, so a tensor that two operations save counts once. Parameters, buffers and the batch
    are left out, as they stay alive in any case.
    """
    inputs: set[int] = set()
    # A copy is not fused, so hooks see its tensors; the convolutions' inputs have the same size.
    eager = copy.deepcopy(model)
    for module in eager.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: inputs.add(args[0].untyped_storage().data_ptr()))
    of_convolutions = sum(size for address, size in saved_storages(eager, batch).items() if address in inputs)
    state = copy.deepcopy(model.state_dict())
    model(batch.images)  # the first call captures the graph; capture must not see the hooks
    total = sum(saved_storages(model, batch).values())
    model.load_state_dict(state)  # the forward has updated the running statistics
    return total, of_convolutions


def saved_storages(model: nn.Module, batch: Images) -> dict[int, int]:
    """The addresses and sizes in bytes of the storages that autograd saves in one forward."""
    persistent = [*model.parameters(), *model.buffers(), batch.images, batch.labels]
    left_out = {tensor.untyped_storage().data_ptr() for tensor in persistent}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(batch.images), batch.labels)
    del loss
    return {address: storage.nbytes() for address, storage in saved.items()}


def quartiles(values: list[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in np.percentile(values, (25, 50, 75)))
    return f"{middle} ({low} to {high})"


def table(race: Race, saved: dict[str, tuple[int, int]]) -> str:
    rows = [["", "ms a step", "times as fast as nn", "saved for backward", "of it inputs of convolutions"]]
    for name, run in race.runs.items():
        milliseconds = quartiles([1000 * seconds for seconds in run.seconds], ".1f")
        step_ratios = [baseline / run_seconds for baseline, run_seconds in zip(race.runs[NN].seconds, run.seconds)]
        speedup = "" if name == NN else quartiles(step_ratios, ".2f")
        rows.append([name, milliseconds, speedup, *(f"{count / 1e6:.2f} MB" for count in saved[name])])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(" | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in rows)


ABOUT_THE_TABLE = """\
Times: medians with quartiles of alternating steps (forward, backward and optimizer, convolutions included).
Saved: distinct storages that autograd saves from forward to backward, without parameters, buffers and the batch.
Fusing a ReLU saves the memory of its output if nothing else saves that output. A convolution saves its input, and a
fused addition and ReLU save their output, so fusing saves no memory in a residual network."""


def draw_curves(axes: Axes, race: Race, values: dict[str, list[float]], label: str) -> None:
    """Equal curves overlap, so the first is the widest."""
    for width, (name, curve) in zip((6, 3, 1.2), values.items()):
        epochs = range(1, len(curve) + 1)
        axes.plot(epochs, curve, color=COLOURS[name], linewidth=width, marker="o", markersize=width + 2, label=name)
    axes.set(xlabel="epoch", ylabel=label, title=f"{race.name}: {label}, apart by rounding alone")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_differences(axes: Axes, race: Race) -> None:
    for size, (name, run) in zip((9, 4), list(race.runs.items())[1:]):
        differences = [value or math.nan for value in race.loss_differences(run)]  # a log axis has no 0
        axes.plot(range(1, len(differences) + 1), differences, "o", color=COLOURS[name], markersize=size, label=name)
    axes.axhline(AGREEMENT[race.dtype], color="grey", linestyle="--", label="allowed")
    axes.set(yscale="log", xlabel="training step (no point: no difference)", ylabel="relative to the largest loss")
    axes.set_title(f"{race.name}: difference of the loss from nn.BatchNorm2d's")


def draw_times(axes: Axes, race: Race, saved: dict[str, tuple[int, int]]) -> None:
    milliseconds = [[1000 * seconds for seconds in run.seconds] for run in race.runs.values()]
    boxes = axes.boxplot(milliseconds, whis=(5, 95), showfliers=False, patch_artist=True, widths=0.6)
    for box, median, colour in zip(boxes["boxes"], boxes["medians"], COLOURS.values()):
        box.set(facecolor=colour, alpha=0.6)
        median.set(color="black")
    labels = [f"{name}\n{total / 1e6:.2f} MB saved\nfor backward" for name, (total, _) in saved.items()]
    axes.set_xticks(range(1, len(labels) + 1), labels)
    axes.set(ylabel="ms", ylim=(0, None), title=f"{race.name}: time of a step (median, quartiles, 5% and 95%)")


def plot(path: Path, float64: Race, float32: Race, saved: dict[str, tuple[int, int]], machine: str) -> None:
    figure, ((losses, accuracies), (differences, times)) = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    draw_curves(losses, float32, {name: run.losses for name, run in float32.runs.items()}, "training loss")
    losses.set_yscale("log")
    percent = {name: [100 * part for part in run.accuracies] for name, run in float32.runs.items()}
    draw_curves(accuracies, float32, percent, "test accuracy (%)")
    accuracies.axhline(100 * REQUIRED_ACCURACY, color="grey", linestyle="--", label="required at the end")
    draw_differences(differences, float64)
    draw_times(times, float32, saved)
    for axes in (losses, accuracies, differences, times):
        axes.grid(alpha=0.3)
        if axes is not times:
            axes.legend()
    figure.suptitle(f"A residual network on handwritten digits, trained three times from the same weights ({machine})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, default=Path("out/demo/digits.png"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    started = time.perf_counter()
    print("bnkernels on", args.device)
    for name, value in bnk.build_info().items():
        print(f"  {name:9} {value}")
    # TF32 would round the convolutions' inputs to ten bits and amplify small differences.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        float64, float32 = (train(dtype, args) for dtype in AGREEMENT)
        results = [(race.name, check) for race in (float64, float32) for check in checks(race)]
        data = float32.data
        batch = Images(data.images[: args.batch_size], data.labels[: args.batch_size])
        saved = {name: saved_bytes(run.model, batch) for name, run in float32.runs.items()}
    machine = f"cpu, {torch.get_num_threads()} threads" if args.device.type == "cpu" else str(args.device)
    plot(args.plot, float64, float32, saved, machine)

    print(f"\nA training step in float32, {args.batch_size} images ({machine}):\n\n{table(float32, saved)}\n")
    print(ABOUT_THE_TABLE, end="\n\n")
    for dtype_name, (passed, what, value) in results:
        print(f"{'ok  ' if passed else 'FAIL'} {dtype_name}: {what}: {value}")
    print(f"\nPlot: {args.plot} ({time.perf_counter() - started:.0f} s in all)")
    return 0 if all(passed for _, (passed, _, _) in results) else 1


if __name__ == "__main__":
    sys.exit(main())
