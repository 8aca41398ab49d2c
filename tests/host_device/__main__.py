"""python -m host_device -m MODULE ARGUMENTS... | SCRIPT ARGUMENTS...: a Python program on the host device.

python -m host_device --missing: why there can be none here; nothing if there can.
"""

from __future__ import annotations

import os
import sys

from . import environment, missing

if sys.argv[1:] == ["--missing"]:
    print(missing() or "")
else:
    os.execve(sys.executable, [sys.executable, "-m", "host_device.run", *sys.argv[1:]], {**os.environ, **environment()})
