"""The same small residual network trained twice on real images: with nn.BatchNorm2d, and converted to bnkernels.

    python examples/digits.py                  # or: make demo

Both networks start from the same weights and see the same batches in the same order; they differ in their batch
normalisation layers only. So their first losses and gradients agree to rounding, and their curves lie on each other
until rounding, which training amplifies, makes two equally good networks of them.

The images are scikit-learn's handwritten digits (1,797 scans of 8x8 pixels, from the UCI repository, which the package
contains). Prints a table, writes a plot, and exits with 1 unless: the first step agrees, both reach 97% on images not
trained on, and the trained network computes the same after its layers are converted.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
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

REQUIRED_ACCURACY = 0.97
# Of the first loss, first gradients and final logits, relative to their largest magnitude: float32 rounding through a
# network of fifteen layers, in two orders of summation.
AGREEMENT = 1e-4


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
    """Images as (N, 1, 8, 8) float32 with mean 0 and deviation 1, and their digits as (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(device: torch.device, seed: int) -> tuple[Images, Images]:
    """Four fifths of the digits to train on and one fifth to test with, drawn by seed."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).float().unsqueeze(1)
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
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


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


def first_gradient_difference(ours: nn.Module, theirs: nn.Module) -> float:
    pairs = zip(ours.parameters(), theirs.parameters())
    return max(relative_difference(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None)


HEADER = "epoch | loss nn  | loss bnk | acc nn | acc bnk | max loss diff | max param diff | time nn/bnk"


def row(epoch: int, theirs: Contestant, ours: Contestant, steps: int) -> str:
    difference = max(abs(a - b) for a, b in zip(theirs.step_losses[-steps:], ours.step_losses[-steps:]))
    return (
        f"{epoch:5d} | {theirs.losses[-1]:8.5f} | {ours.losses[-1]:8.5f} | {theirs.accuracies[-1]:6.2%} | "
        f"{ours.accuracies[-1]:7.2%} | {difference:13.1e} | {parameter_difference(ours.model, theirs.model):14.1e} | "
        f"{theirs.seconds / ours.seconds:11.2f}"
    )


def plot(path: Path, theirs: Contestant, ours: Contestant, title: str) -> None:
    """Training loss and test accuracy by epoch, and below them how far the two networks' losses are apart by step."""
    epochs = range(1, len(theirs.losses) + 1)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axes, values, label in (
        (left, [(c.name, c.losses) for c in (theirs, ours)], "training loss (mean of the epoch)"),
        (middle, [(c.name, [100 * a for a in c.accuracies]) for c in (theirs, ours)], "test accuracy (%)"),
    ):
        (name, curve), (our_name, our_curve) = values
        axes.plot(epochs, curve, color="#f0a030", linewidth=6, alpha=0.6, label=name)
        axes.plot(epochs, our_curve, color="#204080", linewidth=1.5, marker="o", markersize=4, label=our_name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_yscale("log")
    apart = [abs(a - b) for a, b in zip(theirs.step_losses, ours.step_losses)]
    right.semilogy(range(1, len(apart) + 1), [max(a, 1e-9) for a in apart], color="#204080", linewidth=1)
    right.set(xlabel="training step", ylabel="|loss of one - loss of the other|")
    right.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def train(
    theirs: Contestant, ours: Contestant, data: Images, test: Images, epochs: int, batch: int, seed: int
) -> float:
    """Trains both in lockstep and prints a row an epoch; returns how far the first step's results were apart."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(data) // batch
    first = 0.0
    print(HEADER)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(data), generator=generator)
        bar = tqdm(range(steps), desc=f"epoch {epoch}/{epochs}", leave=False, disable=None)
        for step in bar:
            chosen = order[step * batch : (step + 1) * batch].to(data.labels.device)
            images, labels = shifted(data.images[chosen], generator), data.labels[chosen]
            # In turns first and second, so that neither has the warmer caches.
            for one in (theirs, ours) if step % 2 else (ours, theirs):
                one.step(images, labels)
            if len(ours.step_losses) == 1:
                first = abs(ours.step_losses[0] - theirs.step_losses[0]) / abs(theirs.step_losses[0])
                first = max(first, first_gradient_difference(ours.model, theirs.model))
                # The first step also tunes and allocates: not part of the comparison of time.
                ours.seconds = theirs.seconds = 0.0
            bar.set_postfix(loss=f"{ours.step_losses[-1]:.4f}")
        for one in (theirs, ours):
            one.losses.append(float(np.mean(one.step_losses[-steps:])))
            one.accuracies.append(float((one.logits(test.images).argmax(1) == test.labels).float().mean()))
        tqdm.write(row(epoch, theirs, ours, steps))
    return first


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, default=Path("out/demo/digits.png"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    started = time.perf_counter()
    print("bnkernels:", ", ".join(f"{name} {value}" for name, value in bnk.build_info().items()))
    data, test = load(args.device, args.seed)
    torch.manual_seed(args.seed)
    model = network().to(args.device)
    steps = args.epochs * (len(data) // args.batch_size)
    theirs = contestant("nn.BatchNorm2d", model, steps)
    ours = contestant("bnkernels", bnk.convert(copy.deepcopy(model)), steps)
    kinds = [type(module) for module in ours.model.modules() if isinstance(module, nn.BatchNorm2d)]
    print(f"{len(data)} images to train on, {len(test)} to test with; {len(kinds)} batch norm layers; {args.device}\n")

    first = train(theirs, ours, data, test, args.epochs, args.batch_size, args.seed)

    before = theirs.logits(test.images)
    bnk.convert(theirs.model)
    converted = relative_difference(theirs.logits(test.images), before)
    worst = min(theirs.accuracies[-1], ours.accuracies[-1])
    plot(args.plot, theirs, ours, f"Residual network on handwritten digits, the same seed twice ({args.device.type})")

    checks = [
        (all(kind is bnk.BatchNorm2d for kind in kinds), "every layer converted", f"{len(kinds)}"),
        (first <= AGREEMENT, "first loss and gradients agree", f"{first:.1e}"),
        (converted <= AGREEMENT, "the trained network, converted, computes the same", f"{converted:.1e}"),
        (worst > REQUIRED_ACCURACY, f"test accuracy of both above {REQUIRED_ACCURACY:.0%}", f"{worst:.2%}"),
    ]
    print()
    for passed, what, value in checks:
        print(f"{'ok  ' if passed else 'FAIL'} {what}: {value}")
    print(f"\nA training step took {theirs.seconds / ours.seconds:.2f} times as long with nn.BatchNorm2d.")
    print(f"Plot: {args.plot} ({time.perf_counter() - started:.0f} s in all)")
    return 0 if all(passed for passed, _, _ in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
