"""Time to accuracy: a small residual network trained as in CIFAR-10 speedruns, with torch's BatchNorm and with ours.

    python examples/cifar_style_speedrun.py

The recipe is that of the speedruns (DAWNBench and David Page's ResNet-9; Keller Jordan's airbench, arXiv 2404.00498):
few wide residual blocks and scaled logits, Nesterov SGD with a large batch, a one-cycle learning rate, label smoothing,
images moved by a pixel, and at the end logits averaged over moved images. A mirrored digit is no digit, so there is no
flipping. The images are scikit-learn's 1,797 digits of 8x8 pixels, one half to train on and the other to test with.

These train in one process and one thread, in turns step by step, from the same weights on the same batches, so that
whatever else the machine does meets all of them alike. Only the training steps are timed:

- nn.BatchNorm2d, the same network after `bnk.convert`, and that after `bnk.fuse`, which makes each ReLU part of the
  BatchNorm before it; with the activations in NCHW and in channels_last.
- The converted network in channels_last, and the fused one, with ghost batch normalisation: Hoffer, Hubara & Soudry
  2017, "Train longer, generalize better" (arXiv 1705.08741), Algorithm 1. They train with large batches, take the
  statistics over virtual batches of the size that small-batch training has, and claim that this lessens the accuracy
  lost to the large batch. What is lost shows beside an untimed run with batches of the virtual size, on as many images.

A time to accuracy is steps times the time of a step. Converting changes rounding alone, and so the network that comes
out, as any other order of summation would, but not how good it is: the steps should be equal within noise. Fusing a
ReLU changes no bit. What either may change is the time of a step. (The sum of a block comes behind its last ReLU here,
so that there is none to fuse.)

Not here: torch.compile. On a CPU, compiling takes longer than all of these trainings.
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
from digits import Images, load, now, shifted
from matplotlib.figure import Figure
from speedrun_networks import (
    BATCH,
    CONVERSIONS,
    CONVERTED,
    FUSIONS,
    GHOST,
    GHOSTLY,
    KINDS,
    NN,
    OURS_IN_SMALL_BATCHES,
    PAIRS,
    TORCHS,
    VIRTUAL,
    Kind,
    model_of,
    network,
)
from study import THIRD, Claim, Report, bar, parse, parser
from torch import Tensor, nn

RATE, SMALL_BATCH_RATE = 0.3, 0.1  # the square root of the batch's size apart, as in Hoffer et al.
STEPS, EVERY = 48, 2
TARGET = 0.97
LOST = 0.3  # points of accuracy, with the large batch instead of the small one: the mean of ten seeds
LABEL_SMOOTHING = 0.1


def halves(device: torch.device, seed: int) -> tuple[Images, Images]:
    """All digits in an order drawn by seed, half to train on and half to test with; mean and deviation of the first."""
    parts = load(device, torch.float32, seed)
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    count = len(labels) // 2
    images = (images - images[:count].mean()) / images[:count].std()
    return Images(images[:count], labels[:count]), Images(images[count:], labels[count:])


def batches(data: Images, size: int, count: int, seed: int) -> Iterator[Images]:
    """From one shuffled pass over the images after the other, each image moved by up to a pixel."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(size * count / len(data))
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(passes)])
    for chosen in order.to(data.labels.device).split(size)[:count]:
        yield Images(shifted(data.images[chosen], generator), data.labels[chosen])


def laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """With one channel, any images are contiguous in both layouts, but convolutions go by the strides of this one."""
    return images.clone(memory_format=layout)


@dataclass
class Runner:
    """One network in training, and what was seen of it."""

    model: nn.Module
    layout: torch.memory_format
    rate: float
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step
    looked: list[int] = field(default_factory=list)  # after how many steps the network was tested, with the result:
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
            model(laid_out(batch.images, self.layout)), batch.labels, label_smoothing=LABEL_SMOOTHING
        )

    def warm(self, batch: Images) -> None:
        """What only a first step does, such as to choose and compile algorithms; leaves the network as it is."""
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
        """average: the logits over the image, and the image moved by a pixel in each of the four directions."""
        self.model.eval()
        views = moved(test.images) if average else [test.images]
        logits = torch.stack([self.model(laid_out(view, self.layout)) for view in views]).mean(0)
        self.model.train()
        return float((logits.argmax(1) == test.labels).double().mean())

    def look(self, test: Images) -> None:
        self.looked.append(len(self.losses))
        self.accuracies.append(self.accuracy(test))

    @property
    def steps_needed(self) -> float:
        """Until a test found the target reached; infinite if none did."""
        return next((step for step, part in zip(self.looked, self.accuracies) if part >= TARGET), math.inf)

    @property
    def seconds_needed(self) -> float:
        return math.inf if math.isinf(self.steps_needed) else sum(self.seconds[: int(self.steps_needed)])


def moved(images: Tensor) -> list[Tensor]:
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    return [padded[:, :, top : top + height, left : left + width] for top, left in corners]


