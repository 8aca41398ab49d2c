"""The decisions of setup.py (whether to build CUDA, with which toolkit, for which GPUs) and its progress output.

Uses the standard library only. The versions of torch, the environment variables and the GPUs are arguments, so that
every decision can be tested with scripts that imitate nvcc (tests/tooling/test_build.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

# The architectures that the kernels support. The last one is also compiled to PTX. On GPUs newer than this list the
# driver then compiles it once, at start, instead of failing with "no kernel image is available".
SUPPORTED_ARCHS: tuple[str, ...] = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

Capability = tuple[int, int]


class BuildError(RuntimeError):
    """The build cannot continue. The message explains how to fix it."""


@dataclass(frozen=True)
class CudaBuild:
    """A CUDA build: root and version ("13.0") of the toolkit, and the architectures as in TORCH_CUDA_ARCH_LIST."""

    root: Path
    version: str
    arch_list: str


def _run(command: Sequence[str | Path]) -> str:
    """The combined stdout and stderr of a command. Raises BuildError if it cannot be run or fails."""
    try:
        done = subprocess.run(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))} failed with exit code {done.returncode}:\n{done.stdout}")
    return done.stdout


def _is_root(root: Path) -> bool:
    return os.access(root / "bin" / "nvcc", os.X_OK)


def root_of_nvcc(nvcc: Path) -> Path:
    """The root of the toolkit that an nvcc belongs to, from the TOP variable that `nvcc --dryrun` prints.

    The parent of nvcc's folder would be wrong if nvcc on PATH is a link into another folder or a wrapper script.

    Raises:
        BuildError: nvcc cannot be run, or the root has no bin/nvcc.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        printed = _run([nvcc, "--dryrun", "-c", source, "-o", Path(folder) / "empty.o"])
    top = re.search(r"^#\$ TOP=(.+)$", printed, re.MULTILINE)
    root = Path(top.group(1).strip()).resolve() if top else nvcc.resolve().parent.parent
    if not _is_root(root):
        raise BuildError(f"{nvcc} reports {root} as its toolkit, which has no bin/nvcc; set CUDA_HOME")
    return root


def find_cuda_root(environ: Mapping[str, str], standard: Path = Path("/usr/local/cuda")) -> Path | None:
    """The CUDA toolkit to build with, or None: CUDA_HOME or CUDA_PATH, then nvcc on PATH, then `standard`."""
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if named:
        if _is_root(Path(named)):
            return Path(named)
        print(f"bnkernels: ignoring CUDA_HOME={named}, which has no bin/nvcc")
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc:
        return root_of_nvcc(Path(nvcc))
    return standard.resolve() if _is_root(standard) else None


def toolkit_version(root: Path) -> str:
    """The toolkit's version as "major.minor"."""
    printed = _run([root / "bin" / "nvcc", "--version"])
    release = re.search(r"release (\d+\.\d+)", printed)
    if not release:
        raise BuildError(f"cannot find a version in the output of {root}/bin/nvcc --version:\n{printed}")
    return release.group(1)


def known_archs(root: Path) -> list[Capability]:
    """The compute capabilities that this toolkit's nvcc supports, ascending."""
    printed = _run([root / "bin" / "nvcc", "--list-gpu-arch"])
    return sorted({(int(number[:-1]), int(number[-1])) for number in re.findall(r"compute_(\d{2,3})\b", printed)})


def check_cuda_major(torch_version: str, torch_cuda: str, toolkit: str, root: Path) -> None:
    """Raises BuildError if the CUDA major versions of torch and the toolkit differ: their runtimes are incompatible."""
    wanted, have = torch_cuda.split(".")[0], toolkit.split(".")[0]
    if wanted != have:
        raise BuildError(
            f"CUDA versions differ: torch {torch_version} was built with CUDA {torch_cuda}, "
            f"the toolkit at {root} is CUDA {toolkit}.\n"
            "Either:\n"
            f"  - install the CUDA {wanted} toolkit and point CUDA_HOME at it\n"
            f"  - install a torch built with CUDA {have} (see 'Get started' on pytorch.org)\n"
            "  - build for the CPU only: FORCE_CUDA=0"
        )


