"""Does batch normalisation smooth the loss, and do steadier layer inputs make training fast?

    python -m studies.loss_landscape

Santurkar, Tsipras, Ilyas & Madry 2018, "How Does Batch Normalization Help Optimization?" (arXiv 1805.11604), train a
VGG on CIFAR-10 and claim:

- Section 3.1, Figure 4: in the direction of a step's gradient, with BatchNorm (a) the loss varies less, (b) the
  gradient changes less, in the 2-norm, and (c) the effective beta-smoothness is lower: the largest change of the
  gradient over the distance moved.
- Section 2.1, Figure 2 and appendix: noise after each BatchNorm, from distributions that are new at every step, makes
  the layers' inputs less stable than without BatchNorm: their mean and variance change more from one step to the next.
  The network still trains about as fast as with BatchNorm, and faster than without.

Here it is a VGG of six convolutions on scikit-learn's digits (8x8 pixels, moved by up to a pixel), for 320 steps, which
take a CPU a minute. The optimizer is plain SGD, whose steps go in the direction that is measured. The three networks of
a seed start from the same convolutions and see the same batches. Learning rates:

- The landscape is measured along runs at 0.1 for all, over steps of 1/2 to 4 times that, so to 0.4 times the gradient
  as in Figure 4: landscapes are compared over the same step sizes. It suits the network without BatchNorm.
- Training speed is judged with each network at its own best of the same five rates.

With BatchNorm the loss falls sooner, and a landscape is flat near any minimum. The measures are therefore compared a
second time over only those steps at which the loss is about the same.

The moments are those of a fixed batch, so that only the network changes. The noise is strong enough for both moments to
change more than without BatchNorm, which is the case of the paper's claim.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import bnkernels as bnk
from examples.digits import Images, load, shifted
from studies.study import THIRD, WITH_BN, WITHOUT_BN, Claim, Report, parse, parser, progress_bar

CHANNELS = (16, 16, 32, 32, 64, 64)  # the image size is halved where they double
BATCH = 64
PROBE = 128  # images for the moments of the activations
COMMON_RATE = 0.1
RATES = (0.05, COMMON_RATE, 0.2, 0.4, 0.8)
STRETCH = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # steps along the gradient, in learning rates: the range of Figure 4
REACHED, WINDOW = 0.5, 10  # the race ends when the mean loss of WINDOW batches is below REACHED
SAME_LOSS = (0.3, 1.8)  # ln 10 = 2.3 is chance
LANDSCAPE = (
    ("a", "range", "range of the loss along the gradient"),
    ("b", "change", "change of the gradient along it"),
    ("c", "beta", "effective beta-smoothness"),
)


# Bounds of a channel's noise: of its mean, of its deviation above 1, and the spread of both among its values.
NOISE_MEAN, NOISE_DEVIATION, NOISE_SPREAD = 0.75, 1.0, 0.1


class NoisyBatchNorm2d(bnk.BatchNorm2d):
    """BatchNorm, then y * s + m, with s and m drawn for each value from distributions of its channel.

    These are m ~ U(mu - spread, mu + spread) and s ~ N(sigma, spread), with mu ~ U(-mean, mean) and
    sigma ~ U(1, 1 + deviation) drawn too. `key` seeds all of it: with an unchanged key the noise is unchanged, so that
    one function is measured along its gradient.
    """

    key = 0

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input, residual)
        generator = torch.Generator(y.device).manual_seed(self.key)

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(shape, generator=generator, device=y.device, dtype=y.dtype) - 1

        channel = (1, y.shape[1], 1, 1)
        mu, sigma = NOISE_MEAN * uniform(*channel), 1 + NOISE_DEVIATION * uniform(*channel).abs()
        m = mu + NOISE_SPREAD * uniform(*y.shape)
        s = sigma + NOISE_SPREAD * torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        return y * s + m


def renew_noise(model: nn.Sequential, source: torch.Generator) -> None:
    for layer in model:
        if isinstance(layer, NoisyBatchNorm2d):
            layer.key = int(torch.randint(2**62, (), generator=source))


@dataclass(frozen=True)
class Kind:
    name: str
    colour: str
    normalisation: Callable[[int], nn.Module] | None


PLAIN, BN, NOISY = KINDS = (
    Kind("without BatchNorm", WITHOUT_BN, None),
    Kind("with BatchNorm", WITH_BN, bnk.BatchNorm2d),
    Kind("noisy BatchNorm", THIRD, NoisyBatchNorm2d),
)


def network(kind: Kind, seed: int) -> nn.Sequential:
    """Convolutions initialised as He et al. 2015, from the seed alone: the same with and without normalisation."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *CHANNELS), CHANNELS):
        if inputs > 1 and outputs != inputs:
            layers.append(nn.MaxPool2d(2))
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        layers += [convolution, *([kind.normalisation(outputs)] if kind.normalisation else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 10))


