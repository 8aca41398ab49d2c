"""The study of time to accuracy: ghost batch normalisation as in the paper, and measures with known results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("study_runs")

from study_runs import quick

from studies import cifar_style_speedrun as study
from studies import speedrun_networks as networks

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def ghost(virtual_batch: int) -> networks.GhostBatchNorm2d:
    layer = networks.GhostBatchNorm2d(3, virtual_batch).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(3, generator=generator) + 0.5)
    return layer


def activations(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # Each image has its own mean, so that the statistics of virtual batches differ clearly.
    offset = torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)
    return offset + torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("count", [24, 20], ids=["whole", "last one smaller"])
def test_ghosts_normalise_each_virtual_batch_separately(count: int) -> None:
    """Outputs and all gradients are those of torch's batch_norm, virtual batch by virtual batch."""
    layer, x = ghost(8), activations(count)
    leaves = [x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    expected = torch.cat([F.batch_norm(part, None, None, *leaves[1:], training=True) for part in leaves[0].split(8)])
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((y**2 * weights).sum(), [x, *layer.parameters()])
    expected_gradients = torch.autograd.grad((expected**2 * weights).sum(), leaves)
    for a, b in zip(gradients, expected_gradients):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    whole = F.batch_norm(x, None, None, *layer.parameters(), training=True)
    assert (y - whole).abs().max() > 0.1  # unlike the statistics of the whole batch


def test_each_virtual_batch_updates_the_running_statistics() -> None:
    """(1 - p)^n r + sum_i p (1 - p)^(n - i) m_i, for means and unbiased variances."""
    layer, x, p = ghost(8), activations(24), networks.GHOST_MOMENTUM
    layer(x)
    parts = [part.transpose(0, 1).flatten(1) for part in x.split(8)]
    mean = sum(p * (1 - p) ** (3 - i) * part.mean(1) for i, part in enumerate(parts, 1))
    variance = (1 - p) ** 3 + sum(p * (1 - p) ** (3 - i) * part.var(1) for i, part in enumerate(parts, 1))
    torch.testing.assert_close(layer.bn.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bn.running_var, variance, rtol=1e-12, atol=1e-12)
    assert int(layer.bn.num_batches_tracked) == 3


def test_all_decay_equally_in_a_step() -> None:
    decay = 1 - networks.MOMENTUM
    assert decay == pytest.approx((1 - networks.GHOST_MOMENTUM) ** (study.BATCH / study.VIRTUAL))


def test_one_virtual_batch_is_batchnorm() -> None:
    """In evaluation, any number of virtual batches is BatchNorm."""
    layer, plain, x = ghost(24), networks.bnk.BatchNorm2d(3).double(), activations(24)
    plain.load_state_dict(layer.bn.state_dict())
    assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), plain.buffers()))
    few = ghost(8).eval()
    few.load_state_dict(layer.state_dict())
    assert torch.equal(few(x), plain.eval()(x))


def test_halves_share_no_image() -> None:
    """The mean and the deviation are those of the training half."""
    data, test = study.halves(CPU, 0)
    assert len(data) + len(test) == 1797 and abs(len(data) - len(test)) == 1
    assert data.images.mean().abs() < 1e-5 and abs(data.images.std() - 1) < 1e-5
    numbered = torch.cat([data.images, test.images]).flatten(1)
    assert len(numbered.unique(dim=0)) == 1797  # no scan occurs twice, so none is in both halves
    other, _ = study.halves(CPU, 1)
    assert not torch.equal(other.labels, data.labels)


def test_batches_pass_over_all_images() -> None:
    """Six batches of five of ten images: each image three times, and another order with another seed."""
    data = study.Images(torch.zeros(10, 1, 8, 8), torch.arange(10))
    seen = [batch.labels for batch in study.batches(data, 5, 6, 0)]
    assert [len(labels) for labels in seen] == [5] * 6
    assert torch.cat(seen).bincount().tolist() == [3] * 10
    again, other = (torch.cat([b.labels for b in study.batches(data, 5, 6, seed)]) for seed in (0, 1))
    assert torch.equal(torch.cat(seen), again) and not torch.equal(again, other)


def test_moved_images() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 3, 4] = 1
    places = [tuple(view[0, 0].nonzero()[0].tolist()) for view in study.shifted_views(images)]
    assert places == [(3, 4), (4, 4), (2, 4), (3, 5), (3, 3)]


