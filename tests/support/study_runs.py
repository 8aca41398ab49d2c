"""Shared by the tests of the studies and the demo. Importing it skips the test module without the demo extra."""

from __future__ import annotations

from pathlib import Path

import pytest

for name in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(name, reason="the demo's extra is not installed")


def quick(out: Path) -> list[str]:
    """Arguments for a few steps of a study on the CPU."""
    return ["--quick", "--seeds", "1", "--device", "cpu", "--out", str(out)]
