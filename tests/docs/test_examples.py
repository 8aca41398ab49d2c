"""The short examples run as programs and print what they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def output(name: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [[], ["--autocast"]], ids=["float32", "autocast"])
def test_convert_and_train(options: list[str]) -> None:
    printed = output("convert_and_train.py", *options)
    assert "['bnkernels.modules', 'bnkernels.modules']" in printed
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 5


def test_fuse_and_export() -> None:
    printed = output("fuse_and_export.py")
    assert "2 BatchNorms fused, 1 x relu, 1 x add + relu; 0 left" in printed
    differences = [float(difference) for difference in re.findall(r"largest difference: (\S+)", printed)]
    assert len(differences) == 2 and max(differences) < 1e-5


@pytest.mark.parametrize("name", ["convert_and_train.py", "fuse_and_export.py"])
def test_examples_are_short(name: str) -> None:
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 40
