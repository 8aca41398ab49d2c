"""docs/compatibility.md says what the tests run, no more and no less."""

from __future__ import annotations

from types import ModuleType

import compatibility
import pytest
from compatibility import Cell, cells


def test_the_page_is_what_the_tests_say() -> None:
    """A row that is added, dropped, renamed or run for fewer cells must change the page."""
    assert compatibility.DOCUMENT.read_text() == compatibility.page(compatibility.rows()), (
        "run: python tests/support/compatibility.py > docs/compatibility.md"
    )


def test_features_are_named_once() -> None:
    named = [(row.section, row.feature) for row in compatibility.rows()]
    assert len(named) == len(set(named)) > 0


def test_a_row_runs_for_its_cells_and_no_others() -> None:
    some = cells(training=(True,), channels_last=(True,))

    @compatibility.row("section", "feature", some)
    def test(cell: Cell) -> None: ...

    (parametrized,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    assert parametrized.args == ("cell", some)
    module = ModuleType("test_it")
    module.test = test  # type: ignore[attr-defined]
    (row,) = compatibility.rows_of(module)
    assert row.test == "test_it.py::test"
    assert "| feature | channels_last | channels_last |  |  | `test_it.py::test` |" in compatibility.page([row])


def test_a_test_with_cases_of_its_own_is_left_as_it_is() -> None:
    @compatibility.row("section", "feature", cells())
    @pytest.mark.parametrize("op", [1, 2])
    def test(op: int) -> None: ...

    assert [mark.name for mark in test.pytestmark] == ["parametrize", "compatibility"]
