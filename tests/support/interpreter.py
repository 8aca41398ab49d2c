"""Runs code in a new interpreter: for settings that are read once, and for code that ends its process."""

from __future__ import annotations

import os
import subprocess
import sys


def in_subprocess(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` with the tests' modules on the path, two threads, and these environment variables."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
