"""docs/known-bugs.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "known-bugs.md").read_text()


def test_rows_name_existing_tests() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not re.match(r"\| bug|\|---", line)]
    assert rows
    functions = {
        f"{path.name}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in rows:
        named = re.findall(r"`(test_\w+\.py::\w+)`", row)
        assert named, f"no test: {row}"
        assert set(named) <= functions, sorted(set(named) - functions)
