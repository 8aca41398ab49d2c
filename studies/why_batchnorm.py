"""Why batch normalisation helps: saturation, learning rates, initial weights.

    python -m studies.why_batchnorm           # or: make studies

Ioffe & Szegedy, "Batch Normalization" (2015, arXiv 1502.03167), with deep networks on real images:

- Saturating nonlinearities (section 3.3; section 4.2.2: Inception with sigmoids reaches 69.8% on ImageNet with
  BatchNorm, and stays at chance without). Here: eight layers of 64 sigmoids, initial weights N(0, 1/inputs). Measured
  are the test accuracy, and what gradient reaches each layer before training.
- Higher learning rates, and less care for the initial weights (abstract; section 3.3; section 4.2.2: with BatchNorm
  Inception trains at 30 times the learning rate, without it 5 times made its parameters infinite). Here: eight layers
  of 64 ReLUs, with every pair of a learning rate and a factor on He's initial weights. The factor
  scales only the hidden layers, which BatchNorm follows: BN((aW)u) = BN(Wu) of section 3.3 applies to these.

Networks with and without BatchNorm start from the same weights, see the same batches in the same order, and use the
same set of learning rates. They are far smaller than the paper's, and the images are scikit-learn's digits, so
that the study takes a minute. feature_scale.py has the shallow case, paper_algorithms.py the exact results.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, product

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnkernels as bnk
from examples.digits import Images, load
from studies.feature_scale import COLOURS, SIDES, decades
from studies.study import Claim, Report, parse, parser, progress_bar


def network(normalised: bool, activation: type[nn.Module], scale: float, seed: int, depth: int = 8) -> nn.Sequential:
    """depth layers of 64 on the 64 pixels. Hidden weights are N(0, scale^2 gain^2 / 64), with He's gain of sqrt(2) for
    ReLU and 1 for sigmoid; the last layer's are N(0, 1/64), whatever the scale."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        gain = math.sqrt(2) if activation is nn.ReLU else 1.0
        layers.append(dense(64, scale * gain, generator, bias=not normalised))  # BatchNorm has its own bias
        layers += [bnk.BatchNorm1d(64), activation()] if normalised else [activation()]
    return nn.Sequential(*layers, dense(10, 1.0, generator, bias=True))


def dense(outputs: int, gain: float, generator: torch.Generator, bias: bool) -> nn.Linear:
    layer = nn.Linear(64, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * gain / math.sqrt(64))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def batches(data: Images, generator: torch.Generator, size: int = 128) -> Iterator[Images]:
    """One epoch: the images in a new order, without the last incomplete batch."""
    for chosen in torch.randperm(len(data), generator=generator).split(size):
        if len(chosen) == size:
            yield Images(data.images[chosen.to(data.images.device)], data.labels[chosen.to(data.labels.device)])


def train(model: nn.Module, data: Images, test: Images, lr: float, epochs: int, seed: int) -> list[float]:
    """SGD with momentum; the test accuracy after each epoch. Stops at a loss that is not finite, with accuracy 0."""
    model.to(data.images)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    for _ in range(epochs):
        for batch in batches(data, generator):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch.images), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if not loss.isfinite():
            return [*accuracies, 0.0]
        model.eval()
        with torch.no_grad():
            accuracies.append(float((model(test.images).argmax(1) == test.labels).double().mean()))
        model.train()
    return accuracies


@dataclass
class Sweep:
    """Networks with one activation trained from every scale with every learning rate, and their accuracies by epoch."""

    activation: type[nn.Module]
    scales: Sequence[float]
    rates: Sequence[float]
    epochs: int
    required: float = 0.8  # the accuracy at which a network counts as trained
    curves: dict[tuple[bool, float, float], list[float]] = field(default_factory=dict)

    def run(self, sides: Sequence[bool], data: Images, test: Images, seed: int, what: str) -> Sweep:
        settings = list(product(sides, self.scales, self.rates))
        for normalised, scale, lr in progress_bar(settings, f"{what}, seed {seed}"):
            model = network(normalised, self.activation, scale, seed)
            self.curves[normalised, scale, lr] = train(model, data, test, lr, self.epochs, seed)
        return self

    def accuracy(self, normalised: bool) -> Tensor:
        """(scales, rates)"""
        return torch.tensor([[self.curves[normalised, s, lr][-1] for lr in self.rates] for s in self.scales])

    def trained(self, normalised: bool) -> Tensor:
        return self.accuracy(normalised) >= self.required

    def best_curve(self, normalised: bool) -> tuple[float, list[float]]:
        """From the usual initial weights: the learning rate with the best final accuracy; its accuracies by epoch."""
        lr = max(self.rates, key=lambda lr: self.curves[normalised, 1.0, lr][-1])
        return lr, self.curves[normalised, 1.0, lr]

    def highest_rate(self, normalised: bool) -> float:
        """The highest learning rate that trains from the usual initial weights; NaN if none does."""
        trained = self.trained(normalised)[self.scales.index(1.0)].tolist()
        return max((lr for lr, yes in zip(self.rates, trained) if yes), default=math.nan)

    def scale_span(self, normalised: bool) -> float:
        """Decades of initial scales that train, each with the best learning rate for it."""
        return span(self.scales, self.trained(normalised).any(1).tolist())

    def rate_span(self, normalised: bool) -> float:
        """Decades of learning rates that train from the usual initial weights."""
        return span(self.rates, self.trained(normalised)[self.scales.index(1.0)].tolist())