def default_arch_list(known: Iterable[Capability], present: Iterable[Capability]) -> str:
    """The default of TORCH_CUDA_ARCH_LIST: the architectures of the GPUs present, else all supported ones.

    For a GPU that nvcc does not support yet, PTX of the newest supported architecture below it is used.
    """
    known = sorted(known)
    if not known:
        raise BuildError("nvcc --list-gpu-arch printed no architecture")
    chosen = {max((arch for arch in known if arch <= gpu), default=known[0]) for gpu in present}
    if not chosen:
        supported = {(int(major), int(minor)) for major, minor in (arch.split(".") for arch in SUPPORTED_ARCHS)}
        chosen = supported & set(known) or {known[-1]}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(chosen)) + "+PTX"


def wants_cuda(environ: Mapping[str, str]) -> bool | None:
    """FORCE_CUDA as True or False, or None if it is not set. Raises BuildError for any other value."""
    value = environ.get("FORCE_CUDA", "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise BuildError(f"expected FORCE_CUDA to be 1 (build CUDA or fail), 0 (CPU only) or unset, but got {value!r}")


def plan_cuda(
    environ: Mapping[str, str],
    torch_version: str,
    torch_cuda: str | None,
    present: Callable[[], Iterable[Capability]],
    standard: Path = Path("/usr/local/cuda"),
) -> CudaBuild | None:
    """The CUDA build to make, or None for the CPU only.

    The decision depends on torch's CUDA version and nvcc, not on the presence of a GPU, because machines that build
    packages have none. `present` returns the GPUs of this machine, and is called only without TORCH_CUDA_ARCH_LIST.

    Raises:
        BuildError: FORCE_CUDA=1 without CUDA in torch or without nvcc; incompatible CUDA versions; nvcc fails.
    """
    force = wants_cuda(environ)
    if force is False:
        return None
    if torch_cuda is None:
        if force:
            raise BuildError(
                f"FORCE_CUDA=1, but torch {torch_version} is built without CUDA: install torch's CUDA build first, "
                "and build without isolation (pip install --no-build-isolation)"
            )
        return None
    root = find_cuda_root(environ, standard)
    if root is None:
        if force:
            raise BuildError(
                f"FORCE_CUDA=1, but no nvcc was found: install the CUDA {torch_cuda.split('.')[0]} toolkit, "
                "and put its nvcc on PATH or set CUDA_HOME"
            )
        print(
            f"bnkernels: torch {torch_version} has CUDA {torch_cuda}, but no nvcc was found: building for the CPU only"
        )
        return None
    version = toolkit_version(root)
    check_cuda_major(torch_version, torch_cuda, version, root)
    arch_list = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not arch_list:
        arch_list = default_arch_list(known_archs(root), present())
    return CudaBuild(root, version, arch_list)


NINJA_STATUS = "[%f/%t] "
_COMPILED = re.compile(r"^(\[\d+/\d+\]) .* -c '?(?:[^']*/)?csrc/(\S+?)'? -o ")


def progress_line(line: str, seconds: float) -> str | None:
    """Shortens the line of `ninja -v` for a compiled file: "[12/31] 0:45 cuda/two_pass_f32.cu". None for others."""
    compiled = _COMPILED.match(line)
    if compiled is None:
        return None
    minutes, rest = divmod(int(seconds), 60)
    return f"{compiled[1]} {minutes}:{rest:02} {compiled[2]}"


def relay_ninja(ninja: TextIO, printed: TextIO, terminal: TextIO | None, log: TextIO | None) -> None:
    """Prints a line for each file that `ninja -v` has compiled, and its other output: warnings and errors.

    terminal: optional; also receives the progress lines.
    log: optional; receives the complete output, and then only the progress lines are printed.
    """
    started = time.monotonic()
    with ninja:
        for line in ninja:
            progress = progress_line(line, time.monotonic() - started)
            if log is not None:
                log.write(line)
            if progress is not None:
                print(progress, file=printed, flush=True)
                if terminal is not None:
                    # Overwrites the front end's spinner.
                    print(f"\r\033[K  {progress}", file=terminal, flush=True)
            elif log is None:
                print(line, end="", file=printed, flush=True)


def hidden_terminal(environ: Mapping[str, str], path: str = "/dev/tty") -> TextIO | None:
    """The terminal, if a build front end such as pip without -v hides the output; None otherwise."""
    if "_PYPROJECT_HOOKS_BUILD_BACKEND" not in environ and "PEP517_BUILD_BACKEND" not in environ:
        return None
    try:
        return open(path, "w")
    except OSError:
        return None
