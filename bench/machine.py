"""The machine, software and commit of a run."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

_GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
)


def _output(command: list[str], cwd: Path | None = None) -> str | None:
    """The output of a command, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache_bytes(default: int = 64 << 20) -> int:
    """The largest cache that Linux reports for core 0; `default` if it reports none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", entry.read_text().strip())
        if match:
            sizes.append(int(match[1]) * units.get(match[2], 1))
    return max(sizes, default=default)


def load_average() -> float | None:
    """The load average of the last minute: well above 0 at the start means a busy machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def gpu_state() -> dict[str, str] | None:
    """The first GPU's name, driver, clocks, power and temperature from nvidia-smi, which changes no setting here."""
    printed = _output(["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader", "--id=0"])
    if not printed:
        return None
    return dict(zip(_GPU_FIELDS, (value.strip() for value in printed.splitlines()[0].split(","))))


def commit() -> dict[str, Any]:
    """The commit of this checkout, and whether tracked files are modified."""
    head = _output(["git", "rev-parse", "HEAD"], cwd=ROOT)
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT)
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def build_info() -> dict[str, Any]:
    """The build information of the extension."""
    import bnkernels

    return dict(bnkernels.build_info())


def command_line(arguments: Sequence[str]) -> str:
    """The command that repeats the measurement, without the output folder."""
    repeated = []
    words = iter(arguments)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            repeated.append(word)
    return shlex.join(["python", "-m", "bench", *repeated])


_SETTINGS = re.compile(r"BNKERNELS_\w+|(OMP|GOMP|KMP|MALLOC)_\w+|GLIBC_TUNABLES|LD_PRELOAD")


def settings() -> dict[str, str]:
    """The environment variables set that affect timings: those of the package, of threads and of allocators."""
    return {name: os.environ[name] for name in sorted(os.environ) if _SETTINGS.fullmatch(name)}


def describe(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """Everything above for one run, in plain JSON types. `arguments`: those of `python -m bench`."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(arguments),
        "settings": settings(),
        **commit(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "load_average_at_start": load_average(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": build_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": int(properties.L2_cache_size),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "state_at_start": gpu_state(),
        }
    return facts


def slug(facts: dict[str, Any]) -> str:
    """A short machine name for file names, e.g. "nvidia-h200" or "amd-epyc-2-cores"."""
    if "gpu" in facts:
        name = str(facts["gpu"]["name"])
    else:
        name = f"{facts['cpu']} {facts['cores']} cores"
    name = re.sub(r"\((R|TM|C)\)|@.*?GHz|\bCPU\b|\bProcessor\b|\d+-Core", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
