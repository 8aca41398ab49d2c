"""The demo runs, checks what it claims, and draws its plot."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("studies")

import digits

pytestmark = pytest.mark.usefixtures("one_thread")


def run(tmp_path: Path, *more: str) -> tuple[int, Path]:
    plot = tmp_path / "plots" / "digits.png"
    return digits.main(["--device", "cpu", "--plot", str(plot), *more]), plot


@pytest.mark.slow
def test_trains_above_the_required_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plot = run(tmp_path)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "FAIL" not in printed and printed.count("ok  ") == 9
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_one_epoch_agrees_but_is_not_accurate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code tells: one epoch cannot reach the accuracy, everything else holds."""
    code, plot = run(tmp_path, "--epochs", "1")
    printed = capsys.readouterr().out
    assert code == 1
    assert printed.count("FAIL") == 2 and printed.count("test accuracy of both above 97%: ") == 2
    assert all("test accuracy" in line for line in printed.splitlines() if line.startswith("FAIL"))
    assert plot.exists()


def test_a_wrong_layer_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """eps set wrong in the converted layers: the first step no longer agrees."""
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
    assert "FAIL float32: the first loss agrees" in printed
