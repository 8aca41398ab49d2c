"""bench/gpu.sh where no GPU is to be seen: what needs one is skipped with the reason, and the summary says so.

The rest of it (build, registers, check) is what it runs there too: `bash bench/gpu.sh`, some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ON_A_GPU = ("tests", "planted", "memcheck", "racecheck", "synccheck", "bench", "fused", "tiny", "ncu")


def run(results: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "bench/gpu.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "RESULTS": str(results), "CUDA_VISIBLE_DEVICES": "", **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_needs_a_gpu_is_skipped_with_the_reason(tmp_path: Path) -> None:
    done = run(tmp_path, STEPS=" ".join(ON_A_GPU))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in (tmp_path / "summary.md").read_text().splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in rows] == list(ON_A_GPU)
    reason = "torch sees no GPU" if torch.version.cuda else "is built without CUDA"
    for row in rows:
        assert row[2].strip() == "skipped" and reason in row[4]


def test_no_time_left_is_a_failure(tmp_path: Path) -> None:
    """A step that was not run is not one that passed."""
    done = run(tmp_path, STEPS="check", TOTAL="1")
    assert done.returncode == 1
    assert "| check | FAILED | 0 | no time left of 1 s |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("setting", ["BENCH", "SANITIZE"])
def test_unknown_settings_are_refused(setting: str, tmp_path: Path) -> None:
    done = run(tmp_path, **{setting: "most"})
    assert done.returncode == 1 and f"{setting} is " in done.stderr and "not most" in done.stderr
