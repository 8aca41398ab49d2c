"""PhaseDNN: many small networks learn all frequencies of a function; one large network does not learn the high ones.

    python -m studies.phase_dnn

Sources. A network that fits a function learns its low frequencies first and its high ones late or never: the
F-principle (Xu, Zhang, Luo, Xiao, Ma, arXiv 1901.06523), spectral bias (Rahaman et al., arXiv 1806.08734). PhaseDNN
(Cai, Li, Liu, "PhaseDNN - A Parallel Phase Shift Deep Neural Network for Adaptive Wideband Learning", arXiv
1905.01389) avoids this: K moderate networks, trained in parallel, each on one band of frequencies that a phase
factor on the training data has shifted down,

    f = sum_k f_k,    T_k(x) ~ exp(-i w_k x) f_k(x),    f(x) ~ Re sum_k exp(i w_k x) T_k(x),

so that "each DNN achieves the speed of convergence as in the low frequency range" and learning is uniform over a wide
band (both from the abstract). This is the parallel form: windows split f into the f_k beforehand, and the networks are
independent. (In the coupled form one loss fits their sum, and the target of each network is not fixed beforehand.)

K networks of one shape are one step of torch.func: stack_module_state, and vmap of grad of functional_call. Each
bnk.BatchNorm1d in the step is one launch over K*C channels; every network has its own running statistics and counter,
updated in place. One claim below is that this equals K separate trainings up to rounding, in float64.

Measured: the error by band. The target is periodic with a flat random spectrum, new for each seed, so that every band
has energy, and an error of 1 is a band not learned at all; an FFT projects the residual on the bands, on points between
those trained on. It is compared with one plain network of the same depth and at least as many parameters, with the same
points, optimizer and number of steps, with and without BatchNorm; the better of the two counts. Each kind has its own
learning rate, the best of 0.001, 0.003, 0.01, 0.03 and 0.1 on the seeds 100 and 101, which are not among those judged.
(If the best is the lowest, 0.0003 gave the same result and 0.0001 a worse one.) All use ReLU, with which the plain
network was better than with SiLU.

Unlike the paper: the windows are sharp and cut by an FFT, which for a periodic function on a uniform grid is the
convolution with the window's kernel that the paper approximates by quadrature; f is real, so that bands of negative
frequency are the conjugates of those learned; networks, data and training are small, to run on a CPU.

BatchNorm is this study's own addition, and whether it helps is measured. It follows the second and third linear
layers, not the first: of a single input it leaves only the sign of the weight. Each step sees all points, so the
statistics have no noise; evaluation uses the running statistics, which catch up as the learning rate goes to 0. Two
rows with small batches show the cost of the noise.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import bnkernels as bnk
from examples.digits import now
from studies import study

BANDS, WAVES = 16, 8  # networks, and the frequencies that each learns: 1 to 128 waves over the interval
POINTS, TEST_POINTS = 512, 1024  # on [-pi, pi): four points of the fastest wave, and others between them
HIDDEN = 32  # of the networks of PhaseDNN
STEPS, QUICK_STEPS = 400, 8
RECORDS = 80  # evaluations of a training, at most one per step
LEARNED = 0.1  # a band's error when it counts as learned
BATCH = 64
COMPARED_STEPS = 10  # steps that compare the vmapped step with separate ones
SHOWN = 0.6  # of the interval of length 2 pi, in the plot


@dataclass(frozen=True)
class Kind:
    name: str
    shifted: bool  # PhaseDNN; otherwise the plain network
    bn: bool
    rate: float
    color: str
    batch: int = POINTS


PHASE = Kind("PhaseDNN with BN", True, True, 0.01, study.WITH_BN)
PHASE_WITHOUT = Kind("PhaseDNN without BN", True, False, 0.03, study.WITHOUT_BN)
PLAIN = Kind("plain with BN", False, True, 0.001, study.THIRD)
PLAIN_WITHOUT = Kind("plain without BN", False, False, 0.01, study.FOURTH)
NOISY = Kind(f"PhaseDNN with BN, batches of {BATCH}", True, True, 0.01, study.WITH_BN, BATCH)
NOISY_WITHOUT = Kind(f"PhaseDNN without BN, batches of {BATCH}", True, False, 0.03, study.WITHOUT_BN, BATCH)
KINDS = (PHASE, PHASE_WITHOUT, PLAIN, PLAIN_WITHOUT, NOISY, NOISY_WITHOUT)

FREQUENCIES = torch.arange(1, BANDS * WAVES + 1, dtype=torch.float64)
CENTRES = FREQUENCIES.view(BANDS, WAVES).mean(1, keepdim=True)  # w_k, (BANDS, 1)


def grid(points: int, offset: float = 0.0) -> Tensor:
    """(points,) of [-pi, pi), a fraction of a spacing to the right."""
    return -math.pi + 2 * math.pi * (torch.arange(points, dtype=torch.float64) + offset) / points


def waves(x: Tensor) -> Tensor:
    """exp(i w x) of all frequencies by band, (BANDS, WAVES, points)."""
    return torch.exp(1j * FREQUENCIES[:, None] * x).view(BANDS, WAVES, len(x))


def spectrum(f: Tensor) -> Tensor:
    """c of f = Re sum_w c_w exp(i w x) on grid(len(f)), (BANDS, WAVES). Frequencies in no band are left out."""
    from_zero = 2 * torch.fft.rfft(f)[1 : BANDS * WAVES + 1] / len(f)
    return (from_zero * torch.exp(1j * math.pi * FREQUENCIES)).view(BANDS, WAVES)  # the grid begins at -pi


def shifted_bands(f: Tensor) -> Tensor:
    """exp(-i w_k x) f_k(x) of each band, (BANDS, len(f)), of f on grid(len(f)): the targets of the networks."""
    x = grid(len(f))
    return torch.einsum("kw,kwn->kn", spectrum(f), waves(x)) * torch.exp(-1j * CENTRES * x)


def shifted_back(t: Tensor, x: Tensor) -> Tensor:
    """Re sum_k exp(i w_k x) T_k(x), of T (BANDS, points)."""
    return (t * torch.exp(1j * CENTRES * x)).sum(0).real


def band_errors(guess: Tensor, f: Tensor) -> Tensor:
    """(BANDS,): the norm of the residual in each band over that of f. An offset of the grid changes neither."""
    return spectrum(guess - f).norm(dim=1) / spectrum(f).norm(dim=1)


def network(hidden: int, outputs: int, bn: bool) -> nn.Sequential:
    """x to T(x) through three hidden layers, the last two of them normalised."""
    layers: list[nn.Module] = [nn.Linear(1, hidden), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(hidden, hidden, bias=not bn), *([bnk.BatchNorm1d(hidden)] if bn else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def networks(kind: Kind) -> list[nn.Sequential]:
    """BANDS small networks for the real and imaginary part of T_k, or one network with at least as many parameters."""
    small = [network(HIDDEN, 2, kind.bn) for _ in range(BANDS)]
    if kind.shifted:
        return small
    hidden = HIDDEN
    while size(network(hidden, 1, kind.bn)) < BANDS * size(small[0]):
        hidden += 1
    return [network(hidden, 1, kind.bn)]


class Ensemble:
    """Networks of one shape, trained and evaluated as one."""

    def __init__(self, models: Sequence[nn.Module], rate: float) -> None:
        self.one = models[0]  # the template for functional_call; its own parameters are unused
        self.parameters, self.buffers = stack_module_state(list(models))  # type: ignore[arg-type]
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=rate)

    def _loss(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        y: Tensor = functional_call(self.one, (parameters, buffers), (x,))
        return (y - target).square().mean()

    def step(self, x: Tensor, targets: Tensor) -> None:
        """x (N, 1), the same for all; targets (networks, N, outputs)."""
        fixed = {name: parameter.detach() for name, parameter in self.parameters.items()}
        every = vmap(grad_and_value(self._loss), (0, 0, None, 0))
        gradients, _ = every(fixed, self.buffers, x, targets)  # updates the running statistics in place
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """(networks, N, outputs), with the running statistics."""
        self.one.eval()
        y: Tensor = vmap(lambda p, b: functional_call(self.one, (p, b), (x,)))(self.parameters, self.buffers)
        self.one.train()
        return y


class Target:
    """A wideband function, the training targets of each kind of network, and the function that its networks predict."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        parts = torch.randn(BANDS, WAVES, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        coefficients = torch.view_as_complex(parts) / math.sqrt(BANDS * WAVES)  # variance 1
        self.x, self.x_test = grid(POINTS), grid(TEST_POINTS, offset=0.5)
        self.f, self.f_test = (torch.einsum("kw,kwn->n", coefficients, waves(x)).real for x in (self.x, self.x_test))
        bands = shifted_bands(self.f)
        self.scale = bands.abs().square().mean(1, keepdim=True).sqrt()
        self.bands = torch.view_as_real(bands / self.scale)  # (BANDS, POINTS, 2), of variance 1 for each network

    def column(self, x: Tensor) -> Tensor:
        return x.float()[:, None].to(self.device)

    def guess(self, kind: Kind, ensemble: Ensemble) -> Tensor:
        """(TEST_POINTS,) float64"""
        y = ensemble.predict(self.column(self.x_test)).double().cpu()
        return shifted_back(torch.view_as_complex(y) * self.scale, self.x_test) if kind.shifted else y.flatten()


