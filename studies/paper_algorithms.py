"""The exact statements of the paper: Algorithms 1 and 2, and invariance to the scale of the weights.

    python -m studies.paper_algorithms        # or: make studies

Ioffe & Szegedy, "Batch Normalization" (2015, arXiv 1502.03167), written line by line in plain torch, in float64,
and compared with `bnkernels.reference`, the reference of every kernel, and with this package's layers:

- Algorithm 1, the transform of a mini-batch, and Algorithm 2, the population statistics that inference normalises with,
  with the m/(m-1) of the unbiased variance. The inputs are those of the eight BatchNorm layers of a network
  trained on handwritten digits (why_batchnorm.py's): all mini-batches of an epoch, then the test images.
- Section 3.3: BN(Wu) = BN((aW)u), with the same gradient to u, and a gradient to the weights that is divided by a.

The paper's population is many mini-batches; here it is one epoch. The compared results differ only by rounding, so the
limits are counted in roundings; they are derived in `roundings` and `scale_invariance`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnkernels as bnk
from bnkernels import reference
from bnkernels.testing.tolerance import UNIT_ROUNDOFF, K
from examples.digits import Images, load
from studies.study import FOURTH, THIRD, WITH_BN, WITHOUT_BN, Claim, Report, parse, parser, progress_bar
from studies.why_batchnorm import batches, network, train

ROUNDING = UNIT_ROUNDOFF[torch.float64]
FACTORS = (1e-3, 1e-2, 1e-1, 1e1, 1e2, 1e3)
NEGLIGIBLE, USUAL = 1e-30, 1e-5  # eps


@dataclass
class Statistics:
    mean: Tensor
    var: Tensor


@dataclass
class Affine:
    """The parameters gamma and beta of the paper, and its epsilon."""

    gamma: Tensor
    beta: Tensor
    eps: float


def algorithm_1(x: Tensor, to: Affine) -> tuple[Tensor, Statistics]:
    """Algorithm 1, Batch Normalizing Transform, over a mini-batch x (m, C)."""
    m = len(x)
    mu = x.sum(0) / m  # mini-batch mean
    sigma2 = ((x - mu) ** 2).sum(0) / m  # mini-batch variance
    x_hat = (x - mu) / torch.sqrt(sigma2 + to.eps)  # normalize
    y = to.gamma * x_hat + to.beta  # scale and shift
    return y, Statistics(mu, sigma2)


def algorithm_2(mini_batches: Sequence[Tensor], to: Affine) -> Statistics:
    """Algorithm 2, line 10: the population's statistics, from mini-batches of one size. (Lines 1 to 7 train.)"""
    of_each = [algorithm_1(x, to)[1] for x in mini_batches]
    m = len(mini_batches[0])
    mean = torch.stack([one.mean for one in of_each]).mean(0)  # E[x] <- E_B[mu_B]
    var = m / (m - 1) * torch.stack([one.var for one in of_each]).mean(0)  # Var[x] <- m/(m-1) E_B[sigma_B^2]
    return Statistics(mean, var)


def inference(x: Tensor, population: Statistics, to: Affine) -> Tensor:
    """Algorithm 2, line 11: y = gamma / sqrt(Var[x] + eps) x + (beta - gamma E[x] / sqrt(Var[x] + eps))."""
    factor = to.gamma / torch.sqrt(population.var + to.eps)
    return factor * x + (to.beta - factor * population.mean)


