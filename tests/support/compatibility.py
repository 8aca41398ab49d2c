"""Generates docs/compatibility.md from the tests: `python tests/support/compatibility.py > docs/compatibility.md`.

The decorator `row` makes a test a row of the page:

    @row("Automatic mixed precision", "autocast, 16-bit inputs", cells(compiled=(False, True)))
    def test_autocast(cell: Cell) -> None: ...

The test then runs once per cell, and the page shows those cells. A test that takes no `cell` has its own parameters and
must cover the cells it names.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS.parent))  # for `bench`, when this file is run as a script
from bench.markdown import table  # noqa: E402

DOCUMENT = TESTS.parent / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Cell:
    """One way to run a layer."""

    training: bool
    compiled: bool
    channels_last: bool

    def __str__(self) -> str:
        words = (
            "train" if self.training else "eval",
            "compiled" if self.compiled else "eager",
            "channels_last" if self.channels_last else "contiguous",
        )
        return "-".join(words)

    @property
    def eager(self) -> Cell:
        """The same cell, not compiled."""
        return replace(self, compiled=False)

    def laid_out(self, x: Tensor) -> Tensor:
        """A 4-D tensor in the cell's memory format."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def prepared(self, model: nn.Module, backend: str = "aot_eager") -> Callable[..., Any]:
        """The model in the cell's mode and memory format, compiled without graph breaks if the cell is compiled.

        aot_eager traces, functionalizes and partitions like torch.compile's default backend, and skips code generation,
        which takes seconds per model.
        """
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.train(self.training)
        if not self.compiled:
            return model
        torch.compiler.reset()
        return torch.compile(model, backend=backend, fullgraph=True)


TRAIN_AND_EVAL = (True, False)
WITHOUT_AND_WITH = (False, True)


def cells(
    training: Iterable[bool] = TRAIN_AND_EVAL,
    compiled: Iterable[bool] = WITHOUT_AND_WITH,
    channels_last: Iterable[bool] = WITHOUT_AND_WITH,
) -> tuple[Cell, ...]:
    """All combinations."""
    return tuple(Cell(*values) for values in itertools.product(training, compiled, channels_last))


def row(section: str, feature: str, cells: tuple[Cell, ...], note: str = "") -> Callable[[Any], Any]:
    """Marks a test as a row of the page and parametrizes it with the cells."""

    def decorate(test: Any) -> Any:
        test = pytest.mark.compatibility(section=section, feature=feature, cells=cells, note=note)(test)
        if "cell" in inspect.signature(test).parameters:
            test = pytest.mark.parametrize("cell", cells, ids=str)(test)
        return test

    return decorate


@dataclass(frozen=True)
class Row:
    section: str
    feature: str
    cells: tuple[Cell, ...]
    note: str
    test: str


def rows_of(module: Any) -> Iterator[Row]:
    """Rows of a module, in the order of the file."""
    for name, test in vars(module).items():
        for mark in getattr(test, "pytestmark", ()):
            if mark.name == "compatibility":
                yield Row(**mark.kwargs, test=f"{module.__name__}.py::{name}")


def rows() -> list[Row]:
    """Rows of every test file that has `from compatibility import`."""
    files = sorted(TESTS.rglob("test_*.py"), key=lambda path: path.name)
    files = [path for path in files if "\nfrom compatibility import" in path.read_text()]
    sys.path += [folder for folder in dict.fromkeys(str(path.parent) for path in files) if folder not in sys.path]
    return [row for path in files for row in rows_of(importlib.import_module(path.stem))]


_LAYOUTS = {
    frozenset((False, True)): "yes",
    frozenset((False,)): "contiguous",
    frozenset((True,)): "channels_last",
    frozenset[bool](): "",
}


def page(rows: Iterable[Row]) -> str:
    sections: dict[str, list[Row]] = {}
    for each in rows:
        sections.setdefault(each.section, []).append(each)
    lines = [_INTRODUCTION]
    for section, its in sections.items():
        cells = []
        for each in its:
            marks = (
                _LAYOUTS[frozenset(c.channels_last for c in each.cells if (c.training, c.compiled) == which)]
                for which in ((True, False), (True, True), (False, False), (False, True))
            )
            cells.append([each.feature, *marks, f"`{each.test}`"])
        header = ["", "train, eager", "train, compiled", "eval, eager", "eval, compiled", "test"]
        lines += [f"\n## {section}\n", table(header, cells, left=len(header))]
        notes = [f"- {each.feature}: {each.note}" for each in its if each.note]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
# What bnkernels works with

Each row is a test in `tests/`, which `make test` or `make test-slow` runs for exactly the filled cells. This page is
generated from the tests by `python tests/support/compatibility.py > docs/compatibility.md`, and a test compares
the two.

- **yes**: contiguous and channels_last tensors. A cell that names a memory format is tested in that one. An empty cell
  is not tested, or has no meaning.
- **compiled** is `torch.compile(fullgraph=True)`. Rows that name inductor use it, as does AOTInductor. The others use
  the backend `aot_eager`, which traces and differentiates in the same way but generates no code.
- **CUDA graphs**, and every other row with CUDA tensors, run on the fake CUDA device (`tests/support/fake_cuda`) if no
  GPU is present. They have not run on a GPU yet.
- A test that needs a missing package (torchvision, timm, transformers, torchao, onnx, onnxscript, onnxruntime) is
  skipped, with the reason."""


def main() -> None:
    sys.stdout.write(page(rows()))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))  # import this repository's package, installed or not
    main()
