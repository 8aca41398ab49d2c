"""The catalogue of mutants matches the sources, and the runner distinguishes killed mutants from survivors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from mutants import Build, Mutant, catalogue
from mutants import __main__ as command
from mutants.runner import Outcome, Tree

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = catalogue()


@pytest.mark.parametrize("area", MUTANTS)
def test_the_catalogue_matches_the_sources(area: str) -> None:
    """Each snippet occurs once and is changed, each test file exists, and no two mutants are the same."""
    mutants = MUTANTS[area]
    for mutant in mutants:
        text = (ROOT / mutant.file).read_text()
        assert mutant.apply(text) != text, mutant.fault
        files = [argument for argument in mutant.tests if argument.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), mutant.fault
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutants}) == len(mutants)
    assert len({(mutant.file, mutant.fault) for mutant in mutants}) == len(mutants)


def test_the_catalogue_is_large_enough() -> None:
    assert sum(map(len, MUTANTS.values())) >= 80 and all(MUTANTS.values())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree of a small repository, which has nothing to build."""
    source = tmp_path / "source"
    (source / "tests").mkdir(parents=True)
    (source / "setup.py").write_text("")
    (source / "add.py").write_text("def add(a, b):\n    return a + b\n")
    test = "from add import add\ndef test_sum(): assert add(1, 1) == 2\ndef test_broken(): assert False\n"
    (source / "tests" / "test_add.py").write_text(test)
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    return Tree(tmp_path / "tree", source)


def test_the_runner(tree: Tree) -> None:
    def outcome(old: str, new: str, test: str = "test_sum", build: Build = Build.NONE) -> Outcome:
        return tree.test(Mutant("a fault", "add.py", old, new, ("tests/test_add.py", "-k", test), build))

    killed = outcome("a + b", "a - b")
    assert killed.killed_by == "tests/test_add.py::test_sum" and not killed.error
    survivor = outcome("a + b", "a * b + a")
    assert survivor.survived
    assert outcome("def add(", "def add((").killed_by
    # Inconclusive: no such snippet, tests that fail without the mutant, no such tests.
    for error, answer in (
        ("0 times", outcome("a / b", "a")),
        ("fails without the mutant", outcome("a + b", "a", "test_broken")),
        ("pytest", outcome("a + b", "a", "test_absent")),
    ):
        assert error in answer.error and not answer.survived and not answer.killed_by
    assert (tree.root / "add.py").read_text() == (tree.source / "add.py").read_text()
    text = command.render({"python": [killed, survivor]})
    assert "| python |       2 |      1 |       1 |" in text and "**survives**: ?" in text
