"""The study of PhaseDNN: bands, shifts, errors, the vmapped step, and detection of planted faults."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("study_runs")

from study_runs import quick

from studies import phase_dnn
from studies.phase_dnn import BANDS, CENTRES, POINTS, WAVES, grid

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.mark.parametrize("waves", [1, WAVES, WAVES + 1, BANDS * WAVES])
def test_a_wave_is_one_slow_exponential_in_its_band(waves: int) -> None:
    """cos(w x + p), shifted: exp(i ((w - w_k) x + p)) in band k, nothing in the others; also at the edges of bands."""
    x, phase, band = grid(POINTS), 0.7, (waves - 1) // WAVES
    expected = torch.zeros(BANDS, POINTS, dtype=torch.complex128)
    expected[band] = torch.exp(1j * ((waves - CENTRES[band]) * x + phase))
    torch.testing.assert_close(phase_dnn.shifted_bands(torch.cos(waves * x + phase)), expected)
    assert abs(waves - CENTRES[band]) <= (WAVES - 1) / 2  # a low frequency


def test_frequencies_outside_of_the_bands_are_left_out() -> None:
    """A constant and a wave that is too fast."""
    outside = 3 + torch.cos((BANDS * WAVES + 1) * grid(POINTS))
    torch.testing.assert_close(phase_dnn.spectrum(outside), torch.zeros(BANDS, WAVES, dtype=torch.complex128))


def test_shifting_back_gives_the_function() -> None:
    """Also between the points of the bands: exact predictions have no error."""
    target = phase_dnn.Target(0, CPU)
    bands = torch.view_as_complex(target.bands) * target.scale
    torch.testing.assert_close(phase_dnn.shifted_back(bands, target.x), target.f)
    torch.testing.assert_close(target.bands.square().sum(2).mean(1), torch.ones(BANDS, dtype=torch.float64))
    exact = torch.einsum("kw,kwn->kn", phase_dnn.spectrum(target.f), phase_dnn.waves(target.x_test))
    exact = exact * torch.exp(-1j * CENTRES * target.x_test)
    assert phase_dnn.band_errors(phase_dnn.shifted_back(exact, target.x_test), target.f_test).max() < 1e-12


def test_errors_by_band() -> None:
    """A prediction with half of one band, none of another, and all of the others."""
    target = phase_dnn.Target(0, CPU)
    predicted = torch.ones(BANDS, 1, dtype=torch.float64)
    predicted[2], predicted[5] = 0.5, 0
    each = torch.view_as_complex(target.bands) * target.scale
    errors = phase_dnn.band_errors(phase_dnn.shifted_back(each * predicted, target.x), target.f)
    torch.testing.assert_close(errors, 1 - predicted.flatten())


def test_when_a_band_is_learned() -> None:
    """The first record at or below the limit; infinite if none, so the ratio is infinite or NaN."""
    errors = torch.ones(3, BANDS, dtype=torch.float64)
    errors[1:, : BANDS // 2] = errors[2:, BANDS // 2 :] = phase_dnn.LEARNED
    training = phase_dnn.Training([10, 20, 30], errors, torch.zeros(1), 1.0, 1)
    assert training.learned.tolist() == [20.0] * (BANDS // 2) + [30.0] * (BANDS // 2)
    assert training.lag == 1.5
    errors[:, -1] = 1
    assert training.lag == math.inf and training.worst == 1
    errors[:] = 1
    assert math.isnan(training.lag)  # NaN meets no limit


def test_the_plain_network_has_no_fewer_parameters() -> None:
    for shifted, plain in ((phase_dnn.PHASE, phase_dnn.PLAIN), (phase_dnn.PHASE_WITHOUT, phase_dnn.PLAIN_WITHOUT)):
        many, one = (sum(map(phase_dnn.size, phase_dnn.networks(kind))) for kind in (shifted, plain))
        assert many <= one < 1.05 * many


def test_one_vmapped_step_is_many_separate_ones() -> None:
    """Parameters, running statistics and counters agree up to rounding."""
    assert phase_dnn.compare_steps(phase_dnn.Target(0, CPU), torch.float64)[0] <= 1e-12


@pytest.mark.parametrize("name", ["0.weight", "3.running_mean", "6.num_batches_tracked"])
def test_an_ensemble_that_differs_in_one_network_is_noticed(name: str) -> None:
    """A difference of 1e-9 in a weight or a statistic, of 1 in a counter, and NaN are detected."""
    models = phase_dnn.networks(phase_dnn.PHASE)
    ensemble = phase_dnn.Ensemble(models, 0.01)
    x, targets = torch.linspace(-1, 1, 8)[:, None], torch.ones(BANDS, 8, 2)
    ensemble.step(x, targets)
    for index, model in enumerate(models):
        model.load_state_dict({n: t[index] for n, t in {**ensemble.parameters, **ensemble.buffers}.items()})
        model.double()
    assert phase_dnn.largest_difference(ensemble, models) == 0
    tensor = models[3].state_dict()[name]
    tensor += 1 if name.endswith("tracked") else 1e-9
    assert phase_dnn.largest_difference(ensemble, models) > 1e-10
    if tensor.is_floating_point():
        tensor.fill_(math.nan)
        assert math.isnan(phase_dnn.largest_difference(ensemble, models))


def test_statistics_that_the_networks_share_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters agree, as training does not use the running statistics; the statistics differ."""
    target = phase_dnn.Target(0, CPU)
    step = phase_dnn.Ensemble.step

    def step_and_mix(self: phase_dnn.Ensemble, x: torch.Tensor, targets: torch.Tensor) -> None:
        step(self, x, targets)
        for buffer in self.buffers.values():
            buffer.copy_(buffer.double().mean(0, keepdim=True).expand_as(buffer))

    monkeypatch.setattr(phase_dnn.Ensemble, "step", step_and_mix)
    assert phase_dnn.compare_steps(target, torch.float64)[0] > 1e-3


def test_phases_of_the_wrong_sign_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bands shifted up instead of down, PhaseDNN does not learn them."""
    target = phase_dnn.Target(0, CPU)
    right = phase_dnn.train(phase_dnn.PHASE, target, 40)
    monkeypatch.setattr(phase_dnn, "CENTRES", -CENTRES)
    wrong = phase_dnn.train(phase_dnn.PHASE, phase_dnn.Target(0, CPU), 40)
    assert right.errors[-1, -1] < 0.5 < 0.9 < wrong.errors[-1, -1]


def test_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too few steps to learn anything: the verdicts and the exit code report it; both files are written."""
    assert phase_dnn.main(quick(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert (
        printed.count("REGRESSION: does not hold") >= 2
        and "REGRESSION: does not hold, unlike docs/why.md: PhaseDNN" in printed
    )
    assert (tmp_path / "phase_dnn.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "phase_dnn.md").read_text()
    assert all(kind.name in report for kind in phase_dnn.KINDS) and "a quick run" in report
