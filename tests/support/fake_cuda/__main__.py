"""python -m fake_cuda -m MODULE ARGUMENTS... | SCRIPT ARGUMENTS...: a Python program on the fake CUDA device.

python -m fake_cuda --missing: why there can be none here; nothing if there can.
"""

from __future__ import annotations

import os
import sys

from . import environment, missing

if sys.argv[1:] == ["--missing"]:
    print(missing() or "")
else:
    os.execve(sys.executable, [sys.executable, "-m", "fake_cuda.run", *sys.argv[1:]], {**os.environ, **environment()})