@dataclass
class Training:
    """The result of a training: the errors by band (records, BANDS) after `steps`, and the final function."""

    steps: list[int]
    errors: Tensor
    guess: Tensor
    error: float  # of the whole function, relative
    parameters: int

    @property
    def learned(self) -> Tensor:
        """(BANDS,): the first recorded step at which each band was, infinite if never."""
        at = torch.tensor(self.steps, dtype=torch.float64)[:, None].expand_as(self.errors)
        return at.where(self.errors <= LEARNED, math.inf).amin(0)

    @property
    def lag(self) -> float:
        """Mean step at which a band of the upper half is learned over that of the lower half; NaN if neither is."""
        low, high = self.learned.view(2, -1).mean(1)
        return float(high / low)

    @property
    def worst(self) -> float:
        return float(self.errors[-1].max())


def train(kind: Kind, target: Target, steps: int) -> Training:
    torch.manual_seed(target.seed)
    models = [model.to(target.device) for model in networks(kind)]
    ensemble = Ensemble(models, kind.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(ensemble.optimizer, kind.rate, total_steps=steps, pct_start=0.1)
    x = target.column(target.x)
    data = (target.bands if kind.shifted else target.f[None, :, None]).float().to(target.device)
    generator = torch.Generator().manual_seed(target.seed)
    at, errors = [], []
    for step in study.progress_bar(range(1, steps + 1), f"{kind.name}, seed {target.seed}"):
        if kind.batch < POINTS:
            chosen = torch.randperm(POINTS, generator=generator)[: kind.batch].to(target.device)
            ensemble.step(x[chosen], data[:, chosen])
        else:
            ensemble.step(x, data)
        schedule.step()
        if step % max(1, steps // RECORDS) == 0:
            guess = target.guess(kind, ensemble)
            at.append(step)
            errors.append(band_errors(guess, target.f_test))
    error = float((guess - target.f_test).norm() / target.f_test.norm())
    return Training(at, torch.stack(errors), guess, error, len(models) * size(models[0]))


def largest_difference(ensemble: Ensemble, models: Sequence[nn.Module]) -> float:
    """The largest difference of any parameter, running statistic or counter, relative to the largest of its name."""
    states = [model.state_dict() for model in models]
    differences = []
    for name, stacked in {**ensemble.parameters, **ensemble.buffers}.items():
        separate = torch.stack([state[name] for state in states]).double()
        differences.append((stacked.detach().double() - separate).abs().max() / separate.abs().max())
    return float(torch.stack(differences).max())  # torch's max propagates NaN; Python's does not


def compare_steps(target: Target, dtype: torch.dtype) -> tuple[float, float]:
    """The difference of the vmapped step and BANDS separate ones after COMPARED_STEPS, and its speedup."""
    torch.manual_seed(target.seed)
    models = [model.to(target.device, dtype) for model in networks(PHASE)]
    ensemble = Ensemble(copy.deepcopy(models), PHASE.rate)
    optimizers = [torch.optim.Adam(model.parameters(), lr=PHASE.rate) for model in models]
    x, data = (tensor.to(target.device, dtype) for tensor in (target.x[:, None], target.bands))
    separate, vmapped = [], []
    for _ in range(COMPARED_STEPS):
        started = now(target.device)
        for model, optimizer, own in zip(models, optimizers, data):
            optimizer.zero_grad()
            (model(x) - own).square().mean().backward()
            optimizer.step()
        between = now(target.device)
        ensemble.step(x, data)
        separate.append(between - started)
        vmapped.append(now(target.device) - between)
    return largest_difference(ensemble, models), min(separate) / min(vmapped)


Results = dict[Kind, list[Training]]  # of each seed


def claims(results: Results, differences: Sequence[float]) -> list[study.Claim]:
    def gain(without: Kind, bn: Kind) -> list[float]:
        return [a.error / b.error for a, b in zip(results[without], results[bn])]

    phase, plain = results[PHASE], list(zip(results[PLAIN], results[PLAIN_WITHOUT]))
    better = [min(one.error for one in pair) / own.error for pair, own in zip(plain, phase)]
    last = [torch.stack([one.errors[-1] for one in pair]) for pair in plain]  # (2, BANDS) of each seed
    low_to_high = [float((errors[:, 0] / errors[:, BANDS // 2 :].mean(1)).max()) for errors in last]
    left = [float(errors[:, BANDS // 2 :].min()) for errors in last]

    cai, xu, ioffe = "Cai et al., abstract", "Xu et al.; Rahaman et al.", "Ioffe & Szegedy 2015, abstract"
    reached = f"steps to an error of {LEARNED:g}, mean of the upper half of the bands over the lower's"
    helps, factor = "BN accelerates the training of PhaseDNN", "error without BN over the error with it"
    rounding = f"largest relative difference of a tensor after {COMPARED_STEPS} steps in float64"
    first = "lowest band's error over the mean of the upper half's, the larger of the two"
    one_step = f"{BANDS} separate steps are one vmapped step, running statistics and counters included"
    return [
        study.Claim(cai, "PhaseDNN learns all bands", "worst band's error", [t.worst for t in phase], at_most=LEARNED),
        study.Claim(cai, "and high ones as fast as low ones", reached, [t.lag for t in phase], at_most=2),
        study.Claim(cai, "better than one network", "error of the better plain one over its own", better, at_least=20),
        study.Claim(xu, "A plain network learns low frequencies first", first, low_to_high, at_most=0.6),
        study.Claim(xu, "and leaves the high ones", "least error of a band of the upper half", left, at_least=0.8),
        study.Claim("torch.func", one_step, rounding, differences, at_most=1e-12),
        study.Claim(ioffe, f"{helps} with all points", factor, gain(PHASE_WITHOUT, PHASE), at_least=1.2),
        study.Claim(
            ioffe, f"{helps} with {BATCH} points", factor, gain(NOISY_WITHOUT, NOISY), at_least=1.2, expected=False
        ),
    ]


HEADER = ["network", "parameters", "rate", "error", "worst band", "bands learned", "all by step"]


def row(kind: Kind, trainings: Sequence[Training]) -> list[str]:
    learned = torch.stack([one.learned for one in trainings])
    errors, worst = (", ".join(f"{v:.3f}" for v in each) for each in zip(*((t.error, t.worst) for t in trainings)))
    learned_percent = f"{float(learned.isfinite().double().mean()):.0%}"
    all_by = "never" if learned.isinf().any() else f"{float(learned.max()):.0f}"
    return [kind.name, f"{trainings[0].parameters:,}", f"{kind.rate:g}", errors, worst, learned_percent, all_by]


def draw(results: Results, target: Target) -> Figure:
    """Errors by step and band of PhaseDNN and the plain network, final errors of all, and a part of the functions."""
    figure, (maps, (bands, function)) = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    frequency = "frequency (waves over the interval)"
    for axes, kind in zip(maps, (PLAIN, PHASE)):
        one, edges = results[kind][0], [band * WAVES + 0.5 for band in range(BANDS + 1)]
        mesh = axes.pcolormesh([0, *one.steps], edges, one.errors.T.numpy(), norm=LogNorm(0.01, 1), cmap="cividis")
        axes.set(xlabel="training step", ylabel=frequency, title=kind.name)
    figure.colorbar(mesh, ax=maps, label="relative error of the band (1: not learned)")
    for kind, marker in zip((PLAIN_WITHOUT, PLAIN, PHASE_WITHOUT, PHASE), "sdvo"):
        last = torch.stack([one.errors[-1] for one in results[kind]])
        bands.semilogy(CENTRES, last.log().mean(0).exp(), marker + "-", color=kind.color, label=kind.name)
        bands.fill_between(CENTRES.flatten(), last.amin(0), last.amax(0), color=kind.color, alpha=0.2)
    bands.set(xlabel=frequency, ylabel="relative error of the band", title="after training; shaded: range of the seeds")
    piece = (target.x_test > 0) & (target.x_test < SHOWN)
    function.plot(target.x_test[piece], target.f_test[piece], color="0.75", linewidth=6, label="target")
    for kind, style in ((PLAIN, "--"), (PHASE, "-")):
        guess = results[kind][0].guess[piece]
        function.plot(target.x_test[piece], guess, style, color=kind.color, linewidth=1.5, label=kind.name)
    function.set(xlabel="x (radians; a tenth of the interval)", ylabel="f(x)", title="a piece of the function")
    bands.legend(loc="center right", bbox_to_anchor=(1, 0.6))
    function.legend()
    for axes in (bands, function):
        axes.grid(alpha=0.3)
    figure.suptitle("PhaseDNN, and one plain network of as many parameters with the same points and steps")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    args = study.parse(study.parser(__doc__), argv)
    report = study.Report("phase_dnn", args)
    steps = QUICK_STEPS if args.quick else STEPS
    targets = [Target(seed, args.device) for seed in range(args.seeds)]
    results = {kind: [train(kind, target, steps) for target in targets] for kind in KINDS}
    double, single = ([compare_steps(target, dtype) for target in targets] for dtype in (torch.float64, torch.float32))
    report.claims += claims(results, [difference for difference, _ in double])
    what = f"After {steps} steps, by seed. Error: of the function. Learned: bands with an error up to {LEARNED:g}."
    report.show(what, HEADER, [row(*item) for item in results.items()])
    report.show(
        f"{BANDS} separate steps and one vmapped one, by seed: how far apart after {COMPARED_STEPS}, and their times.",
        ["dtype", "largest relative difference", "separate over vmapped"],
        [
            [dtype, ", ".join(f"{difference:.1e}" for difference, _ in each), ", ".join(f"{r:.2f}" for _, r in each)]
            for dtype, each in (("float64", double), ("float32", single))
        ],
    )
    return report.finish(draw(results, targets[0]))


if __name__ == "__main__":
    sys.exit(main())
