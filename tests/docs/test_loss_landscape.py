"""The study of the loss landscape: its measures agree with known results and leave the model unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("study_runs")

from study_runs import quick

from examples.digits import Images, load
from studies import loss_landscape as study

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = pytest.mark.parametrize("kind", study.KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def data() -> Images:
    return load(torch.device("cpu"), torch.float32, 0)[0]


def quadratic(curvatures: Tensor) -> Callable[[Tensor], tuple[float, Tensor]]:
    return lambda point: (float((curvatures * point**2).sum() / 2), curvatures * point)


def test_along_the_gradient_of_a_quadratic() -> None:
    """From x = 2 with curvature 9, a step of r gradients leads to x (1 - 9 r), where loss and gradient are known."""
    curvatures, point = torch.tensor([1.0, 3.0, 9.0]).double(), torch.tensor([0.0, 0.0, 2.0]).double()
    seen = study.along_gradient(quadratic(curvatures), point, [0.05, 0.1, 0.2])
    assert seen.loss == pytest.approx(18)
    assert seen.losses == pytest.approx((18 * 0.1**2, 18 * 0.8**2))
    assert seen.range == pytest.approx(18 * (0.8**2 - 0.1**2))
    assert seen.changes == pytest.approx((18 * 9 * 0.05, 18 * 9 * 0.2))
    assert seen.change == seen.changes[1]
    assert seen.beta == pytest.approx(9)


def test_beta_of_a_quadratic_is_of_the_gradients_direction() -> None:
    """|A g| / |g| for the Hessian A: between the least and the largest curvature."""
    curvatures = torch.tensor([1.0, 3.0, 9.0]).double()
    gradient = curvatures  # at the point of ones
    seen = study.along_gradient(quadratic(curvatures), torch.ones(3).double(), [0.1, 0.3])
    assert seen.beta == pytest.approx(float((curvatures * gradient).norm() / gradient.norm()))


def test_beta_is_the_largest_on_the_way() -> None:
    """Of x^4 from 1, where the gradient is 4: back to 0, the gradient changes by 4 over 1, and on the way by more."""
    seen = study.along_gradient(lambda x: (float(x**4), 4 * x**3), torch.ones(()).double(), [0.025, 0.25])
    assert seen.beta == pytest.approx((4 - 4 * 0.9**3) / 0.1)


def test_without_a_gradient_there_is_no_beta() -> None:
    assert math.isnan(study.along_gradient(quadratic(torch.ones(2)), torch.zeros(2), [0.1]).beta)


def disturbed(model: nn.Module, measure: Callable[[], object]) -> list[str]:
    """The entries of a model's state_dict that a measurement changes."""
    before = copy.deepcopy(model.state_dict())
    measure()
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


