"""Compiles the device code of csrc/cuda/**/*.cu as setup.py does. Needs nvcc, no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import build_support

ROOT = Path(__file__).resolve().parents[2]
# Kernels whose last template argument, if true, selects an epilogue or its backward.
EPILOGUES = {
    "normalize_kernel": "with epilogue",
    "grad_sums_kernel": "with ReLU",
    "grad_input_kernel": "with ReLU",
    "persistent_forward_kernel": "with epilogue",
    "persistent_backward_kernel": "with ReLU",
}
ARCHS = tuple("sm_" + arch.replace(".", "") for arch in build_support.SUPPORTED_ARCHS)

# The nvcc flags of setup.py that change machine code (tests/tooling/test_bench_tools.py compares the two), and those
# that torch's build adds for every .cu file of an extension.
CODE_FLAGS = ("-O3", "--fmad=false")
TORCH_FLAGS = (
    "-std=c++20",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
)


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


def is_arch(name: str) -> bool:
    return re.fullmatch(r"sm_\d{2,3}[af]?", name) is not None


def find_nvcc() -> Path:
    """RuntimeError if there is none."""
    root = build_support.find_cuda_root(os.environ)
    if root is None:
        raise RuntimeError("nvcc not found: put it on PATH or set CUDA_HOME")
    return root / "bin" / "nvcc"


@dataclass(frozen=True)
class Compiled:
    ptxas_log: str
    cubin: bytes


def compile_device_code(nvcc: Path, source: Path, arch: str, flags: Sequence[str] = ()) -> Compiled:
    """Compiles one source for one architecture. RuntimeError with nvcc's output if it fails."""
    target = f"arch=compute_{arch.removeprefix('sm_')},code={arch}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "device.cubin"
        command = [str(nvcc), "-cubin", *CODE_FLAGS, *TORCH_FLAGS, *flags, f"-gencode={target}", "-Xptxas", "-v"]
        command += [str(source), "-o", str(cubin)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stdout}")
        return Compiled(done.stdout, cubin.read_bytes())


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Readable names, shortened to kernel and template arguments; mangled names without c++filt."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: shorten(full) for name, full in zip(names, done.stdout.splitlines())}


def shorten(name: str) -> str:
    """ "void bnk::sum<float, (bnk::Layout)0>(bnk::Params)" -> "sum<float, (Layout)0>".

    For a kernel of EPILOGUES the last argument is replaced by words: "...>" if false, "...> with epilogue" if true.
    """
    name = re.sub(r"^void ", "", name)
    depth = 0
    for position, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            name = name[:position]
            break
    name = re.sub(r"\b\w+::", "", name)
    flagged = re.fullmatch(r"((\w+)<.*), (true|false)>", name)
    if flagged is None or flagged[2] not in EPILOGUES:
        return name
    return f"{flagged[1]}>" + (f" {EPILOGUES[flagged[2]]}" if flagged[3] == "true" else "")
