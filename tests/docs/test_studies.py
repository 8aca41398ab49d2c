"""Claims, verdicts, exit codes and reports of the studies, and their insertion into docs/why.md."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the demo's extra is not installed")
pytest.importorskip("tqdm", reason="the demo's extra is not installed")

import matplotlib.pyplot as plt

from studies import study


def claim(*values: float, expected: bool = True) -> study.Claim:
    return study.Claim("Source, section 1", "It is so.", "times better", values, at_least=1.5, expected=expected)


def report(tmp_path: Path, *more: str) -> study.Report:
    args = study.parse(study.parser("A study."), ["--out", str(tmp_path / "out"), "--device", "cpu", *more])
    return study.Report("name", args)


def test_a_claim_holds_if_every_seed_meets_the_limit() -> None:
    assert claim(1.5, 2).holds and not claim(1.4, 2).holds
    assert study.Claim("s", "t", "m", [0.1, 0.2], at_most=0.2).holds
    assert not study.Claim("s", "t", "m", [0.1, 0.3], at_most=0.2).holds


def test_nan_meets_no_limit() -> None:
    """A training that diverged supports no claim."""
    assert not claim(math.nan, 2).holds
    assert not study.Claim("s", "t", "m", [math.nan], at_most=1).holds


@pytest.mark.parametrize("limits", [{}, {"at_least": 1, "at_most": 2}], ids=["none", "two"])
def test_a_claim_has_one_limit(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of at_least and at_most"):
        study.Claim("s", "t", "m", [1.0], **limits)


def test_a_claim_has_values() -> None:
    with pytest.raises(ValueError, match="one value per seed"):
        claim()


@pytest.mark.parametrize(
    ("one", "code"),
    [
        (claim(2.0), 0),
        (claim(1.0), 1),
        (claim(1.0, expected=False), 0),
        (claim(2.0, expected=False), 1),
    ],
    ids=["holds", "does not hold", "known not to hold", "holds after all"],
)
def test_exit_code_is_one_on_a_regression(
    one: study.Claim, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = report(tmp_path)
    made.claims.append(one)
    made.show("A table:", ["a", "b"], [["1", "22"], ["333", "4"]])
    assert made.finish(plt.figure()) == code
    assert (tmp_path / "out" / "name.png").read_bytes().startswith(b"\x89PNG")
    printed, written = capsys.readouterr().out, (tmp_path / "out" / "name.md").read_text()
    assert ("REGRESSION" in printed) == bool(code)
    assert one.verdict in printed and one.verdict in written
    assert "| 333 | 4   |" in printed and "| 333 | 4   |" in written


def test_reports_are_inserted_between_their_markers(tmp_path: Path) -> None:
    """A second run replaces the report; the rest of the document stays."""
    first, last = study.markers("name")
    document = tmp_path / "docs" / "why.md"
    document.parent.mkdir()
    document.write_text(f"before\n{first}\nSTALE\n{last}\nafter\n")
    for value in (2.0, 3.0):
        made = report(tmp_path)
        made.claims.append(claim(value))
        made.finish(plt.figure())
        assert study.main([str(tmp_path / "out"), str(document)]) == 0
    text = document.read_text()
    assert text.startswith(f"before\n{first}\n\n![") and text.endswith(f"\n{last}\nafter\n")
    assert "STALE" not in text and "| 3 " in text and "| 2 " not in text
    assert "](why/name.png)" in text and (document.parent / "why" / "name.png").exists()


def test_a_document_without_markers_is_refused(tmp_path: Path) -> None:
    made = report(tmp_path)
    made.claims.append(claim(2.0))
    made.finish(plt.figure())
    document = tmp_path / "why.md"
    document.write_text("nothing\n")
    with pytest.raises(ValueError, match="needs the lines"):
        study.insert_reports(tmp_path / "out", document)


def test_reports_of_quick_runs_are_refused(tmp_path: Path) -> None:
    made = report(tmp_path, "--quick")
    made.claims.append(claim(2.0))
    made.finish(plt.figure())
    document = tmp_path / "why.md"
    document.touch()
    with pytest.raises(ValueError, match="--quick"):
        study.insert_reports(tmp_path / "out", document)


def test_no_seeds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.parse(study.parser("A study."), ["--seeds", "0"])
    assert "expected 1 or more" in capsys.readouterr().err
