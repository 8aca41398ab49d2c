"""What tests of the studies and of the demo share. Without the demo's extra, importing it skips the module."""

from __future__ import annotations

from pathlib import Path

import pytest

for name in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(name, reason="the demo's extra is not installed")


def quick(out: Path) -> list[str]:
    """Arguments with which a study shows that all of it runs."""
    return ["--quick", "--seeds", "1", "--device", "cpu", "--out", str(out)]
