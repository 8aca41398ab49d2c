"""The study of deep networks: its measures agree with known results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("study_runs")

from study_runs import quick
from torch import nn

from studies import why_batchnorm as study

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("trained", "decades"),
    [("00000", 0.0), ("00100", 0.0), ("11000", 1.0), ("11011", 2.0), ("10111", 3.0), ("11111", 7.0)],
)
def test_span_is_that_of_the_longest_unbroken_run(trained: str, decades: float) -> None:
    values = [1e-3, 1e-2, 1e1, 1e2, 1e4]
    assert study.span(values, [yes == "1" for yes in trained]) == pytest.approx(decades)


def test_sweep_reads_its_curves() -> None:
    """Trained at 0.8: from the usual weights with the two lower rates, from ten times those with the highest."""
    final = {1.0: [0.8, 0.9, 0.7], 10.0: [0.1, 0.0, 0.95], 100.0: [0.1, 0.1, 0.1]}
    sweep = study.Sweep(nn.ReLU, list(final), [0.01, 0.1, 1.0], 2)
    for scale, accuracies in final.items():
        sweep.curves |= {(True, scale, lr): [0.99, accuracy] for lr, accuracy in zip(sweep.rates, accuracies)}
        sweep.curves |= {(False, scale, lr): [0.99, 0.1] for lr in sweep.rates}
    assert sweep.accuracy(True).tolist() == [pytest.approx(row) for row in final.values()]
    assert sweep.best_curve(True) == (0.1, [0.99, 0.9])
    assert sweep.highest_rate(True) == 0.1 and math.isnan(sweep.highest_rate(False))
    assert sweep.rate_span(True) == pytest.approx(1) and sweep.rate_span(False) == 0
    assert sweep.scale_span(True) == pytest.approx(1) and sweep.scale_span(False) == 0


@pytest.mark.parametrize(("activation", "gain"), [(nn.ReLU, math.sqrt(2)), (nn.Sigmoid, 1.0)], ids=["relu", "sigmoid"])
def test_both_sides_start_from_the_same_weights(activation: type[nn.Module], gain: float) -> None:
    sides = [study.network(normalised, activation, 10.0, seed=3) for normalised in study.SIDES]
    with_bn, without = ([layer for layer in side if isinstance(layer, nn.Linear)] for side in sides)
    assert len(with_bn) == len(without) == 9
    for a, b in zip(with_bn, without):
        assert torch.equal(a.weight, b.weight)
    hidden = torch.stack([layer.weight.detach() for layer in without[:-1]])
    assert float(hidden.std()) == pytest.approx(10 * gain / 8, rel=0.02)
    assert float(without[-1].weight.detach().std()) == pytest.approx(1 / 8, rel=0.1)


def test_training_that_diverges_counts_as_zero() -> None:
    data, test = study.load(torch.device("cpu"), torch.float32, 0)
    model = study.network(False, nn.ReLU, 1.0, seed=0)
    assert study.train(model, data, test, lr=1e30, epochs=3, seed=0) == [0.0]


def small() -> study.Plan:
    """A plan large enough for every claim, with shorter sweeps."""
    return study.Plan((1.0, 10.0), (0.03, 0.3), 10, 10, (0.1, 0.32, 1.0, 3.2), (0.03, 0.3), 5)


def test_a_small_sweep_shows_what_the_whole_one_does() -> None:
    claims = study.claims([study.measure(0, torch.device("cpu"), small())])
    assert [claim.holds for claim in claims] == [claim.expected for claim in claims], [str(claim) for claim in claims]


def test_layers_that_do_nothing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.bnk, "BatchNorm1d", lambda channels: nn.Identity())
    claims = study.claims([study.measure(0, torch.device("cpu"), small())])
    about_batchnorm = [claim for claim in claims if not claim.statement.startswith("Without")]
    assert len(about_batchnorm) == 4 and not any(claim.holds for claim in about_batchnorm)


def test_runs_and_writes_its_files(tmp_path: Path) -> None:
    study.main(quick(tmp_path))  # too little training for the claims
    assert (tmp_path / "why_batchnorm.png").read_bytes().startswith(b"\x89PNG")
    assert "initial scales" in (tmp_path / "why_batchnorm.md").read_text()
