"""Builds the extension module bnkernels._C. Metadata is in pyproject.toml.

Environment:
  FORCE_CUDA=1|0              1: build the CUDA kernels or fail, 0: build for the CPU only (default: CUDA if torch was
                              built with CUDA and nvcc is found, whether or not a GPU is present)
  CUDA_HOME                   the CUDA toolkit (default: the one of nvcc on PATH)
  TORCH_CUDA_ARCH_LIST        e.g. "9.0" or "8.0;9.0+PTX" (default: the GPUs present, else all supported architectures)
  MAX_JOBS                    parallel compiler processes (default: ninja's, cores + 2); lower it to save memory
  BNKERNELS_PTXAS_VERBOSE=1   writes registers, shared memory and spills of each kernel to build/ptxas.log
  BNKERNELS_LINEINFO=1        source lines in the device code, for profilers and compute-sanitizer; triples its size
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # not on the path under pip's build front end

import build_support  # noqa: E402

try:
    import torch
except ImportError as error:
    raise SystemExit(
        "bnkernels must be compiled against the torch that it will run with, but this environment has no torch.\n"
        "Install torch first, then run: pip install --no-build-isolation bnkernels"
    ) from error


def capabilities_present() -> Iterable[build_support.Capability]:
    return [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]


try:
    CUDA = build_support.plan_cuda(os.environ, torch.__version__, torch.version.cuda, capabilities_present)
except build_support.BuildError as error:
    raise SystemExit(f"bnkernels: {error}") from error

if CUDA is not None:
    # torch.utils.cpp_extension reads both when imported or run. Its detection of the root fails if nvcc is a wrapper.
    os.environ["CUDA_HOME"] = str(CUDA.root)
    os.environ["TORCH_CUDA_ARCH_LIST"] = CUDA.arch_list

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

PTXAS_LOG = ROOT / "build" / "ptxas.log" if os.environ.get("BNKERNELS_PTXAS_VERBOSE") == "1" else None


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def openmp_flags() -> list[str]:
    """The compiler flags for OpenMP, without which at::parallel_for, defined in a header, runs serially.

    The flag is not passed to the linker, so that calls bind to the OpenMP runtime that torch has already loaded. A
    second runtime would have a second thread pool, which spins and competes with torch's.
    """
    return ["-fopenmp"] if sys.platform == "linux" and torch.backends.openmp.is_available() else []


def extension() -> Extension:
    # No implicit fused multiply-add, so that results are bitwise equal on every host.
    host = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
    flags = {"cxx": host + openmp_flags()}
    macros = [("BNK_BUILD_TORCH", f'"{torch.__version__}"')]
    sources = files("torch/*_unit.cpp", "plan/*.cpp", "cpu/**/*.cpp")
    headers = files("**/*.h", "**/*.cuh")
    if CUDA is None:
        return CppExtension(
            "bnkernels._C", sources, depends=headers, define_macros=macros, extra_compile_args=flags, language="c++"
        )
    flags["nvcc"] = ["-O3", "--fmad=false", "-Xcompiler", ",".join(host[2:])]
    if os.environ.get("BNKERNELS_LINEINFO") == "1":
        flags["nvcc"].append("-lineinfo")
    if PTXAS_LOG is not None:
        flags["nvcc"] += ["-Xptxas", "-v"]
    macros += [
        ("BNK_WITH_CUDA", "1"),
        ("BNK_BUILD_CUDA", f'"{CUDA.version}"'),
        ("BNK_BUILD_ARCHS", f'"{CUDA.arch_list}"'),
    ]
    return CUDAExtension(
        "bnkernels._C",
        sources + files("cuda/**/*.cu", "cuda/**/*.cpp"),
        depends=headers,
        define_macros=macros,
        extra_compile_args=flags,
    )


@contextmanager
def progress_shown(log: Path | None) -> Iterator[None]:
    """Redirects file descriptor 1 to read ninja's output, and prints a line for each compiled file.

    log: optional file for the complete output. If given, ninja's other output is not printed.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    terminal = build_support.hidden_terminal(os.environ)
    sys.stdout.flush()
    reader, writer = os.pipe()
    with ExitStack() as streams:
        printed = streams.enter_context(os.fdopen(os.dup(1), "w"))
        whole = None if log is None else streams.enter_context(log.open("w"))
        if terminal is not None:
            streams.enter_context(terminal)
        ninja = os.fdopen(reader, errors="replace")
        relay = Thread(target=build_support.relay_ninja, args=(ninja, printed, terminal, whole))
        relay.start()
        os.dup2(writer, 1)
        os.close(writer)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(printed.fileno(), 1)  # closes the pipe, which ends the relay
            relay.join()
    if log is not None:
        print(f"bnkernels: the compiler's output is in {log}")


class Build(BuildExtension):
    """torch's build_ext with cached object files and progress output."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # pip builds in a temporary folder. Keeping the objects here makes the next build incremental. Each Python and
        # torch version has its own folder, because their objects are not compatible.
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / f"objects-{tag}")

    def build_extensions(self) -> None:
        device = f"CUDA {CUDA.version} for {CUDA.arch_list} ({CUDA.root})" if CUDA else "the CPU only"
        print(f"bnkernels: building against torch {torch.__version__} for {device}", flush=True)
        os.environ["NINJA_STATUS"] = build_support.NINJA_STATUS
        with progress_shown(PTXAS_LOG):
            super().build_extensions()


setup(license="BSD-3-Clause", ext_modules=[extension()], cmdclass={"build_ext": Build})
