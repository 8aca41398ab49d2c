"""The dependency rules of docs/architecture.md: each file includes and imports only the layers below its own.

The test of a new file fails until the file has a layer here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "bnkernels"

MAX_LINES = 500  # split a longer file

STANDARD = re.compile(r"^<[a-z_]+>$|^<std(int|def|io|lib)\.h>$|^<(imm|emm)intrin\.h>$")
TORCH = re.compile(r"^[<\"](torch|ATen|c10|pybind11)/")
CUDA_TYPES = re.compile(r"^<(cuda_fp16|cuda_bf16)\.h>$")
CUDA_RUNTIME = re.compile(r"^<cuda(_runtime|_runtime_api)?\.h>$")


@dataclass(frozen=True)
class Module:
    """A module of csrc/: the modules it may include, and external headers in addition to the standard library's."""

    below: frozenset[str]
    outside: tuple[re.Pattern[str], ...] = ()


MODULES = {
    # The problem: plain data, and arithmetic for any compiler.
    "core": Module(frozenset()),
    # The plan: every tuning number.
    "plan": Module(frozenset({"core"})),
    # The only access to the hardware. Its host twin is in tests/support/simt.
    "cuda/ptx": Module(frozenset({"core", "plan"}), (CUDA_TYPES,)),
    # The host's compiler compiles device code too: no torch, no CUDA runtime, no CUB.
    "cuda/device": Module(frozenset({"core", "plan", "cuda/ptx"})),
    "cuda/kernels": Module(frozenset({"core", "plan", "cuda/ptx", "cuda/device"})),
    # Launch sequences over any executor: CUDA's, or that of tests/support/simt.
    "cuda/launch": Module(
        frozenset({"core", "plan", "cuda/ptx", "cuda/device", "cuda/kernels", "cuda"}), (CUDA_RUNTIME, CUDA_TYPES)
    ),
    # The entry points of the CUDA backend take a stream and do not depend on torch.
    "cuda": Module(frozenset({"core", "plan", "cuda/launch"}), (CUDA_RUNTIME,)),
    # The CPU backend uses at::parallel_for of torch, and the system's memory mapping and fork handlers.
    "cpu": Module(frozenset({"core"}), (re.compile(r"^<(ATen/Parallel|sys/mman|pthread)\.h>$"),)),
    # Checks tensors and converts them to raw pointers.
    "torch": Module(frozenset({"core", "plan", "cuda", "cuda/launch", "cpu"}), (TORCH,)),
}

# ptx.cuh selects its implementation by compiler; the host's is in tests/support/simt.
HOST_BODY = ("csrc/cuda/ptx.cuh", '"simt/primitives_host.h"')

# Python, lowest layer first: a module may import those before it in this list. `reference` imports nothing.
LAYERS = (
    "reference",
    "testing",
    "_ops",
    "ranks",
    "formulas",
    "autograd",
    "errors",
    "functional",
    "modules",
    "running_stats",
    "sync",
    "fx",
    "convert",
    "explain",
    "__init__",
    "check",
    "__main__",
)
APART = {"reference": frozenset[str](), "testing": frozenset({"reference"})}


def native_files() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"})


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of_csrc(path: Path) -> str | None:
    inside = path.relative_to(CSRC)
    if inside.parts[0] == "cuda" and re.split(r"[._]", inside.name)[0] == "ptx":
        return "cuda/ptx"
    for parts in (2, 1):
        name = "/".join(inside.parts[:-1][:parts])
        if name in MODULES:
            return name
    return None


def includes(path: Path) -> list[str]:
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]+(<[^>]+>|"[^"]+")', path.read_text(), re.MULTILINE)


def violations(path: Path) -> Iterator[str]:
    """Includes of a file of csrc/ that its module must not have."""
    own = module_of_csrc(path)
    assert own is not None
    for include in includes(path):
        if (name_of(path), include) == HOST_BODY or STANDARD.match(include):
            continue
        if include.startswith('"') and not TORCH.match(include):
            target = next(
                (
                    found
                    for found in ((base / include.strip('"')).resolve() for base in (path.parent, CSRC))
                    if found.is_file()
                ),
                None,
            )
            if target is None or CSRC not in target.parents:
                yield f"{include}: no such file in csrc/"
                continue
            module = module_of_csrc(target)
            if module != own and module not in MODULES[own].below:
                yield f"{include}: {own} must not include {module}"
        elif not any(pattern.match(include) for pattern in MODULES[own].outside):
            yield f"{include}: {own} must not include this header"


