"""The same small residual network trained on real images with nn.BatchNorm2d and converted to bnkernels, side by side.

    python examples/digits.py                  # or: make demo

Both networks start from the same weights and see the same batches in the same order; they differ in their batch
normalisation layers only. Twice:

- In float64 they go through the same training: what separates them is rounding near 1e-16, and though every step
  amplifies it, their curves lie on each other to the end.
- In float32, as one would train, rounding near 1e-7 moves activations across the kink of a ReLU, and within an epoch
  the two are different networks, as two runs that sum in another order always are. They must be equally good.

The images are scikit-learn's handwritten digits (1,797 scans of 8x8 pixels, from the UCI repository, which the package
contains). Prints a table, writes a plot, and exits with 1 unless every claim above held and all reach 97% on images not
trained on.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
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
# How far apart the two may be, relative to the largest magnitude. In float64: the losses of all steps, and the
# gradients of the first. In float32: the first loss. In both: what a trained network computes once it is converted.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-5}


class Block(nn.Module):
    """The basic residual block of He et al. 2015: two 3x3 convolutions beside a shortcut."""

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
    """A residual network for 8x8 images: three stages of two blocks, 32 to 128 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32, 32, 1),
        Block(32, 32, 1),
        Block(32, 64, 2),
        Block(64, 64, 1),
        Block(64, 128, 2),
        Block(128, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
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
    """Each image moved by up to one pixel in each direction, what is uncovered filled with the background."""
    count, _, height, width = images.shape
    down, right = torch.randint(3, (2, count, 1), generator=generator).to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    each = torch.arange(count, device=images.device)
    moved = padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    # With one channel it is contiguous() already, but convolutions would take its strides for channels_last.
    return moved.clone(memory_format=torch.contiguous_format)


@dataclass
class Contestant:
    """One of the two networks, its optimizer, and what was seen of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step_losses: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        started = now(images.device)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.seconds += now(images.device) - started
        self.schedule.step()
        self.step_losses.append(loss.item())

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        self.model.eval()
        logits: Tensor = self.model(images)
        self.model.train()
        return logits


def contestant(name: str, model: nn.Module, steps: int) -> Contestant:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    return Contestant(name, model, optimizer, schedule)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def parameter_difference(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of any parameter or running statistic."""
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return max(float((p.double() - q.double()).abs().max()) for p, q in pairs)


def gradient_difference(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of any gradient, relative to the largest magnitude of its parameter's."""
    pairs = [(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters())]
    return max(relative_difference(p, q) for p, q in pairs if p is not None and q is not None)


@dataclass
class Race:
    """The two networks trained in lockstep in one dtype, and how far apart their first gradients were."""

    dtype: torch.dtype
    theirs: Contestant
    ours: Contestant
    first_gradients: float = 0.0

    @property
    def both(self) -> tuple[Contestant, Contestant]:
        return self.theirs, self.ours

    @property
    def speedup(self) -> float:
        return self.theirs.seconds / self.ours.seconds

    def loss_differences(self) -> list[float]:
        return [abs(a - b) for a, b in zip(self.theirs.step_losses, self.ours.step_losses)]


HEADER = "epoch | loss nn  | loss bnk | acc nn | acc bnk | max loss diff | max param diff | time nn/bnk"


def row(race: Race, steps: int) -> str:
    theirs, ours = race.both
    return (
        f"{len(ours.losses):5d} | {theirs.losses[-1]:8.5f} | {ours.losses[-1]:8.5f} | {theirs.accuracies[-1]:6.2%} | "
        f"{ours.accuracies[-1]:7.2%} | {max(race.loss_differences()[-steps:]):13.1e} | "
        f"{parameter_difference(ours.model, theirs.model):14.1e} | {race.speedup:11.2f}"
    )


def train(dtype: torch.dtype, args: argparse.Namespace) -> tuple[Race, Images]:
    """Trains both and prints a row an epoch; returns them and the images they are tested with."""
    data, test = load(args.device, dtype, args.seed)
    steps = len(data) // args.batch_size
    torch.manual_seed(args.seed)
    model = network().to(args.device, dtype)
    race = Race(
        dtype,
        contestant("nn.BatchNorm2d", model, args.epochs * steps),
        contestant("bnkernels", bnk.convert(copy.deepcopy(model)), args.epochs * steps),
    )
    generator = torch.Generator().manual_seed(args.seed)
    print(f"\n{name_of(dtype)}: {len(data)} images to train on, {len(test)} to test with\n{HEADER}")
    for epoch in range(1, args.epochs + 1):
        order = torch.randperm(len(data), generator=generator).split(args.batch_size)
        bar = tqdm(order[:steps], desc=f"{name_of(dtype)}, epoch {epoch}/{args.epochs}", leave=False, disable=None)
        for step, chosen in enumerate(bar):
            there = chosen.to(args.device)
            images, labels = shifted(data.images[there], generator), data.labels[there]
            # In turns first and second, so that neither has the warmer caches.
            for one in race.both if step % 2 else race.both[::-1]:
                one.step(images, labels)
            if len(race.ours.step_losses) == 1:
                race.first_gradients = gradient_difference(race.ours.model, race.theirs.model)
                # The first step also tunes and allocates: not part of the comparison of time.
                race.ours.seconds = race.theirs.seconds = 0.0
            bar.set_postfix(loss=f"{race.ours.step_losses[-1]:.4f}")
        for one in race.both:
            one.losses.append(float(np.mean(one.step_losses[-steps:])))
            one.accuracies.append(float((one.logits(test.images).argmax(1) == test.labels).double().mean()))
        tqdm.write(row(race, steps))
    return race, test


Check = tuple[bool, str, str]


def checks(race: Race, test: Images) -> Iterator[Check]:
    """What must hold after a race. Converts the network that was trained with nn.BatchNorm2d."""
    allowed = AGREEMENT[race.dtype]
    layers = [type(module) for module in race.ours.model.modules() if isinstance(module, nn.BatchNorm2d)]
    yield all(layer is bnk.BatchNorm2d for layer in layers), "every layer converted", f"{len(layers)}"
    differences = race.loss_differences()
    if race.dtype == torch.float64:
        yield race.first_gradients <= allowed, "the first gradients agree", f"{race.first_gradients:.1e}"
        apart = max(differences) / max(race.theirs.step_losses)
        yield apart <= allowed, f"the losses of all {len(differences)} steps agree", f"{apart:.1e}"
    else:
        apart = differences[0] / race.theirs.step_losses[0]
        yield apart <= allowed, "the first loss agrees", f"{apart:.1e}"
    before = race.theirs.logits(test.images)
    after = relative_difference(bnk.convert(race.theirs.model).eval()(test.images).detach(), before)
    yield after <= allowed, "the network trained with nn.BatchNorm2d, converted, computes the same", f"{after:.1e}"
    worst = min(one.accuracies[-1] for one in race.both)
    yield worst > REQUIRED_ACCURACY, f"test accuracy of both above {REQUIRED_ACCURACY:.0%}", f"{worst:.2%}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw_pair(axes: Axes, race: Race, curves: tuple[list[float], list[float]], label: str) -> None:
    epochs = range(1, len(curves[0]) + 1)
    axes.plot(epochs, curves[0], color="#f0a030", linewidth=6, alpha=0.6, label=race.theirs.name)
    axes.plot(epochs, curves[1], color="#204080", linewidth=1.5, marker="o", markersize=4, label=race.ours.name)
    axes.set(xlabel="epoch", ylabel=label, title=name_of(race.dtype))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def plot(path: Path, races: list[Race], device: torch.device) -> None:
    """A row for each dtype: training loss and test accuracy by epoch, and by step how far the losses are apart."""
    figure, grid = plt.subplots(len(races), 3, figsize=(15, 4.3 * len(races)), layout="constrained", squeeze=False)
    for race, (left, middle, right) in zip(races, grid):
        theirs, ours = race.both
        draw_pair(left, race, (theirs.losses, ours.losses), "training loss (mean of the epoch)")
        left.set_yscale("log")
        percent = [[100 * accuracy for accuracy in one.accuracies] for one in race.both]
        draw_pair(middle, race, (percent[0], percent[1]), "test accuracy (%)")
        differences = race.loss_differences()
        right.semilogy(range(1, len(differences) + 1), differences, color="#204080", linewidth=1)
        right.set(xlabel="training step", ylabel="difference of the two losses", title=name_of(race.dtype))
        right.grid(alpha=0.3)
    figure.suptitle(f"A residual network on handwritten digits, trained with both from the same seed ({device.type})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
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
    races = []
    results: list[tuple[str, Check]] = []
    # TF32 would round what the two layers give to ten bits, and so make large differences of small ones.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for dtype in AGREEMENT:
            race, test = train(dtype, args)
            races.append(race)
            results += [(name_of(dtype), check) for check in checks(race, test)]
    plot(args.plot, races, args.device)

    print()
    for dtype_name, (passed, what, value) in results:
        print(f"{'ok  ' if passed else 'FAIL'} {dtype_name}: {what}: {value}")
    ratios = ", ".join(f"{race.speedup:.2f} times in {name_of(race.dtype)}" for race in races)
    print(f"\nTime of the training steps with nn.BatchNorm2d over bnkernels: {ratios} (convolutions included).")
    print(f"Plot: {args.plot} ({time.perf_counter() - started:.0f} s in all)")
    return 0 if all(passed for _, (passed, _, _) in results) else 1


if __name__ == "__main__":
    sys.exit(main())
