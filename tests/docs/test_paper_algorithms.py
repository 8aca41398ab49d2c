"""The study of the paper's algorithms computes them as written, and detects results that differ."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("study_runs")

from study_runs import quick
from torch import Tensor

from bnkernels.testing.tolerance import UNIT_ROUNDOFF
from studies import paper_algorithms as study

pytestmark = pytest.mark.usefixtures("one_thread")


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


PLAIN = study.Affine(torch.ones(1).double(), torch.zeros(1).double(), 0.0)
SHIFTED = study.Affine(column(2)[0], column(5)[0], 0.0)


def test_algorithm_1_on_two_values() -> None:
    y, statistics = study.algorithm_1(column(1, 3), SHIFTED)
    assert float(statistics.mean) == 2 and float(statistics.var) == 1
    assert y.flatten().tolist() == [3, 7]


def test_algorithm_2_averages_means_and_unbiased_variances() -> None:
    """Means 2 and 5, biased variances 1 and 4, m = 2."""
    population = study.algorithm_2([column(1, 3), column(3, 7)], SHIFTED)
    assert float(population.mean) == 3.5 and float(population.var) == 5
    assert float(study.inference(column(3.5 + math.sqrt(5)), population, SHIFTED)) == pytest.approx(7)


def test_roundings_are_counted_on_the_scale_of_the_error() -> None:
    """x = -1, 1: A = 2, |x_hat| = k = 1, so the scale is 3 |gamma| + |beta|."""
    x = column(-1, 1)
    by = study.Statistics(torch.zeros(1).double(), torch.ones(1).double())
    error = 5 * UNIT_ROUNDOFF[torch.float64] * torch.ones_like(x)
    assert study.roundings(error, torch.zeros_like(x), x, x, by, PLAIN) == pytest.approx(5 / 3)
    assert study.roundings(error, torch.zeros_like(x), x, x, by, SHIFTED) == pytest.approx(5 / 11)


def test_eps_is_what_breaks_scale_invariance() -> None:
    u = torch.randn(200, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert max(study.scale_invariance(u, 0, 1e-30, (1e-3, 1.0, 1e3))) < 1e-13
    small, one = study.scale_invariance(u, 0, 1e-5, (1e-3, 1.0))
    assert small > 1e-2 and one == 0


def test_runs_and_writes_its_files(tmp_path: Path) -> None:
    """The claims are exact, so they also hold after a quick training."""
    assert study.main(quick(tmp_path)) == 0
    assert (tmp_path / "paper_algorithms.png").read_bytes().startswith(b"\x89PNG")
    assert "Algorithm 2" in (tmp_path / "paper_algorithms.md").read_text()


def test_the_biased_variance_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Algorithm 2 without its m/(m-1)."""
    right = study.algorithm_2

    def biased(mini_batches: list[Tensor], to: study.Affine) -> study.Statistics:
        m, population = len(mini_batches[0]), right(mini_batches, to)
        return study.Statistics(population.mean, population.var * (m - 1) / m)

    monkeypatch.setattr(study, "algorithm_2", biased)
    assert study.main(quick(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert printed.count("DOES NOT HOLD (0 of 1 seeds): Algorithm 2") == printed.count("DOES NOT HOLD") == 2


def test_a_layer_that_is_off_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a thousand roundings, in training and in inference."""
    right = study.bnk.BatchNorm1d.forward
    monkeypatch.setattr(study.bnk.BatchNorm1d, "forward", lambda self, x: right(self, x) * (1 + 1e-13))
    assert study.main(quick(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert all(f"DOES NOT HOLD (0 of 1 seeds): Algorithm {number}" in printed for number in "12")
    assert printed.count("DOES NOT HOLD") == 2
