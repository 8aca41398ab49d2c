"""Time to accuracy: a small residual network trained as in CIFAR-10 speedruns, with torch's BatchNorm and bnkernels'.

    python -m studies.cifar_style_speedrun

The recipe is that of the speedruns (DAWNBench and David Page's ResNet-9; Keller Jordan's airbench, arXiv 2404.00498):
few wide residual blocks and scaled logits, Nesterov SGD with a large batch, a one-cycle learning rate, label smoothing,
images moved by a pixel, and at the end logits averaged over moved images. A mirrored digit is no digit, so there is no
flipping. The images are scikit-learn's 1,797 digits of 8x8 pixels, one half to train on and the other to test with.

The variants below train in one process and one thread, alternating after every step, from the same weights and on the
same batches, so that other load on the machine affects all of them equally. Only the training steps are timed:

- nn.BatchNorm2d, the same network after `bnk.convert`, and that after `bnk.fuse`, which makes each ReLU part of the
  BatchNorm before it; with the activations in NCHW and in channels_last.
- The converted network in channels_last, and the fused one, with ghost batch normalisation: Hoffer, Hubara & Soudry
  2017, "Train longer, generalize better" (arXiv 1705.08741), Algorithm 1. They train with large batches, take the
  statistics over virtual batches of the size that small-batch training has, and claim that this lessens the accuracy
  lost to the large batch. An untimed run with batches of the virtual size, on as many images, measures that loss.

A time to accuracy is the number of steps times the time of a step. Converting changes only rounding, and with it the
trained network, as any other order of summation does, but not its quality: the numbers of steps should be equal within
noise. Fusing a ReLU changes no bit. Both can change the time of a step. (A block adds after its last ReLU here, so
there is no addition to fuse.)

torch.compile is left out: on a CPU, compiling takes longer than all of these trainings.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples.digits import Images, load, now, shifted
from studies.speedrun_networks import (
    BATCH,
    CONVERSIONS,
    CONVERTED,
    FUSIONS,
    GHOST,
    GHOST_KINDS,
    KINDS,
    NN,
    PAIRS,
    SMALL_BATCH_NORM,
    TORCH_NORM,
    VIRTUAL,
    Kind,
    model_of,
    network,
)
from studies.study import THIRD, Claim, Report, parse, parser, progress_bar

RATE, SMALL_BATCH_RATE = 0.3, 0.1  # proportional to the square root of the batch size, as in Hoffer et al.
STEPS, EVERY = 48, 2
TARGET = 0.97
ACCURACY_LOST = 0.3  # percentage points of accuracy, large batch against small one: the mean of ten seeds
LABEL_SMOOTHING = 0.1


def halves(device: torch.device, seed: int) -> tuple[Images, Images]:
    """All digits, shuffled by seed: a training half and a test half, normalised by the training half."""
    parts = load(device, torch.float32, seed)
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    count = len(labels) // 2
    images = (images - images[:count].mean()) / images[:count].std()
    return Images(images[:count], labels[:count]), Images(images[count:], labels[count:])


def batches(data: Images, size: int, count: int, seed: int) -> Iterator[Images]:
    """Batches from consecutive shuffled passes over the images, each image moved by up to a pixel."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(size * count / len(data))
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(passes)])
    for chosen in order.to(data.labels.device).split(size)[:count]:
        yield Images(shifted(data.images[chosen], generator), data.labels[chosen])


