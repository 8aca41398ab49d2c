"""The study of features of different scale: its measures agree with known results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("study_runs")

from study_runs import quick
from torch import nn

from studies import feature_scale as study

pytestmark = pytest.mark.usefixtures("one_thread")


def test_progress_with_batchnorm_is_that_of_a_quadratic() -> None:
    """Uncorrelated features of variance v / (v + eps) and a squared error: (1 - 2 lr v / (v + eps))^t remains."""
    x, y = study.regression(0, torch.device("cpu"))
    variance = x.var(0, correction=0)
    left = 1 - 2 * 0.1 * variance / (variance + 1e-5)
    expected = 1 - left ** torch.arange(21, dtype=torch.float64)[:, None]
    torch.testing.assert_close(study.descend(x, y, True, 0.1, 20).progress, expected, rtol=1e-9, atol=1e-9)


def test_without_batchnorm_it_is_stable_up_to_two_over_the_largest_curvature() -> None:
    x, y = study.regression(0, torch.device("cpu"))
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1)
    limit = 2 / float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / len(x))[-1])
    assert study.descend(x, y, False, 0.98 * limit, 200).stable
    assert not study.descend(x, y, False, 1.02 * limit, 200).stable
    assert not study.descend(x, y, False, 1e9 * limit, 200).stable  # beyond float64: NaN


def test_the_best_has_the_lowest_loss_and_of_equal_ones_the_fastest() -> None:
    def one(lr: float, *losses: float) -> study.Descent:
        return study.Descent(lr, list(losses), torch.zeros(1, 2))

    slow, fast, higher = one(0.1, 9, 5, 1), one(0.2, 9, 2, 1 + 1e-9), one(0.3, 9, 1, 2)
    diverged = [one(0.4, 9, 5, 10), one(0.5, 9, 5, float("nan"))]
    assert study.best([slow, fast, higher, *diverged]) is fast


def test_runs_and_writes_its_files(tmp_path: Path) -> None:
    assert study.main(quick(tmp_path)) == 0
    assert (tmp_path / "feature_scale.png").read_bytes().startswith(b"\x89PNG")
    assert "best learning rate" in (tmp_path / "feature_scale.md").read_text()


def test_a_layer_that_does_nothing_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.bnk, "BatchNorm1d", lambda *args, **kwargs: nn.Identity())
    assert study.main(quick(tmp_path)) == 1
    assert capsys.readouterr().out.count("DOES NOT HOLD") == 3