@dataclass
class Recorded:
    """Inputs and outputs of a layer: the mini-batches of an epoch in training, and the test images in inference."""

    layer: bnk.BatchNorm1d
    training: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    inference: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def hook(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        (self.training if layer.training else self.inference).append((inputs[0], output))


@torch.no_grad()
def observe(model: nn.Module, data: Images, test: Images, seed: int) -> list[Recorded]:
    """Estimates the population statistics of a trained network's layers, and records their inputs and outputs."""
    model.to(torch.float64).train()
    recorded = [Recorded(layer) for layer in model.modules() if isinstance(layer, bnk.BatchNorm1d)]
    for one in recorded:
        one.layer.reset_running_stats()
        one.layer.momentum = None  # the average over all batches, as E_B in Algorithm 2
        one.layer.register_forward_hook(one.hook)
    for batch in batches(data, torch.Generator().manual_seed(seed)):
        model(batch.images)
    model.eval()(test.images)
    return recorded


def roundings(a: Tensor, b: Tensor, x: Tensor, over: Tensor, by: Statistics, to: Affine) -> float:
    """The largest difference of two outputs for x, in roundings (2^-53) of what their error scales with.

    That is |gamma| (A + |x_hat| k) + |beta|, A = (|x| + mean|x|) / sqrt(var + eps), k = rms(x) / sqrt(var + eps), the
    means over the data that the statistics are of. The error of a sum is in roundings of the sum of the magnitudes, so
    that of the mean scales with mean|x|; the relative error of the variance scales with k.
    bnkernels.testing.tolerance has the full derivation, and allows K = 32 of these roundings to each backend: two
    implementations of Algorithm 1 differ by at most 2 K. A running average over B batches rounds three more times per
    batch: two implementations of Algorithm 2 differ by at most 2 (K + 3 B).
    """
    invstd = 1 / torch.sqrt(by.var + to.eps)
    size = (x.abs() + over.abs().mean(0)) * invstd
    k = over.square().mean(0).sqrt() * invstd
    scale = to.gamma.abs() * (size + ((x - by.mean) * invstd).abs() * k) + to.beta.abs()
    return float(((a - b).abs() / scale).max() / ROUNDING)


@dataclass
class Differences:
    """The largest differences of one layer over all batches, between the paper's algorithms and the others."""

    layer_1: float = 0.0
    reference_1: float = 0.0
    layer_2: float = 0.0
    reference_2: float = 0.0


@torch.no_grad()
def compare(recorded: Recorded) -> Differences:
    gamma, beta, eps = recorded.layer.weight, recorded.layer.bias, recorded.layer.eps
    to, worst = Affine(gamma, beta, eps), Differences()
    mean: Tensor | None = torch.zeros_like(beta)
    var: Tensor | None = torch.ones_like(beta)
    for count, (x, y) in enumerate(recorded.training):
        paper, by = algorithm_1(x, to)
        truth = reference.forward(x, gamma, beta, mean, var, count, momentum=None, eps=eps)
        mean, var = truth.running_mean, truth.running_var
        worst.layer_1 = max(worst.layer_1, roundings(y, paper, x, x, by, to))
        worst.reference_1 = max(worst.reference_1, roundings(truth.y, paper, x, x, by, to))
    inputs = [x for x, _ in recorded.training]
    population, over = algorithm_2(inputs, to), torch.cat(inputs)
    for x, y in recorded.inference:
        paper = inference(x, population, to)
        truth = reference.forward(x, gamma, beta, mean, var, training=False, eps=eps)
        worst.layer_2 = max(worst.layer_2, roundings(y, paper, x, over, population, to))
        worst.reference_2 = max(worst.reference_2, roundings(truth.y, paper, x, over, population, to))
    return worst


def scale_invariance(u: Tensor, seed: int, eps: float, factors: Sequence[float] = FACTORS) -> list[float]:
    """For each a, the largest relative difference between BN((aW)u) and BN(Wu), between the gradients to u, and between
    the gradients to W, that of aW taken a times.

    If eps is negligible compared with every variance, only the roundings of aW and of sums over inputs and images
    remain: at most as many as there are images. A larger eps breaks the invariance, as it does not scale with a.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, grad = (torch.randn(n, 64, generator=generator, dtype=u.dtype).to(u) for n in (64, len(u)))
    layer = bnk.BatchNorm1d(64, eps=eps).to(u)

    def results(a: float) -> list[Tensor]:
        leaves = [u.clone().requires_grad_(), (a * weight).requires_grad_()]
        y = layer(F.linear(leaves[0], leaves[1]))
        du, dw = torch.autograd.grad(y, leaves, grad)
        return [y.detach(), du, a * dw]

    expected = results(1.0)
    return [max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(results(a), expected)) for a in factors]


@dataclass
class Measured:
    """The differences of one seed: by layer, and by factor on the weights for each eps."""

    layers: list[Differences]
    factors: dict[float, list[float]]
    batches: int
    images: int

    def worst(self, which: str) -> float:
        return max(float(getattr(one, which)) for one in self.layers)


def measure(seed: int, device: torch.device, epochs: int) -> Measured:
    data, test = load(device, torch.float64, seed)
    model = network(True, nn.Sigmoid, 1.0, seed)
    train(model, data, test, 0.03, epochs, seed)
    recorded = observe(model, data, test, seed)
    invariance = {eps: scale_invariance(data.images.flatten(1), seed, eps) for eps in (NEGLIGIBLE, USUAL)}
    return Measured([compare(one) for one in recorded], invariance, len(recorded[0].training), len(data))


def allowed(run: Measured) -> dict[str, float]:
    """The limits in roundings (see `roundings`), keyed by the number of the algorithm."""
    return {"1": 2 * K, "2": 2 * (K + 3 * run.batches)}


def claims(runs: Sequence[Measured]) -> list[Claim]:
    result = []
    for number, other in product("12", ("reference", "layer")):
        statement = f"Algorithm {number}, line by line, computes what this package's {other} does."
        values = [run.worst(f"{other}_{number}") for run in runs]
        limit = allowed(runs[0])[number]
        result.append(Claim("section 3", statement, "largest difference in roundings", values, at_most=limit))
    statement = "BN((aW)u) = BN(Wu), with the same gradient to u, and W's divided by a."
    values = [max(run.factors[NEGLIGIBLE]) for run in runs]
    limit = runs[0].images * ROUNDING
    return [*result, Claim("section 3.3", statement, "largest relative difference", values, at_most=limit)]


def show(report: Report, runs: Sequence[Measured]) -> None:
    header = ["a", *(f"{a:g}" for a in FACTORS)]
    rows = [
        [f"eps {eps:g}", *(f"{max(run.factors[eps][i] for run in runs):.1e}" for i in range(len(FACTORS)))]
        for eps in runs[0].factors
    ]
    report.show("BN((aW)u) against BN(Wu), the largest relative difference of outputs and gradients:", header, rows)


def plot(runs: Sequence[Measured]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    looks = product("12", (("reference", "s--"), ("layer", "o-")))
    for (number, (other, style)), colour in zip(looks, (WITH_BN, FOURTH, THIRD, WITHOUT_BN)):
        worst = [max(getattr(run.layers[i], f"{other}_{number}") for run in runs) for i in range(len(runs[0].layers))]
        label = f"Algorithm {number} and the {other}"
        left.semilogy(range(1, len(worst) + 1), worst, style, color=colour, label=label)
    for (number, limit), style in zip(allowed(runs[0]).items(), (":", "-.")):
        left.axhline(limit, color="grey", linestyle=style, label=f"limit for Algorithm {number}")
    left.set(xlabel="BatchNorm layer of the network", ylabel="largest difference (roundings, 2^-53)", ylim=(1, 300))
    left.set_title("The paper's lines against this package")
    for (eps, name), colour in zip(((NEGLIGIBLE, "eps negligible"), (USUAL, "eps 1e-5")), (WITH_BN, WITHOUT_BN)):
        worst = [max(run.factors[eps][i] for run in runs) for i in range(len(FACTORS))]
        right.loglog(FACTORS, worst, "o-", color=colour, label=name)
    right.axhline(runs[0].images * ROUNDING, color="grey", linestyle=":", label="limit, where eps is negligible")
    right.set(xlabel="factor a on the weights", ylabel="largest relative difference")
    right.set_title("BN((aW)u) against BN(Wu), and the gradients")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(parser(__doc__), argv)
    torch.set_num_threads(1)  # networks this small gain nothing from more threads
    report = Report("paper_algorithms", args)
    runs = [measure(seed, args.device, 1 if args.quick else 10) for seed in progress_bar(range(args.seeds), "seeds")]
    report.claims += claims(runs)
    show(report, runs)
    return report.finish(plot(runs))


if __name__ == "__main__":
    sys.exit(main())