def span(values: Sequence[float], trained: Sequence[bool]) -> float:
    """How many decades the longest unbroken run of values that train covers; 0 for a single one, and for none."""
    runs = [[value for value, _ in run] for yes, run in groupby(zip(values, trained), key=lambda pair: pair[1]) if yes]
    return max((math.log10(run[-1] / run[0]) for run in runs), default=0.0)


def gradient_norms(normalised: bool, data: Images, seed: int) -> list[float]:
    """Norms of the gradients to the hidden layers' weights over the last one's, in the untrained sigmoid network."""
    model = network(normalised, nn.Sigmoid, 1.0, seed).to(data.images)
    F.cross_entropy(model(data.images), data.labels).backward()  # type: ignore[no-untyped-call]
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    norms = [float(layer.weight.grad.double().norm()) for layer in linear[:-1] if layer.weight.grad is not None]
    return [norm / norms[-1] for norm in norms]


@dataclass(frozen=True)
class Plan:
    """The extent of the sweeps. The learning rates are the same with and without BatchNorm."""

    sigmoid_scales: Sequence[float] = tuple(decades(0, 1, 2))
    sigmoid_rates: Sequence[float] = tuple(decades(-3, 0, 2))
    sigmoid_epochs: int = 10
    patient_epochs: int = 40  # without BatchNorm, from the usual initial weights
    relu_scales: Sequence[float] = tuple(decades(-2, 2, 2))
    relu_rates: Sequence[float] = tuple(decades(-4, 0.5, 2))
    relu_epochs: int = 5


QUICK = Plan((1.0,), (1e-2, 1e-1), 1, 2, (0.1, 1.0), (1e-2, 1e-1), 1)


@dataclass
class Measured:
    """The measurements of one seed; dicts are keyed by whether the network has BatchNorm."""

    sigmoids: Sweep
    patient: Sweep
    gradients: dict[bool, list[float]]
    relus: Sweep

    def over(self, figure: Callable[[bool], float]) -> float:
        """The value with BatchNorm over the value without."""
        return figure(True) / figure(False)


def measure(seed: int, device: torch.device, plan: Plan) -> Measured:
    data, test = load(device, torch.float32, seed)
    sigmoids = Sweep(nn.Sigmoid, plan.sigmoid_scales, plan.sigmoid_rates, plan.sigmoid_epochs)
    patient = Sweep(nn.Sigmoid, [1.0], plan.sigmoid_rates, plan.patient_epochs)
    relus = Sweep(nn.ReLU, plan.relu_scales, plan.relu_rates, plan.relu_epochs)
    return Measured(
        sigmoids.run(list(SIDES), data, test, seed, "sigmoids"),
        patient.run([False], data, test, seed, "sigmoids, longer"),
        {normalised: gradient_norms(normalised, data, seed) for normalised in SIDES},
        relus.run(list(SIDES), data, test, seed, "ReLUs"),
    )


def claims(runs: Sequence[Measured]) -> list[Claim]:
    def of_each(figure: Callable[[Measured], float]) -> list[float]:
        return [float(figure(run)) for run in runs]

    return [
        Claim(
            "sections 3.3, 4.2.2",
            "With BatchNorm a deep sigmoid network trains.",
            "test accuracy, best learning rate",
            of_each(lambda run: run.sigmoids.best_curve(True)[1][-1]),
            at_least=0.9,
        ),
        Claim(
            "section 4.2.2",
            "Without, it stays at chance: with any learning rate, four times as long.",
            "test accuracy, best learning rate",
            of_each(lambda run: run.patient.best_curve(False)[1][-1]),
            at_most=0.2,
        ),
        Claim(
            "section 4.2.2, taken further",
            "Without, larger initial weights do not help either.",
            "test accuracy, best learning rate and scale",
            of_each(lambda run: run.sigmoids.accuracy(False).max().item()),
            at_most=0.2,
            expected=False,
        ),
        Claim(
            "section 3.3",
            "The gradient that sigmoids let through vanishes with depth; BatchNorm keeps it.",
            "first layer's gradient over the last hidden one's: with over without",
            of_each(lambda run: run.over(lambda normalised: run.gradients[normalised][0])),
            at_least=1000,
        ),
        Claim(
            "sections 3.3, 4.2.2",
            "BatchNorm enables higher learning rates.",
            "highest that trains, with over without",
            of_each(lambda run: run.over(run.relus.highest_rate)),
            at_least=3,
        ),
        Claim(
            "abstract; section 3.3",
            "BatchNorm asks for less care with the initial weights.",
            "decades of initial scales that train, with less without",
            of_each(lambda run: run.relus.scale_span(True) - run.relus.scale_span(False)),
            at_least=1.5,
        ),
    ]


