"""What setup.py decides before anything is compiled: is CUDA built, with which toolkit, for which GPUs;
and what it prints while ninja compiles.

Standard library only, and nothing is read but the arguments: torch's versions, the environment and the GPUs are handed
in, so that every decision is tested with scripts that play nvcc (tests/tooling/test_build.py).
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

# Every architecture that the kernels are written and compiled for; the last one also goes in as PTX, so that GPUs newer
# than the list start with a one-time compilation by the driver instead of "no kernel image is available".
SUPPORTED_ARCHS: tuple[str, ...] = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

Capability = tuple[int, int]


class BuildError(RuntimeError):
    """The build cannot go on; the message says what to change."""


@dataclass(frozen=True)
class CudaBuild:
    """A CUDA build: the toolkit's root, its version ("13.0"), and a list in the form of TORCH_CUDA_ARCH_LIST."""

    root: Path
    version: str
    arch_list: str


def _run(command: Sequence[str | Path]) -> str:
    """stdout and stderr of a command as one text; BuildError if it cannot be run or fails."""
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
    """The toolkit that an nvcc belongs to, as nvcc itself tells.

    The parent of nvcc's folder is a guess that fails where nvcc on PATH is a link into another folder or a wrapper
    script; `nvcc --dryrun` prints the root that it will use as TOP.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        printed = _run([nvcc, "--dryrun", "-c", source, "-o", Path(folder) / "empty.o"])
    top = re.search(r"^#\$ TOP=(.+)$", printed, re.MULTILINE)
    root = Path(top.group(1).strip()).resolve() if top else nvcc.resolve().parent.parent
    if not _is_root(root):
        raise BuildError(f"{nvcc} says that its toolkit is {root}, but there is no bin/nvcc in it; set CUDA_HOME")
    return root


def find_cuda_root(environ: Mapping[str, str], standard: Path = Path("/usr/local/cuda")) -> Path | None:
    """The CUDA toolkit to build with, or None: CUDA_HOME (CUDA_PATH), then nvcc on PATH, then the standard place."""
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if named:
        if _is_root(Path(named)):
            return Path(named)
        print(f"bnkernels: CUDA_HOME={named} holds no bin/nvcc and is not used")
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc:
        return root_of_nvcc(Path(nvcc))
    return standard.resolve() if _is_root(standard) else None


def toolkit_version(root: Path) -> str:
    """The toolkit's version as "major.minor"."""
    printed = _run([root / "bin" / "nvcc", "--version"])
    release = re.search(r"release (\d+\.\d+)", printed)
    if not release:
        raise BuildError(f"no version in what {root}/bin/nvcc --version printed:\n{printed}")
    return release.group(1)


def known_archs(root: Path) -> list[Capability]:
    """The compute capabilities that this toolkit's nvcc compiles for, ascending."""
    printed = _run([root / "bin" / "nvcc", "--list-gpu-arch"])
    return sorted({(int(number[:-1]), int(number[-1])) for number in re.findall(r"compute_(\d{2,3})\b", printed)})


def check_cuda_major(torch_version: str, torch_cuda: str, toolkit: str, root: Path) -> None:
    """BuildError if torch and the toolkit are of different CUDA major versions: the two runtimes do not mix."""
    wanted, have = torch_cuda.split(".")[0], toolkit.split(".")[0]
    if wanted != have:
        raise BuildError(
            f"CUDA versions differ: torch {torch_version} was built with CUDA {torch_cuda}, "
            f"the toolkit at {root} is CUDA {toolkit}.\n"
            "Do one of:\n"
            f"  - install the CUDA {wanted} toolkit and point CUDA_HOME at it\n"
            f"  - install a torch built with CUDA {have} (see 'Get started' on pytorch.org)\n"
            "  - build for the CPU only: FORCE_CUDA=0"
        )


def default_arch_list(known: Iterable[Capability], present: Iterable[Capability]) -> str:
    """The architectures to compile for where TORCH_CUDA_ARCH_LIST does not say: of the GPUs here, else all supported.

    A GPU newer than nvcc knows is served by PTX of the newest architecture that nvcc does know below it.
    """
    known = sorted(known)
    if not known:
        raise BuildError("nvcc --list-gpu-arch names no architecture")
    chosen = {max((arch for arch in known if arch <= gpu), default=known[0]) for gpu in present}
    if not chosen:
        supported = {(int(major), int(minor)) for major, minor in (arch.split(".") for arch in SUPPORTED_ARCHS)}
        chosen = supported & set(known) or {known[-1]}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(chosen)) + "+PTX"


def wants_cuda(environ: Mapping[str, str]) -> bool | None:
    """FORCE_CUDA as True, False or None where it is not set."""
    value = environ.get("FORCE_CUDA", "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise BuildError(f"FORCE_CUDA is 1 (build CUDA, or fail), 0 (CPU only) or not set, not {value!r}")


def plan_cuda(
    environ: Mapping[str, str],
    torch_version: str,
    torch_cuda: str | None,
    present: Callable[[], Iterable[Capability]],
    standard: Path = Path("/usr/local/cuda"),
) -> CudaBuild | None:
    """The CUDA build to make, or None for the CPU only.

    What decides is torch's CUDA version and nvcc, never a GPU: machines that build packages have none. `present` is
    called only where TORCH_CUDA_ARCH_LIST is not set.
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
    """Of a line that `ninja -v` prints for a compiled file: "[12/31] 0:45 cuda/two_pass_f32.cu". None for any other."""
    compiled = _COMPILED.match(line)
    if compiled is None:
        return None
    minutes, rest = divmod(int(seconds), 60)
    return f"{compiled[1]} {minutes}:{rest:02} {compiled[2]}"


def relay_ninja(ninja: TextIO, printed: TextIO, terminal: TextIO | None, log: TextIO | None) -> None:
    """Prints a line for each file that `ninja -v` has compiled, and what else it writes: warnings and errors.

    terminal: where those lines go as well. log: gets all of the output as it is; then nothing else is printed of it.
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
                    # Over what the front end last wrote there: that it is still running.
                    print(f"\r\033[K  {progress}", file=terminal, flush=True)
            elif log is None:
                print(line, end="", file=printed, flush=True)


def hidden_terminal(environ: Mapping[str, str], path: str = "/dev/tty") -> TextIO | None:
    """The terminal, where there is one and a build front end keeps what is printed from it: pip does without -v."""
    if "_PYPROJECT_HOOKS_BUILD_BACKEND" not in environ and "PEP517_BUILD_BACKEND" not in environ:
        return None
    try:
        return open(path, "w")
    except OSError:
        return None