@pytest.mark.parametrize("path", native_files(), ids=name_of)
def test_native_includes(path: Path) -> None:
    assert module_of_csrc(path) is not None, f"{name_of(path)} has no module: add its folder to MODULES, or move it"
    assert list(violations(path)) == []


@pytest.mark.parametrize(
    ("file", "include"),
    [
        ("cuda/kernels/x.cuh", "<torch/extension.h>"),
        ("cuda/kernels/x.cuh", "<cuda_runtime.h>"),
        ("cuda/device/x.cuh", "<cub/block/block_reduce.cuh>"),
        ("cuda/device/x.cuh", "<cuda_fp16.h>"),
        ("cuda/device/x.cuh", '"../../cpu/backend.h"'),
        ("plan/x.cpp", "<cuda_runtime.h>"),
        ("core/x.h", '"../plan/plan.h"'),
        ("core/x.h", "<ATen/ATen.h>"),
        ("cuda/x.cu", "<ATen/cuda/CUDAContext.h>"),
        ("cpu/x.cpp", "<ATen/ATen.h>"),
        ("cpu/x.cpp", '"../plan/plan.h"'),
        ("torch/x.cpp", "<cuda_fp16.h>"),
    ],
)
def test_the_check_of_includes_finds(file: str, include: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself finds each planted include that is forbidden."""
    for existing in ("plan/plan.h", "cpu/backend.h", file):
        (tmp_path / existing).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / existing).touch()
    (tmp_path / file).write_text(f"#include <cstdint>\n#include {include}\n")
    monkeypatch.setitem(globals(), "CSRC", tmp_path)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(list(violations(tmp_path / file))) == 1


def module_of(path: Path) -> str:
    """A module's name below the package; a subpackage (testing/) is one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module, path: Path) -> set[str]:
    """The package's modules, including `_C`, that a file imports anywhere."""
    inside = path.relative_to(PACKAGE).parent.parts
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".") + ["__init__"])[1] for alias in node.names if is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = [*inside[: len(inside) - (node.level - 1)], *filter(None, (node.module or "").split("."))]
            elif is_ours(node.module or ""):
                parts = (node.module or "").split(".")[1:]
            else:
                continue
            for alias in node.names:
                first = (*parts, alias.name)[0]
                found.add(first if first == "_C" or first in LAYERS else "__init__")
    return found


def is_ours(module: str) -> bool:
    return module == "bnkernels" or module.startswith("bnkernels.")


def names_ops(tree: ast.Module) -> bool:
    """Whether the code names torch.ops, however it is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "ops":
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                return True
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            if any(alias.name == "ops" for alias in node.names):
                return True
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(module == "torch.ops" or module.startswith("torch.ops.") for module in modules):
                return True
    return False


@pytest.mark.parametrize("path", python_files(), ids=name_of)
def test_python_imports(path: Path) -> None:
    own = module_of(path)
    assert own in LAYERS, f"{name_of(path)} has no layer: add it to LAYERS"
    allowed = APART.get(own, frozenset(LAYERS[: LAYERS.index(own)])) | {own}
    if own == "_ops":
        allowed |= {"_C"}
    assert imported(ast.parse(path.read_text()), path) - allowed == set()


@pytest.mark.parametrize("path", [path for path in python_files() if path.parent.name != "_ops"], ids=name_of)
def test_only_ops_names_the_extension(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not names_ops(tree), "torch.ops is named in bnkernels/_ops only"
    assert "_C" not in imported(tree, path), "_C is imported in bnkernels/_ops only"


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import bnkernels", {"__init__"}),
        ("import bnkernels._C", {"_C"}),
        ("from . import _C, _ops", {"_C", "_ops"}),
        ("from ._C import forward_train", {"_C"}),
        ("def f():\n    from bnkernels._ops import backward", {"_ops"}),
        ("from .reference import x", {"reference"}),
        ("from . import __version__", {"__init__"}),
        ("import torch", set()),
    ],
)
def test_the_check_of_imports_finds(code: str, modules: set[str]) -> None:
    assert imported(ast.parse(code), PACKAGE / "somewhere.py") == modules


@pytest.mark.parametrize(
    "code", ["torch.ops.bnkernels.f(x)", "from torch import ops", "import torch.ops", "from torch.ops import aten"]
)
def test_the_check_of_ops_finds(code: str) -> None:
    assert names_ops(ast.parse(code))


def source_files() -> list[Path]:
    found = native_files() + python_files()
    for folder in ("tests", "bench", "examples", "studies"):
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".h", ".cpp", ".cuh", ".cu"}]
    return sorted(found)


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_length(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines, more than {MAX_LINES}: split the file"