def show(report: Report, runs: Sequence[Measured]) -> None:
    def sigmoid_row(normalised: bool) -> list[str]:
        accuracy = torch.stack([run.sigmoids.accuracy(normalised) for run in runs]).amax(-1).mean(0)
        return [SIDES[normalised], *(f"{100 * part:.1f}%" for part in accuracy.tolist())]

    header = ["initial scale", *(f"{scale:.2g}" for scale in runs[0].sigmoids.scales)]
    title = f"Sigmoids: test accuracy after {runs[0].sigmoids.epochs} epochs, best learning rate, mean of the seeds:"
    report.show(title, header, [sigmoid_row(normalised) for normalised in SIDES])

    def relu_row(seed: int, normalised: bool) -> list[str]:
        one = runs[seed].relus
        spans = [f"{value:g}" for value in (one.rate_span(normalised), one.scale_span(normalised))]
        trained = one.trained(normalised)
        return [f"{seed}", SIDES[normalised], *spans, f"{int(trained.sum())} of {trained.numel()}"]

    title = f"ReLUs: what trains to {100 * runs[0].relus.required:g}% in {runs[0].relus.epochs} epochs, in decades:"
    header = ["seed", "", "learning rates, at scale 1", "initial scales, at the best rate", "pairs of both"]
    report.show(title, header, [relu_row(seed, side) for seed, side in product(range(len(runs)), SIDES)])


def plot(runs: Sequence[Measured]) -> Figure:
    figure, ((gradients, training), sweeps) = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    for normalised, name in SIDES.items():
        colour = COLOURS[normalised]
        for seed, run in enumerate(runs):
            norms = run.gradients[normalised]
            lr, curve = (run.sigmoids if normalised else run.patient).best_curve(normalised)
            labels = [name, f"{name}, learning rate {lr:.2g}"] if seed == 0 else [None, None]
            gradients.semilogy(range(1, len(norms) + 1), norms, "o-", color=colour, label=labels[0])
            percent = [100 * part for part in curve]
            training.plot(range(1, len(curve) + 1), percent, ".-", color=colour, label=labels[1])
        draw_sweep(sweeps[int(normalised)], [run.relus for run in runs], normalised)
    gradients.set(xlabel="hidden layer", ylabel="gradient of its weights over the last one's")
    gradients.set_title("Deep sigmoids before training, each seed")
    training.axhline(10, color="grey", linestyle=":", label="chance")
    training.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100))
    training.set_title("Deep sigmoids, best learning rate, each seed")
    for axes in (gradients, training):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_sweep(axes: Axes, sweeps: Sequence[Sweep], normalised: bool) -> None:
    accuracy = 100 * torch.stack([sweep.accuracy(normalised) for sweep in sweeps]).mean(0)
    image = axes.imshow(accuracy.numpy(), vmin=0, vmax=100, cmap="cividis", origin="lower", aspect="auto")
    for i, j in product(range(accuracy.shape[0]), range(accuracy.shape[1])):
        part = float(accuracy[i, j])
        axes.text(j, i, f"{part:.0f}", ha="center", va="center", fontsize=8, color="w" if part < 60 else "k")
    axes.set_xticks(range(len(sweeps[0].rates)), [power(lr) for lr in sweeps[0].rates])
    axes.set_yticks(range(len(sweeps[0].scales)), [power(scale) for scale in sweeps[0].scales])
    axes.set(xlabel="learning rate", ylabel="factor on He's initial weights")
    axes.set_title(f"Deep ReLUs {SIDES[normalised]}: test accuracy (%), 0 = diverged")
    axes.figure.colorbar(image, ax=axes)


def power(value: float) -> str:
    return f"$10^{{{math.log10(value):g}}}$"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(parser(__doc__), argv)
    torch.set_num_threads(1)  # networks this small gain nothing from more threads
    report = Report("why_batchnorm", args)
    runs = [measure(seed, args.device, QUICK if args.quick else Plan()) for seed in range(args.seeds)]
    report.claims += claims(runs)
    show(report, runs)
    return report.finish(plot(runs))


if __name__ == "__main__":
    sys.exit(main())
