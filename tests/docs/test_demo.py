"""The demo runs, checks its claims, and draws its plot."""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("study_runs")

from examples import digits

pytestmark = pytest.mark.usefixtures("one_thread")


def run(tmp_path: Path, *more: str) -> tuple[int, Path]:
    plot = tmp_path / "plots" / "digits.png"
    return digits.main(["--device", "cpu", "--plot", str(plot), *more]), plot


@pytest.mark.slow
def test_trains_above_the_required_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plot = run(tmp_path)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "FAIL" not in printed and printed.count("ok  ") == 10
    assert printed.count("30 in two networks") == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_epoch_agrees_but_is_not_accurate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One epoch cannot reach the accuracy, so the exit code is 1; all other checks pass. The table is complete."""
    code, plot = run(tmp_path, "--epochs", "1")
    printed = capsys.readouterr().out
    assert code == 1
    failed = [line for line in printed.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1 and failed[0].startswith("FAIL float32: test accuracy of all three above 97%: ")
    assert plot.exists()
    header, *rows = [line.split(" | ") for line in printed.splitlines() if line.count(" | ") == 4]
    names = ["ms a step", "times as fast as nn", "saved for backward", "of it inputs of convolutions"]
    assert [cell.strip() for cell in header] == ["", *names]
    cells = {row[0].strip(): row for row in rows}
    assert list(cells) == list(digits.VARIANTS)
    for name in digits.VARIANTS:
        _, milliseconds, ratio, saved, of_convolutions = cells[name]
        low, middle, high = (float(re.findall(r"[\d.]+", milliseconds)[place]) for place in (1, 0, 2))
        assert 0 < low <= middle <= high
        assert (ratio.strip() == "") == (name == digits.NN)
        assert 0 < float(of_convolutions.removesuffix(" MB")) < float(saved.strip().removesuffix(" MB"))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_demo_installs_the_extra_along_with_torch() -> None:
    """make reads the dependencies from pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    root = Path(digits.__file__).resolve().parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    outside_of_make = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    outside_of_make.pop("INTERPRETER", None)
    command = ["make", "-n", "-C", str(root), "demo", "TORCH=torch==0"]  # an environment that does not exist
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=outside_of_make)
    (install,) = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert {*extras["demo"], *extras["bench"], '"torch==0"'} <= set(install.split())


def small(after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), after, nn.Flatten())


def test_saved_bytes_are_those_of_distinct_tensors() -> None:
    """With a ReLU output that only the ReLU saves, and one that a convolution saves as well."""
    batch = digits.Images(torch.randn(8, 1, 6, 6), torch.arange(8) % 4)
    activation, bounds = 4 * 8 * 4 * 6 * 6, 4 * 2 * 4  # bytes in float32; two ReLU bounds per channel
    for end, by_convolutions in (nn.AdaptiveAvgPool2d(1), 0), (nn.Conv2d(4, 4, 6, bias=False), activation):
        model = small(end)
        state = copy.deepcopy(model.state_dict())
        found = {
            name: digits.saved_bytes(change(copy.deepcopy(model)), batch) for name, change in digits.VARIANTS.items()
        }
        assert {inputs for _, inputs in found.values()} == {by_convolutions}
        baseline, converted, fused = (total for total, _ in found.values())
        assert 0 <= baseline - 2 * activation < 1000  # the statistics, and the tensors that the loss saves
        assert converted == baseline
        assert fused == baseline + bounds - (0 if by_convolutions else activation)
        digits.saved_bytes(model, batch)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.slow
def test_a_wrong_layer_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a wrong eps in the converted layers the first step disagrees."""
    convert = digits.bnk.convert

    def convert_wrongly(model: digits.nn.Module) -> digits.nn.Module:
        for module in convert(model).modules():
            if isinstance(module, digits.bnk.BatchNorm2d):
                module.eps = 1e-2
        return model

    monkeypatch.setattr(digits.bnk, "convert", convert_wrongly)
    code, _ = run(tmp_path, "--epochs", "1")
    assert code == 1
    printed = capsys.readouterr().out
    assert "FAIL float64: the first gradients agree" in printed
    assert "FAIL float32: the first losses agree" in printed


def test_nan_loss_is_noticed() -> None:
    """A NaN loss after one that agrees: the largest difference must propagate it."""
    race = digits.Race(torch.float64, argparse.Namespace(device=torch.device("cpu"), seed=0, batch_size=8, epochs=1))
    for start in (0, 8):
        race.step(race.data.images[start : start + 8], race.data.labels[start : start + 8])
    assert all(passed for passed, _, _ in digits.checks(race))
    race.runs[digits.FUSED].step_losses[1] = math.nan
    assert [what for passed, what, _ in digits.checks(race) if not passed] == ["the losses of all 2 steps agree"]
