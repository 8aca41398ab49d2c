"""Atomic replacement of files. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replaces the file atomically: a reader finds the old or the new text, even if the writer is killed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
