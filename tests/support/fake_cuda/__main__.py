"""python -m fake_cuda -m MODULE ARGUMENTS... | SCRIPT ARGUMENTS...: runs a Python program on the fake CUDA device.

python -m fake_cuda --missing: prints why the device is unavailable here, or nothing if it is available.
"""

from __future__ import annotations

import os
import sys

from . import environment, missing

if sys.argv[1:] == ["--missing"]:
    print(missing() or "")
else:
    os.execve(sys.executable, [sys.executable, "-m", "fake_cuda.run", *sys.argv[1:]], {**os.environ, **environment()})
