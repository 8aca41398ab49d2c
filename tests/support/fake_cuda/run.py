"""Started by python -m fake_cuda: runs the program with torch's operators on the fake CUDA device."""

from __future__ import annotations

import runpy
import sys

from . import attach

attach()
del sys.argv[0]
if sys.argv[:1] == ["-m"]:
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
