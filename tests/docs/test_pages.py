"""The documentation names what exists, and every setting is documented."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]


def text(*names: str) -> str:
    return "\n".join((ROOT / name).read_text() for name in names)


def test_every_environment_variable_is_documented() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "bnkernels").rglob("*.py")]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"}]
    named = {name for path in sources for name in re.findall(r"\bBNKERNELS_[A-Z_]+\b", path.read_text())}
    assert "BNKERNELS_CPU_SIMD" in named
    assert {name for name in named if f"`{name}`" not in text("docs/settings.md")} == set()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", text(*PAGES), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named - targets == set()


def test_the_workflow_runs_what_there_is() -> None:
    """Targets of make, and options of the check."""
    workflow = text(".github/workflows/ci.yml")
    named = set(re.findall(r"\bmake ([a-z]+)", workflow))
    assert {"lint", "test", "gpu"} <= named <= set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    options = set(re.findall(r"bnkernels\.check (--[a-z]+)", workflow))
    assert {f"--{name}" for name in ("env", "quick")} == options


def test_make_help_lists_every_target() -> None:
    makefile = text("Makefile")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    listed = makefile.split("SHELL :=")[0]
    assert {target for target in phony.split() if target != "help" and target not in listed} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text(page)):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_every_part_is_in_the_architecture() -> None:
    architecture = text("docs/architecture.md")
    parts = [path for path in (ROOT / "bnkernels").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    parts += [path for path in (ROOT / "csrc").iterdir() if path.is_dir() or path.suffix == ".h"]
    assert {path.name for path in parts if path.name not in architecture} == set()


def test_path_of_a_call_is_short_and_exists() -> None:
    section = text("docs/architecture.md").split("## The path of a call")[1].split("## ")[0]
    files = re.findall(r"^\| `([\w./]+)` \|", section, re.MULTILINE)
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert 0 < sum(file.startswith("bnkernels/") for file in files) <= 3
    assert 0 < sum(file.startswith("csrc/") for file in files) <= 5


def test_architecture_is_short() -> None:
    assert len(text("docs/architecture.md").splitlines()) <= 250


def test_readme_is_a_landing_page() -> None:
    assert len(text("README.md").split()) <= 900


def test_every_page_is_in_the_navigation() -> None:
    assert {page for page in DOCS if f"- {Path(page).name}\n" not in text("mkdocs.yml")} == set()


def test_plot_of_the_readme_is_of_the_committed_figures() -> None:
    """The whole step's ratios come from a table of why.md, which `make why` writes."""
    pytest.importorskip("matplotlib", reason="the demo's extra is not installed")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import plot
    finally:
        sys.path.pop(0)
    for layout in ("NCHW", "channels_last"):
        ratios = plot.whole_step_ratios(plot.WHOLE_STEPS.read_text(), layout)
        assert f"step of a small ResNet, {layout} | {min(ratios):.2f} to {max(ratios):.2f} |" in text("README.md")


def test_one_version() -> None:
    import bnkernels

    assert re.fullmatch(r"\d+\.\d+\.\d+", bnkernels.__version__)
    assert bnkernels.__version__ not in text("pyproject.toml", "setup.py")


def test_the_api_page_has_every_public_name() -> None:
    import bnkernels

    listed = re.findall(r"^::: bnkernels\.([\w.]+)$", text("docs/api.md"), re.MULTILINE)
    assert sorted(name.split(".")[-1] for name in listed) == sorted({*bnkernels.__all__} - {"__version__"})
