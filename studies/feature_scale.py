"""Features of different scale: a small regression by gradient descent, with BatchNorm and without.

    python -m studies.feature_scale           # or: make studies

Ioffe & Szegedy, "Batch Normalization" (2015, arXiv 1502.03167), section 2: training converges faster if inputs are
normalised (after LeCun et al. 1998, "Efficient BackProp", section 4.3). Articles illustrate it with two features, one
of them a hundred times as large: gradient descent needs a learning rate that is small enough for the large one, and
then the weight of the small one converges very slowly; BatchNorm gives both the same scale.

Here x1 is in 1..2 and x2 in 100..200, and both weights are 1 to 2 in size. The study measures the
progress of each weight to its least-squares optimum at each step, with the best learning rate of the same sweep with
and without BatchNorm. The features lie on a grid and are therefore uncorrelated: BatchNorm scales each separately and
does not decorrelate them (section 3). Each step uses all of the data as one mini-batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnkernels as bnk
from studies.study import WITH_BN, WITHOUT_BN, Claim, Report, parse, parser, progress_bar

SIDES = {True: "with BN", False: "without BN"}
COLOURS = {True: WITH_BN, False: WITHOUT_BN}


def decades(first: float, last: float, per_decade: int) -> list[float]:
    """Powers of ten from 10^first to 10^last."""
    return [10 ** (i / per_decade) for i in range(round(first * per_decade), round(last * per_decade) + 1)]


@dataclass
class Descent:
    """One run of gradient descent: the loss before each step and at the end, and the progress of each weight,
    (steps + 1, 2): 1 at the optimum, 0 at the initial distance from it, negative farther away."""

    lr: float
    losses: list[float]
    progress: Tensor

    @property
    def stable(self) -> bool:
        return self.losses[-1] <= self.losses[0]  # false for NaN


def regression(seed: int, device: torch.device, points: int = 16) -> tuple[Tensor, Tensor]:
    """Every pair of x1 in 1..2 and x2 in 100..200, and a noisy linear function of them whose weights are 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cartesian_prod(torch.linspace(1, 2, points), torch.linspace(100, 200, points)).double()
    signs = torch.randint(2, (2,), generator=generator) * 2 - 1
    weights = signs * (1 + torch.rand(2, generator=generator))
    noise = 0.1 * torch.randn(len(x), generator=generator)
    return x.to(device), (x @ weights.double() + noise).to(device)


def descend(x: Tensor, y: Tensor, normalised: bool, lr: float, steps: int) -> Descent:
    first = bnk.BatchNorm1d(2, affine=False) if normalised else nn.Identity()
    linear = nn.Linear(2, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(first, linear).to(x)
    features = first(x)
    optimum = torch.linalg.lstsq(torch.cat([features, torch.ones_like(x[:, :1])], 1), y[:, None]).solution[:2, 0]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses, weights = [], []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).squeeze(1), y)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        weights.append(linear.weight.detach()[0].clone())
        optimizer.step()
    progress = 1 - ((torch.stack(weights) - optimum) / optimum).abs()
    return Descent(lr, torch.stack(losses).tolist(), progress.cpu())


def best(descents: Sequence[Descent]) -> Descent:
    """The run with the lowest final loss; among losses equal to six digits, the one whose loss fell fastest."""
    return min(
        (one for one in descents if one.stable), key=lambda one: (float(f"{one.losses[-1]:.5e}"), sum(one.losses))
    )


@dataclass
class Measured:
    """The runs of one seed with every learning rate, keyed by whether there is BatchNorm."""

    descents: dict[bool, list[Descent]]

    def best(self, normalised: bool) -> Descent:
        return best(self.descents[normalised])

    def stable(self, normalised: bool) -> list[Descent]:
        return [one for one in self.descents[normalised] if one.stable]


def measure(seed: int, device: torch.device, rates: Sequence[float], steps: int) -> Measured:
    x, y = regression(seed, device)
    return Measured({normalised: [descend(x, y, normalised, lr, steps) for lr in rates] for normalised in SIDES})


def claims(runs: Sequence[Measured]) -> list[Claim]:
    source = "section 2; articles"

    def of_each(figure: Callable[[Descent, Descent], float]) -> list[float]:
        return [figure(run.best(True), run.best(False)) for run in runs]

    return [
        Claim(
            source,
            "With BatchNorm, weights of features of different scale come to their optimum at the same rate.",
            "largest difference of their progress at any step",
            of_each(lambda bn, _: float((bn.progress[:, 0] - bn.progress[:, 1]).abs().max())),
            at_most=0.01,
        ),
        Claim(
            source,
            "Without, the large feature limits the learning rate, and the weight of the small one hardly moves.",
            "progress of the small one's weight at the end, with less without",
            of_each(lambda bn, plain: float(bn.progress[-1, 0] - plain.progress[-1, 0])),
            at_least=0.9,
        ),
        Claim(
            source,
            "BatchNorm lets such a regression use a far higher learning rate.",
            "best with over best without",
            of_each(lambda bn, plain: bn.lr / plain.lr),
            at_least=1000,
        ),
    ]


def show(report: Report, runs: Sequence[Measured], steps: int) -> None:
    rows = []
    for (seed, run), normalised in product(enumerate(runs), SIDES):
        best, highest = run.best(normalised), max(one.lr for one in run.stable(normalised))
        weights = [f"{100 * part:.1f}%" for part in best.progress[-1].tolist()]
        rows.append([f"{seed}", SIDES[normalised], f"{best.lr:.2g}", f"{highest:.2g}", *weights])
    header = ["seed", "", "best learning rate", "highest stable", "progress of x1's weight", "of x2's"]
    report.show(f"After {steps} steps with the best learning rate:", header, rows)


def plot(run: Measured, steps: int) -> Figure:
    """Of one seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for normalised, name in SIDES.items():
        colour = COLOURS[normalised]
        progress = 100 * run.best(normalised).progress[1:]
        wide, dashed = (progress[:, weight].tolist() for weight in range(2))
        numbers = range(1, steps + 1)
        left.semilogx(numbers, wide, color=colour, linewidth=6, alpha=0.5, label=f"weight of x1, {name}")
        left.semilogx(numbers, dashed, "--", color=colour, linewidth=2, label=f"weight of x2, {name}")
        stable = run.stable(normalised)
        slower = [100 * float(one.progress[-1].min()) for one in stable]
        right.semilogx([one.lr for one in stable], slower, "o-", color=colour, label=name)
    left.set(xlabel="step of gradient descent", ylabel="progress to the optimum (%)", ylim=(-10, 110))
    left.set_title("x1 in 1..2, x2 in 100..200: best learning rate")
    right.set(
        xlabel="learning rate (those that are stable)", ylabel="progress of the slower weight (%)", ylim=(-10, 110)
    )
    right.set_title(f"The same after {steps} steps, by learning rate")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(parser(__doc__), argv)
    report = Report("feature_scale", args)
    rates, steps = ([1e-5, 1e-1], 20) if args.quick else (decades(-6, 0.5, 4), 200)
    runs = [measure(seed, args.device, rates, steps) for seed in progress_bar(range(args.seeds), "seeds")]
    report.claims += claims(runs)
    show(report, runs, steps)
    return report.finish(plot(runs[0], steps))


if __name__ == "__main__":
    sys.exit(main())