@KINDS
def test_measuring_changes_nothing(kind: study.Kind, data: Images) -> None:
    model = study.network(kind, 0)
    model(data.images[:64])  # so that the running statistics differ from the initial ones
    few, labels = data.images[64:96], data.labels[64:96]
    assert disturbed(model, lambda: study.landscape(model, few, labels, [0.05, 0.4])) == []
    assert disturbed(model, lambda: study.moments(model, few)) == []
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [study.BN, study.NOISY], ids=lambda kind: kind.name)
def test_statistics_that_follow_the_measurement_are_noticed(
    kind: study.Kind, data: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: it names the running statistics if they are updated."""
    monkeypatch.setattr(study.bnk, "no_statistics_update", lambda model: nullcontext())
    model = study.network(kind, 0)
    few, labels = data.images[:32], data.labels[:32]
    for measure in (lambda: study.landscape(model, few, labels, [0.1]), lambda: study.moments(model, few)):
        changed = disturbed(model, measure)
        assert len(changed) == 3 * len(study.CHANNELS)
        assert all(name.split(".")[1] in {"running_mean", "running_var", "num_batches_tracked"} for name in changed)


@KINDS
def test_the_landscape_is_where_a_step_of_sgd_leads(kind: study.Kind, data: Images) -> None:
    """The loss at one learning rate along the gradient is the batch's loss after that step."""
    model = study.network(kind, 0)
    few, labels = data.images[:64], data.labels[:64]
    seen = study.landscape(model, few, labels, [0.1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = F.cross_entropy(model(few), labels)
    before.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    after = F.cross_entropy(model(few), labels)
    assert seen.loss == pytest.approx(before.item(), rel=1e-5)
    assert seen.losses == pytest.approx((after.item(), after.item()), rel=1e-5)
    assert abs(after.item() - before.item()) > 1e-3


def test_batchnorm_fixes_the_moments_that_are_measured(data: Images) -> None:
    """Before training, outputs have mean 0 and variance 1; noise changes both, differently for each key."""
    means, variances = study.moments(study.network(study.BN, 0), data.images[:128])
    assert means.shape == variances.shape == (sum(study.CHANNELS),)
    assert means.abs().max() < 1e-5
    assert (variances - 1).abs().max() < 0.02
    source = torch.Generator().manual_seed(0)
    model = study.network(study.NOISY, 0)
    seen = []
    for _ in range(2):
        study.renew_noise(model, source)
        seen.append(study.moments(model, data.images[:128]))
        assert torch.equal(study.moments(model, data.images[:128])[0], seen[-1][0])
    (means, variances), (others, _) = seen
    assert (means - others).abs().mean() > study.NOISE_MEAN / 3
    # |U(-a, a)| has the mean a / 2; the square of U(1, 1 + b), 1 + b + b^2 / 3. Noise is added to 224 channels.
    assert float(means.abs().mean()) == pytest.approx(study.NOISE_MEAN / 2, rel=0.2)
    assert float(variances.mean()) == pytest.approx(1 + study.NOISE_DEVIATION + study.NOISE_DEVIATION**2 / 3, rel=0.1)


def test_networks_start_from_the_same_weights() -> None:
    starts = [
        [layer.weight for layer in study.network(kind, 3) if isinstance(layer, nn.Conv2d | nn.Linear)]
        for kind in study.KINDS
    ]
    assert len(starts[0]) == len(study.CHANNELS) + 1
    assert all(torch.equal(a, b) for other in starts[1:] for a, b in zip(starts[0], other))


def test_steps_needed() -> None:
    """Six of the last ten losses are 0 for the first time after step 21."""
    assert study.Run(0.1, [1.0] * 15 + [0.0] * 10).steps_needed == 21
    assert study.Run(0.1, [1.0] * 30).steps_needed == math.inf
    assert study.Run(0.1, [0.0] * 9).steps_needed == math.inf


def test_medians_are_of_the_steps_at_that_loss() -> None:
    landscapes = [study.Landscape(loss, (0, 2 * loss), (0, 3 * loss), 4 * loss) for loss in (0.1, 0.5, 1.0, 2.0, 2.2)]
    run = study.Run(0.1, landscapes=landscapes, shifts=[(1, 10), (2, 20), (6, 60)])
    assert run.typical("beta") == 4 and run.typical("range") == 2
    assert run.typical("change", (0.3, 1.8)) == pytest.approx(3 * 0.75)
    assert math.isnan(run.typical("beta", (3, 4)))
    assert (run.shift(0), run.shift(1)) == (2, 20)


def test_noise_that_is_missing_is_noticed(data: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claims on the stability of the layers' inputs hold with the noise, and fail without it."""

    def verdicts() -> list[bool]:
        runs = {kind: study.train(kind, study.COMMON_RATE, 0, data, 8, 4) for kind in (study.PLAIN, study.NOISY)}
        seed = study.Seed(runs, {})
        return [measure.claim([seed]).holds for measure in study.measures() if measure.more is study.NOISY]

    assert verdicts() == [True, True]
    monkeypatch.setattr(study, "NOISE_MEAN", 0.0)
    monkeypatch.setattr(study, "NOISE_DEVIATION", 0.0)
    monkeypatch.setattr(study, "NOISE_SPREAD", 0.0)
    assert verdicts() == [False, False]


def test_a_quick_run_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No network trains in so few steps: the claims on speed do not hold, and the exit code is 1."""
    code = study.main(quick(tmp_path))
    printed = capsys.readouterr().out
    assert code == 1 and "REGRESSION" in printed
    assert (tmp_path / "loss_landscape.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "loss_landscape.md").read_text()
    assert report.count("(0 of 1 seeds)") + report.count("(1 of 1 seeds)") == 10
    assert "a quick run" in report
