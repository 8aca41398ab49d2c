"""docs/compatibility.md and the tests that it is made of: `python tests/support/compatibility.py >
docs/compatibility.md`.

A test becomes a row by its decorator:

    @row("Automatic mixed precision", "autocast, 16-bit inputs", cells(compiled=(False, True)))
    def test_autocast(cell: Cell) -> None: ...

It then runs once for each cell, and the cells that it runs for are what the page says. A test that has its cases by
other means takes no `cell`; it then has to cover what it names.
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
DOCUMENT = TESTS.parent / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Cell:
    """One way of using a layer."""

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
        """The same without a compiler."""
        return replace(self, compiled=False)

    def laid_out(self, x: Tensor) -> Tensor:
        """A 4-D tensor in the cell's memory format."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def prepared(self, model: nn.Module, backend: str = "aot_eager") -> Callable[..., Any]:
        """The model in the cell's mode and memory format, and compiled without a graph break if the cell says so.

        aot_eager traces, functionalises and partitions as torch.compile always does, and leaves out the generation of
        code, which takes seconds a model.
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
    """Makes a test a row of the page, and runs it for each of the cells."""

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
    """In the order of the file."""
    for name, test in vars(module).items():
        for mark in getattr(test, "pytestmark", ()):
            if mark.name == "compatibility":
                yield Row(**mark.kwargs, test=f"{module.__name__}.py::{name}")


def rows() -> list[Row]:
    """Of every file of tests that says `from compatibility import`."""
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
        lines += [f"\n## {section}\n"]
        lines += [
            "| | train, eager | train, compiled | eval, eager | eval, compiled | test |",
            "|---|---|---|---|---|---|",
        ]
        for each in its:
            marks = (
                _LAYOUTS[frozenset(c.channels_last for c in each.cells if (c.training, c.compiled) == which)]
                for which in ((True, False), (True, True), (False, False), (False, True))
            )
            lines.append(f"| {each.feature} | {' | '.join(marks)} | `{each.test}` |")
        notes = [f"- {each.feature}: {each.note}" for each in its if each.note]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
# What bnkernels works with

Each row is a test of that name in `tests/`, run by `make test`, or `make test-slow`, for exactly the cells that are
filled. This page is made from the tests, `python tests/support/compatibility.py > docs/compatibility.md`, and a test
compares the two.

- **yes**: contiguous and channels_last tensors. Otherwise the one that is named. An empty cell is not tested, or has no
  meaning.
- **compiled** is `torch.compile(fullgraph=True)`. Rows that name inductor run it, and so does AOTInductor; the others
  use the backend `aot_eager`, which traces and differentiates in the same way and generates no code.
- **CUDA graphs**, and every other row with CUDA tensors, run on the fake CUDA device (`tests/support/fake_cuda`) where
there is no
  GPU. On a GPU they have not run yet.
- What needs a package that is not installed (torchvision, timm, transformers, torchao, onnx, onnxscript, onnxruntime)
  is skipped, with the reason."""


def main() -> None:
    sys.stdout.write(page(rows()))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))  # the package of this repository, installed or not
    main()
