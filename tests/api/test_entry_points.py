"""Entry points of pyproject.toml: torch.compile finds the backends without an import of bnkernels."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints, distribution
from pathlib import Path

import pytest
import torch
from interpreter import in_subprocess

import bnkernels as bnk
from bnkernels.fx.backend import BACKENDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it to Python 3.10

ROOT = Path(__file__).resolve().parents[2]
GROUP = "torch_dynamo_backends"


def declared() -> list[EntryPoint]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [EntryPoint(name, value, GROUP) for name, value in project["entry-points"][GROUP].items()]


def installed() -> EntryPoints:
    return distribution("bnkernels").entry_points.select(group=GROUP)


def test_all_backends_are_declared() -> None:
    """Each declared entry point is a backend of this package, and none is missing."""
    assert {entry.name: entry.load() for entry in declared()} == BACKENDS


@pytest.mark.parametrize("entry", declared(), ids=lambda entry: entry.name)
def test_each_backend_is_registered(entry: EntryPoint) -> None:
    """torch's registry has, under its name, the function that the entry point loads."""
    backend = entry.load()
    assert callable(backend)
    assert entry.name in torch._dynamo.list_backends(exclude_tags=())
    assert torch._dynamo.lookup_backend(entry.name) is backend


def test_installed_entry_points() -> None:
    """The installed metadata match pyproject.toml."""
    try:
        found = installed()
    except ModuleNotFoundError:
        pytest.skip("bnkernels is not installed")
    if not found:
        pytest.skip("this environment's bnkernels was installed, editable, before there were entry points")
    assert {(entry.name, entry.value) for entry in found} == {(entry.name, entry.value) for entry in declared()}


USE = f"""
import sys, torch
from torch import nn
names = {[entry.name for entry in declared()]!r}
assert [name for name in torch.compiler.list_backends() if name.startswith("bnkernels")] == names
assert "bnkernels" not in sys.modules
model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
x = torch.randn(4, 3, 2, 2)
torch.testing.assert_close(torch.compile(model, backend="bnkernels")(x), model(x))
backends = sys.modules["bnkernels.fx.backend"].BACKENDS
assert {{name: torch._dynamo.lookup_backend(name) for name in names}} == backends
"""


def test_torch_finds_backends_of_installed_package(tmp_path: Path) -> None:
    """In a process that imports only torch: the name is listed, and using it imports the package."""
    metadata = tmp_path / f"bnkernels-{bnk.__version__}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bnkernels\nVersion: {bnk.__version__}\n")
    lines = [f"[{GROUP}]", *(f"{entry.name} = {entry.value}" for entry in declared())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    done = in_subprocess(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT)!r})\n{USE}")
    assert done.returncode == 0, done.stderr