def test_images_are_laid_out_as_the_kind_says() -> None:
    """Images of one channel are contiguous in both layouts: convolutions choose by the strides."""
    for layout, strides in ((torch.contiguous_format, (64, 64, 8, 1)), (torch.channels_last, (64, 1, 8, 1))):
        for images in (torch.zeros(4, 8, 8, 1).permute(0, 3, 1, 2), torch.zeros(4, 1, 8, 8)):
            assert study.to_layout(images, layout).stride() == strides
    original = study.network(study.TORCH_NORM)
    for kind in study.KINDS:
        runner = study.Runner(study.model_of(kind, original), kind.layout, 0.1, 1)
        after = runner.model.get_submodule("0.0")(study.to_layout(torch.zeros(4, 1, 8, 8), kind.layout))
        assert after.is_contiguous(memory_format=kind.layout)


def test_all_start_from_the_same_weights() -> None:
    original = study.network(study.TORCH_NORM)
    converted, ghosts = {networks.bnk.BatchNorm2d}, {networks.bnk.BatchNorm2d, networks.GhostBatchNorm2d}
    layers = {
        "nn.BatchNorm2d": {nn.BatchNorm2d},
        "converted": converted,
        "fused": converted,
        "ghost": ghosts,
        "fused + ghost": ghosts,
    }
    for kind in study.KINDS:
        model = study.model_of(kind, original)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
        classes = (nn.BatchNorm2d, networks.GhostBatchNorm2d)
        assert {type(module) for module in model.modules() if isinstance(module, classes)} == layers[kind.name]
        acts = {type(module.act) for module in model.modules() if isinstance(module, networks.GhostBatchNorm2d)}
        assert acts == {"ghost": {nn.Identity}, "fused + ghost": {nn.ReLU}}.get(kind.name, set())
        assert (model._compiled_call_impl is not None) == (kind.name == "fused")


def runner(accuracies: list[float], seconds: float) -> study.Runner:
    """A runner tested after every second step; each step takes `seconds`."""
    made = study.Runner(nn.Linear(1, 1), torch.contiguous_format, 0.1, 10)
    made.accuracies, made.tested_at = accuracies, [2 * (i + 1) for i in range(len(accuracies))]
    made.seconds = [seconds] * (2 * len(accuracies))
    return made


def test_time_to_accuracy() -> None:
    """Steps and time until the first test at the target accuracy; later tests do not matter."""
    early, late, never = runner([0.5, 0.97, 0.9], 2.0), runner([0.5, 0.6, 0.98], 1.0), runner([0.1, 0.2], 1.0)
    assert (early.steps_needed, early.seconds_needed) == (4, 8.0)
    assert (late.steps_needed, late.seconds_needed) == (6, 6.0)
    assert never.steps_needed == never.seconds_needed == math.inf
    race = study.Race({study.NN: early, study.CONVERTED: late, study.GHOST: never}, never)
    assert race.steps_apart(study.NN, study.CONVERTED) == race.steps_apart(study.CONVERTED, study.NN) == 1.5
    assert race.time_ratio(study.NN, study.CONVERTED) == pytest.approx(8 / 6)
    assert race.step_ratio(study.NN, study.CONVERTED) == 2 and race.step_ratios(study.NN, study.CONVERTED) == [2.0] * 6
    assert race.steps_apart(study.NN, study.GHOST) == race.steps_apart(study.GHOST, study.NN) == math.inf
    assert math.isnan(race.steps_apart(study.GHOST, study.GHOST))
    early.final, late.final, never.final = 0.9, 0.8, 0.1
    assert race.without_ghosts == pytest.approx(0.85)


def test_warming_leaves_the_network_as_it_is() -> None:
    data, _ = study.halves(CPU, 0)
    (batch,) = study.batches(data, 64, 1, 0)
    made = study.Runner(study.network(study.SMALL_BATCH_NORM), torch.channels_last, 0.1, 1)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.warm_up(batch)
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters()) and not made.seconds


@pytest.mark.slow
def test_a_wrong_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another eps in the converted layers the first losses disagree; in the test below they agree."""
    convert = networks.bnk.convert

    def convert_wrongly(model: nn.Module) -> nn.Module:
        for module in convert(model).modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-2
        return model

    monkeypatch.setattr(networks.bnk, "convert", convert_wrongly)
    first = next(study.claims([study.run(0, CPU, study.EVERY)]))
    assert first.measure == "relative difference of the first losses" and not first.holds


@pytest.mark.slow
def test_a_quick_run_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No network reaches the target in two steps, so the exit code is 1."""
    code = study.main(quick(tmp_path))
    printed = capsys.readouterr().out
    assert code == 1 and "REGRESSION" in printed
    assert "holds (1 of 1 seeds): Converted, the network computes the same" in printed
    assert (tmp_path / "cifar_style_speedrun.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "cifar_style_speedrun.md").read_text()
    assert report.count("(0 of 1 seeds)") + report.count("(1 of 1 seeds)") == 16
    assert "a quick run" in report