def to_layout(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Images of one channel are contiguous in both layouts; the copy has the strides by which convolutions choose."""
    return images.clone(memory_format=layout)


@dataclass
class Runner:
    """One network in training, with its losses, times and accuracies."""

    model: nn.Module
    layout: torch.memory_format
    rate: float
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step
    tested_at: list[int] = field(default_factory=list)  # the steps after which the network was tested; the results:
    accuracies: list[float] = field(default_factory=list)
    final: float = math.nan  # test accuracy after training, with logits averaged

    def __post_init__(self) -> None:
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, self.rate, self.steps, pct_start=0.25, cycle_momentum=False
        )

    def loss(self, batch: Images, model: nn.Module) -> Tensor:
        return F.cross_entropy(
            model(to_layout(batch.images, self.layout)), batch.labels, label_smoothing=LABEL_SMOOTHING
        )

    def warm_up(self, batch: Images) -> None:
        """Runs a step on a copy, as the first one also chooses and compiles algorithms; the network is unchanged."""
        self.loss(batch, copy.deepcopy(self.model)).backward()  # type: ignore[no-untyped-call]

    def step(self, batch: Images) -> None:
        started = now(batch.labels.device)
        self.optimizer.zero_grad()
        loss = self.loss(batch, self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(now(batch.labels.device) - started)
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, test: Images, *, average: bool = False) -> float:
        """average: average the logits over the image and the image moved by a pixel in each of the four directions."""
        self.model.eval()
        views = shifted_views(test.images) if average else [test.images]
        logits = torch.stack([self.model(to_layout(view, self.layout)) for view in views]).mean(0)
        self.model.train()
        return float((logits.argmax(1) == test.labels).double().mean())

    def record_accuracy(self, test: Images) -> None:
        self.tested_at.append(len(self.losses))
        self.accuracies.append(self.accuracy(test))

    @property
    def steps_needed(self) -> float:
        """The first tested step at the target accuracy; infinite if none."""
        return next((step for step, part in zip(self.tested_at, self.accuracies) if part >= TARGET), math.inf)

    @property
    def seconds_needed(self) -> float:
        return math.inf if math.isinf(self.steps_needed) else sum(self.seconds[: int(self.steps_needed)])


def shifted_views(images: Tensor) -> list[Tensor]:
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    return [padded[:, :, top : top + height, left : left + width] for top, left in corners]


@dataclass
class Race:
    """The networks of one seed."""

    runners: dict[Kind, Runner]
    small_batch: Runner

    def __getitem__(self, kind: Kind) -> Runner:
        return self.runners[kind]

    @property
    def without_ghosts(self) -> float:
        """The final accuracy with the large batch: the mean of the networks that differ only by rounding."""
        return fmean(runner.final for kind, runner in self.runners.items() if kind not in GHOST_KINDS)

    @property
    def with_ghosts(self) -> float:
        return fmean(self[kind].final for kind in GHOST_KINDS)

    def step_ratios(self, one: Kind, other: Kind) -> list[float]:
        return [a / b for a, b in zip(self[one].seconds, self[other].seconds)]

    def step_ratio(self, one: Kind, other: Kind) -> float:
        return median(self[one].seconds) / median(self[other].seconds)

    def largest_difference(self, one: Kind, other: Kind) -> float:
        return max(abs(a - b) for a, b in zip(self[one].losses, self[other].losses))

    def time_ratio(self, one: Kind, other: Kind) -> float:
        """Ratio of the times to the target; NaN if neither reached it."""
        return self[one].seconds_needed / self[other].seconds_needed

    def steps_apart(self, one: Kind, other: Kind) -> float:
        """Ratio of the steps to the target, at least 1; infinite if only one reached it, NaN if neither did."""
        ratio = self[one].steps_needed / self[other].steps_needed
        return max(ratio, 1 / ratio) if ratio else math.inf


def run(seed: int, device: torch.device, steps: int) -> Race:
    data, test = halves(device, seed)
    torch.manual_seed(seed)
    original = network(TORCH_NORM).to(device)
    runners = {kind: Runner(model_of(kind, original).to(device), kind.layout, RATE, steps) for kind in KINDS}
    for step, batch in enumerate(progress_bar(list(batches(data, BATCH, steps, seed)), f"seed {seed}, race")):
        order = list(runners.values())
        for runner in order:
            if step == 0:
                runner.warm_up(batch)
        turn = step % len(order)  # every network goes first equally often
        for runner in order[turn:] + order[:turn]:
            runner.step(batch)
        if (step + 1) % EVERY == 0:
            for runner in order:
                runner.record_accuracy(test)

    count = steps * BATCH // VIRTUAL
    model = network(SMALL_BATCH_NORM).to(device)
    model.load_state_dict(original.state_dict())
    small = Runner(model, torch.channels_last, SMALL_BATCH_RATE, count)
    for batch in progress_bar(list(batches(data, VIRTUAL, count, seed)), f"seed {seed}, small batches"):
        small.step(batch)
    small.record_accuracy(test)
    for runner in (*runners.values(), small):
        runner.final = runner.accuracy(test, average=True)
    return Race(runners, small)


def claims(races: Sequence[Race]) -> Iterator[Claim]:
    def of_each(figure: Callable[[Race], float]) -> list[float]:
        return [figure(race) for race in races]

    def first_losses(race: Race) -> float:
        return max(abs(race[baseline].losses[0] / race[converted].losses[0] - 1) for baseline, converted in CONVERSIONS)

    def lowest(race: Race) -> float:
        return 100 * min(runner.final for runner in race.runners.values())

    statement = "Converted, the network computes the same, in both layouts."
    yield Claim("convert", statement, "relative difference of the first losses", of_each(first_losses), at_most=1e-5)
    statement = f"All reach {TARGET:.0%} of images not trained on, those with ghosts too."
    yield Claim("speedruns", statement, "lowest final accuracy (%)", of_each(lowest), at_least=100 * TARGET)
    for (baseline, converted), what, limit in zip(CONVERSIONS, ("faster", "as fast"), (1.05, 0.9)):
        over = f"{baseline} / {converted.name}"
        steps = of_each(partial(Race.steps_apart, one=baseline, other=converted))
        statement = f"Converted, it needs as many steps to {TARGET:.0%}, within noise."
        yield Claim("convert", statement, f"{over}, as a factor above 1", steps, at_most=1.5)
        ratios = of_each(partial(Race.step_ratio, one=baseline, other=converted))
        statement = f"Converted, a step is {what} in this layout."
        yield Claim("convert", statement, f"{over}, median step times", ratios, at_least=limit)
        times = of_each(partial(Race.time_ratio, one=baseline, other=converted))
        statement = f"Converted, the time to {TARGET:.0%} is no longer than noise in the steps makes it."
        yield Claim("convert", statement, f"{over}, times to it", times, at_least=0.7)
    for apart, fused in FUSIONS:
        over = f"{apart} / {fused.name}"
        differences = of_each(partial(Race.largest_difference, one=apart, other=fused))
        statement = "Fused, the losses of all steps are the same to the bit."
        yield Claim("fuse", statement, f"{over}, largest difference of a loss", differences, at_most=0)
        ratios = of_each(partial(Race.step_ratio, one=apart, other=fused))
        statement = "Fused, a step is no slower."
        yield Claim("fuse", statement, f"{over}, median step times", ratios, at_least=0.9)
    ratios = of_each(partial(Race.step_ratio, one=GHOST, other=CONVERTED))
    statement = f"{BATCH // VIRTUAL} virtual batches cost less than two fifths of a step more."
    yield Claim("ghosts", statement, f"{GHOST} / {CONVERTED.name}, median step times", ratios, at_most=1.4)
    gains = of_each(lambda race: 100 * (race.with_ghosts - race.without_ghosts))
    statement = f"Ghosts alone regain the {ACCURACY_LOST} points that the large batch costs here."
    measure = "final accuracy, in points above the mean of those without"
    yield Claim("Hoffer et al.", statement, measure, gains, at_least=ACCURACY_LOST, expected=False)


def show(report: Report, races: Sequence[Race]) -> None:
    def row(name: str, runners: Sequence[Runner], timed: bool) -> list[str]:
        def each(figure: Callable[[Runner], float], form: str) -> str:
            return ", ".join(format(figure(runner), form) for runner in runners)

        cells = ["", "", ""]
        if timed:
            cells = [
                each(lambda runner: runner.steps_needed, "g"),
                each(lambda runner: runner.seconds_needed, ".2f"),
                each(lambda runner: 1000 * median(runner.seconds), ".1f"),
            ]
        cells += [each(lambda runner: 100 * runner.accuracies[-1], ".2f")]
        cells += [each(lambda runner: 100 * runner.final, ".2f")]
        return [name, *cells, f"{100 * fmean(runner.final for runner in runners):.2f}"]

    rows = [row(str(kind), [race[kind] for race in races], True) for kind in KINDS]
    rows.append(row(f"converted, batches of {VIRTUAL}", [race.small_batch for race in races], False))
    header = ["", f"steps to {TARGET:.0%}", "seconds to it", "ms a step", "accuracy (%)", "with averaging", "its mean"]
    report.show(
        f"By seed. Averaging is of the logits of moved images, after {len(races[0][NN].losses)} steps.", header, rows
    )

    def spread(slow: Kind, fast: Kind) -> list[str]:
        ratios = torch.tensor([ratio for race in races for ratio in race.step_ratios(slow, fast)])
        parts = ratios.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist()
        return [f"{slow} / {fast.name}", *(f"{part:.2f}" for part in parts)]

    report.show(
        "Step times, one over the other in the same turn, all seeds:",
        ["", "5%", "25%", "median", "75%", "95%"],
        [spread(*pair) for pair in PAIRS],
    )


def plot(races: Sequence[Race]) -> Figure:
    figure, (curves, ratios) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained", width_ratios=(1.6, 1))
    for kind in KINDS:
        runners = [race[kind] for race in races]
        times = [median(sum(runner.seconds[:step]) for runner in runners) for step in runners[0].tested_at]
        accuracies = [100 * median(parts) for parts in zip(*(runner.accuracies for runner in runners))]
        label = f"{kind}: {', '.join(f'{runner.seconds_needed:.2f}' for runner in runners)} s"
        curves.plot(times, accuracies, kind.style, marker=".", color=kind.colour, linewidth=1.8, label=label)
    curves.axhline(100 * TARGET, color="grey", linestyle="--", linewidth=1, label=f"target: {TARGET:.0%}")
    curves.set(xlabel="training time (s)", ylabel="test accuracy (%)", ylim=(80, 100))
    curves.set_title("Medians over the seeds; in the legend the times to the target, by seed")
    curves.legend(loc="lower right")
    values = [[ratio for race in races for ratio in race.step_ratios(*pair)] for pair in PAIRS]
    style = {"whis": (5, 95), "showfliers": False, "patch_artist": True, "medianprops": {"color": "black"}}
    for box, pair in zip(ratios.boxplot(values, widths=0.6, **style)["boxes"], PAIRS):
        box.set(facecolor=(THIRD if GHOST in pair else pair[1].colour), alpha=0.5)
    names = ["\nover\n".join((one.name, f"{other},".replace(", ", ",\n")[:-1])) for one, other in PAIRS]
    ratios.set_xticks(range(1, len(PAIRS) + 1), names, fontsize=7.5)
    ratios.axhline(1, color="grey", linestyle="--", linewidth=1)
    ratios.set(
        ylabel="ratio of the times of a step (above 1: the second is faster)",
        title="Steps in the same turn\n(box: quartiles, whiskers: 5%, 95%)",
    )
    for axes in (curves, ratios):
        axes.grid(alpha=0.3)
    figure.suptitle("Time to accuracy on handwritten digits: a speedrun's network and recipe, one thread")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.set_defaults(device=torch.device("cpu"))  # on a GPU, launches dominate the time of a network this small
    args = parse(arguments, argv)
    torch.set_num_threads(1)  # the time of a step then contains no waiting for other threads
    report = Report("cifar_style_speedrun", args)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        races = [run(seed, args.device, EVERY if args.quick else STEPS) for seed in range(args.seeds)]
    report.claims += claims(races)
    show(report, races)
    return report.finish(plot(races))


if __name__ == "__main__":
    sys.exit(main())