@dataclass(frozen=True)
class Landscape:
    """The loss and its gradient in the direction of a step."""

    loss: float
    losses: tuple[float, float]  # the lowest and the highest along it
    changes: tuple[float, float]  # of the gradient, in the 2-norm: the least and the most
    beta: float

    @property
    def range(self) -> float:
        return self.losses[1] - self.losses[0]

    @property
    def change(self) -> float:
        return self.changes[1]


def along_gradient(
    function: Callable[[Tensor], tuple[float, Tensor]], point: Tensor, rates: Sequence[float]
) -> Landscape:
    """function: returns the loss and its gradient at a point. rates: the distances, in gradients."""
    loss, gradient = function(point)
    losses, gradients = zip(*(function(point - rate * gradient) for rate in rates))
    changes = [float((other - gradient).norm()) for other in gradients]
    length = float(gradient.norm())
    beta = max(change / (rate * length) for change, rate in zip(changes, rates)) if length else math.nan
    return Landscape(loss, (min(losses), max(losses)), (min(changes), max(changes)), beta)


def landscape(model: nn.Module, images: Tensor, labels: Tensor, rates: Sequence[float]) -> Landscape:
    """The landscape of a batch's loss over all parameters. The model is unchanged, running statistics included."""
    parameters = list(model.parameters())

    def function(point: Tensor) -> tuple[float, Tensor]:
        vector_to_parameters(point, parameters)
        loss = F.cross_entropy(model(images), labels)
        return loss.item(), torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    here = parameters_to_vector(parameters).detach()
    with bnk.no_statistics_update(model):
        landscape_here = along_gradient(function, here, rates)
    vector_to_parameters(here, parameters)
    return landscape_here


