"""Results on disk. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader finds the old text or the new, whenever the writer is killed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
