"""python -m bnkernels.check --env prints everything that a bug report needs, on any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bnkernels
from bnkernels import check
from bnkernels.check import environment


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, machine, build and SIMD level in plain text; no check runs."""
    assert check.main(["--env"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "within bounds" not in out
    lines = out.splitlines()
    assert f"bnkernels: {bnkernels.__version__}" in lines
    assert f"torch: {torch.__version__}" in lines
    assert f"torch's CUDA: {torch.version.cuda or 'none'}" in lines
    for name, value in bnkernels.build_info().items():
        assert f"  {name}: {'none' if value is None else value}" in lines
    for name in ("os", "python", "CPU", "driver", "GPUs", "compilers", "variables"):
        assert any(line.startswith(f"{name}:") for line in lines), name


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The same content as JSON, to standard output or to a file."""
    assert check.main(["--env", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["build"] == bnkernels.build_info() and found["torch"] == torch.__version__
    assert check.main(["--env", "--json", str(tmp_path / "env.json")]) == 0
    assert json.loads((tmp_path / "env.json").read_text()) == found
    assert capsys.readouterr().out == ""


def test_with_cases_it_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        check.main(["--env", "--quick"])
    assert raised.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_only_variables_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other environment variables must not be disclosed."""
    monkeypatch.setenv("BNKERNELS_PLAN", "two_pass")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    found: Any = environment.environment()["variables"]
    assert found["BNKERNELS_PLAN"] == "two_pass" and "SECRET_TOKEN" not in found


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs' output, or that they are missing, fail, or time out: a broken machine gets a report too."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    script(tmp_path / "nvcc", "echo release 13.0")
    script(tmp_path / "nvidia-smi", "echo no driver >&2; exit 9")
    script(tmp_path / "c++", "sleep 60")
    monkeypatch.setattr(environment, "_SECONDS", 0.2)
    found: Any = environment.environment()
    assert found["compilers"]["nvcc"] == f"{tmp_path}/nvcc\nrelease 13.0"
    assert found["driver"] == f"{tmp_path}/nvidia-smi\nexit code 9\nno driver"
    assert "timed out after 0.2 seconds" in found["compilers"]["c++"]
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.environment()["driver"] == "not on PATH"


def test_as_text() -> None:
    """Sections and lines are indented below their name; nothing is omitted."""
    found = {"a": 1, "b": None, "c": {"d": "e\nf"}, "g": ["h"], "i": [], "j": {}}
    assert environment.as_text(found).splitlines() == [
        "a: 1", "b: none", "c:", "  d:", "    e", "    f", "g:", "  0: h", "i: none", "j: none",
    ]  # fmt: skip
