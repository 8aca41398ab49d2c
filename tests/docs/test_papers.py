"""What the papers name exists, and what users can set is in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/compatibility.md"]


def text(*names: str) -> str:
    return "\n".join((ROOT / name).read_text() for name in names)


def test_every_environment_variable_is_documented() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "bnkernels").rglob("*.py")]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"}]
    named = {name for path in sources for name in re.findall(r"\bBNKERNELS_[A-Z_]+\b", path.read_text())}
    assert "BNKERNELS_CPU_SIMD" in named
    assert {name for name in named if f"`{name}`" not in text("README.md")} == set()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", text(*PAPERS), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named - targets == set()


def test_the_workflow_runs_what_there_is() -> None:
    """Targets of make, and options of the check."""
    workflow = text(".github/workflows/ci.yml")
    named = set(re.findall(r"\bmake ([a-z]+)", workflow))
    assert {"lint", "test", "gpu"} <= named <= set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    options = set(re.findall(r"bnkernels\.check (--[a-z]+)", workflow))
    assert {f"--{name}" for name in ("env", "quick")} == options


def test_make_alone_tells_every_target() -> None:
    makefile = text("Makefile")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    told = makefile.split("SHELL :=")[0]
    assert {target for target in phony.split() if target != "help" and target not in told} == set()


@pytest.mark.parametrize("paper", PAPERS)
def test_links_lead_somewhere(paper: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text(paper)):
        assert target.startswith("https://") or ((ROOT / paper).parent / target).exists(), target


def test_every_folder_of_the_house_is_in_the_architecture() -> None:
    architecture = text("docs/architecture.md")
    parts = [path for path in (ROOT / "bnkernels").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    parts += [path for path in (ROOT / "csrc").iterdir() if path.is_dir() or path.suffix == ".h"]
    assert {path.name for path in parts if path.name not in architecture} == set()


def test_one_version() -> None:
    import bnkernels

    assert re.fullmatch(r"\d+\.\d+\.\d+", bnkernels.__version__)
    assert bnkernels.__version__ not in text("pyproject.toml", "setup.py")
