"""The information that a bug report needs: machine, versions, build configuration and environment variables."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import bnkernels

VARIABLES = ("BNKERNELS_", "CUDA_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "OMP_", "MKL_", "NVIDIA_")
"""Prefixes of environment variables that affect the build or the execution."""

_COMPILERS = ("c++", "nvcc")
_SECONDS = 10.0


def environment() -> dict[str, object]:
    """The environment as strings, numbers, lists and dicts. Unavailable values contain the reason."""
    return {
        "bnkernels": bnkernels.__version__,
        "installed in": str(Path(bnkernels.__file__).parent),
        "build": bnkernels.build_info(),
        "os": _os(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "torch's cuDNN": torch.backends.cudnn.version(),
        "CPU": _processor(),
        "CPU capability of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "driver": _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "GPUs": [_gpu(index) for index in range(torch.cuda.device_count())],
        "compilers": {name: _output_of([name, "--version"]) for name in _COMPILERS},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def as_text(found: dict[str, object]) -> str:
    """Formats one `name: value` per line. Nested values and multi-line texts are indented below their names."""
    return "\n".join(_lines(found, ""))


def _lines(found: dict[str, object], indent: str) -> list[str]:
    lines = []
    for name, value in found.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, dict):
            lines.append(f"{indent}{name}: none")
        elif "\n" in str(value):
            lines += [f"{indent}{name}:", *(f"{indent}  {line}" for line in str(value).splitlines())]
        else:
            lines.append(f"{indent}{name}: {'none' if value is None else value}")
    return lines


def _os() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.platform()}"
    except (OSError, KeyError):
        return platform.platform()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} logical" if names else platform.machine()


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = f"sm_{properties.major}{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.1f} GiB"
    return f"{properties.name}, {capability}, {properties.multi_processor_count} multiprocessors, {memory}"


def _output_of(command: list[str]) -> str:
    """The output of a program, or the reason why there is none."""
    program = shutil.which(command[0])
    if program is None:
        return "not on PATH"
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}: {error}"
    text = (done.stdout if done.returncode == 0 else f"exit code {done.returncode}\n{done.stderr}").strip()
    return f"{program}\n{text}"