@dataclass
class Race:
    """All of one seed."""

    runners: dict[Kind, Runner]
    small_batch: Runner

    def __getitem__(self, kind: Kind) -> Runner:
        return self.runners[kind]

    @property
    def without_ghosts(self) -> float:
        """The final accuracy with the large batch: the mean of the networks that only rounding tells apart."""
        return fmean(runner.final for kind, runner in self.runners.items() if kind not in GHOSTLY)

    @property
    def with_ghosts(self) -> float:
        return fmean(self[kind].final for kind in GHOSTLY)

    def step_ratios(self, one: Kind, other: Kind) -> list[float]:
        return [a / b for a, b in zip(self[one].seconds, self[other].seconds)]

    def step_ratio(self, one: Kind, other: Kind) -> float:
        return median(self[one].seconds) / median(self[other].seconds)

    def largest_difference(self, one: Kind, other: Kind) -> float:
        return max(abs(a - b) for a, b in zip(self[one].losses, self[other].losses))

    def time_ratio(self, one: Kind, other: Kind) -> float:
        """Of the times to the target; NaN where neither came there."""
        return self[one].seconds_needed / self[other].seconds_needed

    def steps_apart(self, one: Kind, other: Kind) -> float:
        """As a factor of 1 or more; infinite where only one came to the target, NaN where neither did."""
        ratio = self[one].steps_needed / self[other].steps_needed
        return max(ratio, 1 / ratio) if ratio else math.inf


def run(seed: int, device: torch.device, steps: int) -> Race:
    data, test = halves(device, seed)
    torch.manual_seed(seed)
    original = network(TORCHS).to(device)
    runners = {kind: Runner(model_of(kind, original).to(device), kind.layout, RATE, steps) for kind in KINDS}
    for step, batch in enumerate(bar(list(batches(data, BATCH, steps, seed)), f"seed {seed}, race")):
        order = list(runners.values())
        for runner in order:
            if step == 0:
                runner.warm(batch)
        turn = step % len(order)  # each is first as often as any other
        for runner in order[turn:] + order[:turn]:
            runner.step(batch)
        if (step + 1) % EVERY == 0:
            for runner in order:
                runner.look(test)

    count = steps * BATCH // VIRTUAL
    model = network(OURS_IN_SMALL_BATCHES).to(device)
    model.load_state_dict(original.state_dict())
    small = Runner(model, torch.channels_last, SMALL_BATCH_RATE, count)
    for batch in bar(list(batches(data, VIRTUAL, count, seed)), f"seed {seed}, small batches"):
        small.step(batch)
    small.look(test)
    for runner in (*runners.values(), small):
        runner.final = runner.accuracy(test, average=True)
    return Race(runners, small)


def claims(races: Sequence[Race]) -> Iterator[Claim]:
    def of_each(figure: Callable[[Race], float]) -> list[float]:
        return [figure(race) for race in races]

    def first_losses(race: Race) -> float:
        return max(abs(race[native].losses[0] / race[ours].losses[0] - 1) for native, ours in CONVERSIONS)

    def lowest(race: Race) -> float:
        return 100 * min(runner.final for runner in race.runners.values())

    statement = "Converted, the network computes the same, in both layouts."
    yield Claim("convert", statement, "relative difference of the first losses", of_each(first_losses), at_most=1e-5)
    statement = f"All reach {TARGET:.0%} of images not trained on, those with ghosts too."
    yield Claim("speedruns", statement, "lowest final accuracy (%)", of_each(lowest), at_least=100 * TARGET)
    for (native, ours), what, limit in zip(CONVERSIONS, ("faster", "as fast"), (1.05, 0.9)):
        over = f"{native} / {ours.name}"
        steps = of_each(partial(Race.steps_apart, one=native, other=ours))
        statement = f"Converted, it needs as many steps to {TARGET:.0%}, within noise."
        yield Claim("convert", statement, f"{over}, as a factor above 1", steps, at_most=1.5)
        ratios = of_each(partial(Race.step_ratio, one=native, other=ours))
        statement = f"Converted, a step is {what} in this layout."
        yield Claim("convert", statement, f"{over}, median step times", ratios, at_least=limit)
        times = of_each(partial(Race.time_ratio, one=native, other=ours))
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
    statement = f"Ghosts alone regain the {LOST} points that the large batch costs here."
    measure = "final accuracy, in points above the mean of those without"
    yield Claim("Hoffer et al.", statement, measure, gains, at_least=LOST, expected=False)


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
        times = [median(sum(runner.seconds[:step]) for runner in runners) for step in runners[0].looked]
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
    arguments.set_defaults(device=torch.device("cpu"))  # on a GPU, so small a network is a study of launches
    args = parse(arguments, argv)
    torch.set_num_threads(1)  # what a step takes is then its own work, not waiting for another thread
    report = Report("cifar_style_speedrun", args)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        races = [run(seed, args.device, EVERY if args.quick else STEPS) for seed in range(args.seeds)]
    report.claims += claims(races)
    show(report, races)
    return report.finish(plot(races))


if __name__ == "__main__":
    sys.exit(main())