@torch.no_grad()
def moments(model: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel before each ReLU, concatenated over the layers."""
    means, variances = [], []
    with bnk.no_statistics_update(model):
        for layer in model:
            if isinstance(layer, nn.ReLU):
                means.append(images.mean((0, 2, 3)))
                variances.append(images.var((0, 2, 3)))
            images = layer(images)
    return torch.cat(means), torch.cat(variances)


@dataclass
class Run:
    """One network trained at one learning rate."""

    rate: float
    losses: list[float] = field(default_factory=list)
    recorded_at: list[int] = field(default_factory=list)  # the steps of the landscapes and shifts
    landscapes: list[Landscape] = field(default_factory=list)
    shifts: list[tuple[float, float]] = field(default_factory=list)  # of means and variances, by a step

    @property
    def smooth(self) -> list[float]:
        """The mean of the last WINDOW losses, from step WINDOW on."""
        return [fmean(self.losses[end - WINDOW : end]) for end in range(WINDOW, len(self.losses) + 1)]

    @property
    def steps_needed(self) -> float:
        """Steps until the loss is below REACHED; infinite if it never is."""
        return next((step for step, loss in enumerate(self.smooth, WINDOW) if loss < REACHED), math.inf)

    def typical(self, what: str, between: tuple[float, float] = (0, math.inf)) -> float:
        """The median over the steps at which the loss is between the two; NaN if there are none."""
        values = [getattr(one, what) for one in self.landscapes if between[0] <= one.loss < between[1]]
        return median(values) if values else math.nan

    def shift(self, moment: int) -> float:
        return median(shift[moment] for shift in self.shifts)


def train(kind: Kind, rate: float, seed: int, data: Images, steps: int, every: int | None) -> Run:
    """every: record every so many steps, and run all steps. None: stop when the loss is below REACHED."""
    run, device = Run(rate), data.images.device
    model = network(kind, seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batches, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    renew_noise(model, noise)
    for step in progress_bar(range(steps), f"seed {seed}, {kind.name}, learning rate {rate:g}"):
        chosen = torch.randint(len(data), (BATCH,), generator=batches).to(device)
        images, labels = shifted(data.images[chosen], batches), data.labels[chosen]
        record = every is not None and step % every == 0
        if record:
            run.recorded_at.append(step)
            run.landscapes.append(landscape(model, images, labels, [rate * stretch for stretch in STRETCH]))
            before = moments(model, data.images[:PROBE])
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        renew_noise(model, noise)
        run.losses.append(loss.item())
        if record:
            after = moments(model, data.images[:PROBE])
            mean, variance = (float((new - old).abs().mean()) for new, old in zip(after, before))
            run.shifts.append((mean, variance))
        if every is None and run.steps_needed < math.inf:
            break
    return run


@dataclass
class Seed:
    """The runs of one seed."""

    recorded: dict[Kind, Run]  # at COMMON_RATE
    race: dict[Kind, list[Run]]  # at each of RATES

    def fastest(self, kind: Kind) -> float:
        """The steps needed at the kind's best rate."""
        return min(run.steps_needed for run in self.race[kind])


def train_all(seed: int, device: torch.device, steps: int, every: int) -> Seed:
    data, _ = load(device, torch.float32, seed)
    recorded = {kind: train(kind, COMMON_RATE, seed, data, steps, every) for kind in KINDS}

    def at(kind: Kind, rate: float) -> Run:
        return recorded[kind] if rate == COMMON_RATE else train(kind, rate, seed, data, steps, None)

    return Seed(recorded, {kind: [at(kind, rate) for rate in RATES] for kind in KINDS})


@dataclass(frozen=True)
class Measure:
    """A figure of a run, and the claim that it is larger for one kind of network than for another."""

    source: str
    name: str
    of: Callable[[Run], float]
    statement: str
    more: Kind
    less: Kind
    at_least: float  # times

    def claim(self, seeds: Sequence[Seed]) -> Claim:
        measure = f"median {self.name}, {self.more.name} / {self.less.name}"
        values = [self.of(seed.recorded[self.more]) / self.of(seed.recorded[self.less]) for seed in seeds]
        return Claim(self.source, self.statement, measure, values, at_least=self.at_least)


def measures() -> Iterator[Measure]:
    at_same_loss = " at a loss of {} to {}".format(*SAME_LOSS)
    for between, where, limits in (((0, math.inf), "", (10, 5, 1.4)), (SAME_LOSS, at_same_loss, (5, 5, 1.8))):
        for (panel, what, name), limit in zip(LANDSCAPE, limits):
            of = partial(Run.typical, what=what, between=between)
            statement = f"BatchNorm lowers the {name}{', also at the same loss' if where else ''}."
            yield Measure(f"section 3.1, Figure 4{panel}", f"{name}{where}", of, statement, PLAIN, BN, limit)
    for moment, name in enumerate(("mean", "variance")):
        statement = f"Noisy BatchNorm makes layers' inputs less stable than they are without BatchNorm: their {name}."
        name, of = f"change of the {name} from step to step", partial(Run.shift, moment=moment)
        yield Measure("section 2.1, Figure 2", name, of, statement, NOISY, PLAIN, 1.3)


def judge(report: Report, seeds: Sequence[Seed]) -> None:
    report.claims += [measure.claim(seeds) for measure in measures()]
    for statement, other, limit in (
        ("With noisy BatchNorm, training is nearly as fast as with BatchNorm.", BN, 2.2),
        ("With noisy BatchNorm, training is faster than without BatchNorm.", PLAIN, 0.5),
    ):
        what = f"steps to a loss of {REACHED}, each at its best rate, {NOISY.name} / {other.name}"
        values = [seed.fastest(NOISY) / seed.fastest(other) for seed in seeds]
        report.claims.append(Claim("section 2.1, Figure 2", statement, what, values, at_most=limit))
    report.show(
        f"At a learning rate of {COMMON_RATE}, medians over the steps, of these over the seeds:",
        ["", *(kind.name for kind in KINDS)],
        [
            [one.name, *(f"{median(one.of(seed.recorded[kind]) for seed in seeds):.3g}" for kind in KINDS)]
            for one in measures()
        ],
    )
    report.show(
        f"Steps until the mean loss of {WINDOW} batches is below {REACHED}, by learning rate, medians over the seeds:",
        ["", *(f"{rate:g}" for rate in RATES)],
        [[kind.name, *(f"{needed:g}" for needed in race(seeds, kind))] for kind in KINDS],
    )


def race(seeds: Sequence[Seed], kind: Kind) -> list[float]:
    """The steps needed at each rate, medians over the seeds."""
    return [median(seed.race[kind][at].steps_needed for seed in seeds) for at in range(len(RATES))]


def draw(seeds: Sequence[Seed], steps: int) -> Figure:
    """The upper row is Figure 2, the lower one Figure 4."""
    figure, ((curves, needed, shift), (range_, change, beta)) = plt.subplots(
        2, 3, figsize=(16, 9), layout="constrained"
    )
    for kind in KINDS:
        for seed in seeds:
            smooth = seed.recorded[kind].smooth
            curves.semilogy(range(WINDOW, WINDOW + len(smooth)), smooth, color=kind.colour, linewidth=1.2)
        curves.plot([], [], color=kind.colour, label=kind.name)
        counts = race(seeds, kind)
        needed.plot(RATES, counts, color=kind.colour, marker="o", label=kind.name)
        for rate, count in zip(RATES, counts):
            if math.isinf(count):
                needed.plot(rate, steps, color=kind.colour, marker="x", markersize=10)
        run = seeds[0].recorded[kind]
        for moment, style in enumerate(("-", ":")):
            moved = [one[moment] for one in run.shifts]
            label = f"{('mean', 'variance')[moment]}, {kind.name}"
            shift.semilogy(run.recorded_at, moved, color=kind.colour, linestyle=style, label=label)
        band(range_, run, kind, [one.losses for one in run.landscapes])
        band(change, run, kind, [one.changes for one in run.landscapes])
        beta.plot(run.recorded_at, [one.beta for one in run.landscapes], color=kind.colour, label=kind.name)
    curves.axhline(REACHED, color="grey", linestyle="--", linewidth=1)
    curves.set(ylabel=f"loss (mean of {WINDOW} batches)", title=f"Training at {COMMON_RATE}, each seed")
    needed.set(xscale="log", xticks=RATES, xticklabels=RATES, ylim=(0, 1.05 * steps))
    needed.minorticks_off()
    needed.set(ylabel=f"steps to a loss of {REACHED}", title=f"Medians over the seeds (x: not in {steps} steps)")
    shift.set(ylabel="change from step to step, mean over channels", title="Stability of the layers' inputs")
    range_.set(ylabel="loss", title="(a) Loss along the gradient")
    change.set(ylabel="2-norm of the change", title="(b) Change of the gradient along it")
    beta.set(ylabel="largest change / distance", title="(c) Effective beta-smoothness")
    beta.axhline(2 / COMMON_RATE, color="grey", linestyle="--", linewidth=1, label="2 / learning rate")
    for axes in (curves, needed, shift, range_, change, beta):
        axes.set_xlabel("learning rate" if axes is needed else "training step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(
        "A VGG on handwritten digits, with and without batch normalisation: training, stability, and loss landscape\n"
        f"(upper right and below: one seed, learning rate {COMMON_RATE}; "
        f"bands over steps of {STRETCH[0]:g} to {STRETCH[-1]:g} times the learning rate along the gradient)"
    )
    return figure


def band(axes: Axes, run: Run, kind: Kind, between: Sequence[tuple[float, float]]) -> None:
    lowest, highest = zip(*between)
    axes.fill_between(run.recorded_at, lowest, highest, color=kind.colour, alpha=0.35, linewidth=0)
    axes.semilogy(run.recorded_at, highest, color=kind.colour, label=kind.name)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(parser(__doc__), argv)
    report = Report("loss_landscape", args)
    steps, every = (WINDOW, WINDOW) if args.quick else (320, 5)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        seeds = [train_all(seed, args.device, steps, every) for seed in range(args.seeds)]
    judge(report, seeds)
    return report.finish(draw(seeds, steps))


if __name__ == "__main__":
    sys.exit(main())
