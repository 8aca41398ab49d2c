"""docs/compatibility.md lists exactly what the tests run."""

from __future__ import annotations

from types import ModuleType

import compatibility
import pytest
from compatibility import Cell, cells


def test_page_is_current() -> None:
    """Rows that are added, dropped, renamed or run for fewer cells must change the page."""
    assert compatibility.DOCUMENT.read_text() == compatibility.page(compatibility.rows()), (
        "run: python tests/support/compatibility.py > docs/compatibility.md"
    )


def test_features_are_unique() -> None:
    named = [(row.section, row.feature) for row in compatibility.rows()]
    assert len(named) == len(set(named)) > 0


def test_row_parametrizes_its_cells() -> None:
    some = cells(training=(True,), channels_last=(True,))

    @compatibility.row("section", "feature", some)
    def test(cell: Cell) -> None: ...

    (parametrized,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    assert parametrized.args == ("cell", some)
    module = ModuleType("test_it")
    module.test = test  # type: ignore[attr-defined]
    (row,) = compatibility.rows_of(module)
    assert row.test == "test_it.py::test"
    printed = [cell.strip() for cell in compatibility.page([row]).splitlines()[-1].strip("|").split("|")]
    assert printed == ["feature", "channels_last", "channels_last", "", "", "`test_it.py::test`"]


def test_row_keeps_existing_parametrization() -> None:
    @compatibility.row("section", "feature", cells())
    @pytest.mark.parametrize("op", [1, 2])
    def test(op: int) -> None: ...

    assert [mark.name for mark in test.pytestmark] == ["parametrize", "compatibility"]
