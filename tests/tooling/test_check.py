"""python -m bnkernels.check: its exit codes, output and JSON, and that the printed command reproduces a case."""

from __future__ import annotations

import json
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bnkernels
from bnkernels import check
from bnkernels.check import progress, report, runner
from bnkernels.testing import EPILOGUES, FAMILIES, GRADS, WEIGHTS, Case, ErrorReport, K, cases, fused_cases

ROOT = Path(__file__).resolve().parents[2]
GOOD = "normal/4x3x5x7/float32/contiguous/normal/normal/train"
HARD = "scale_1e-20/2x5x2x3x5/float32/offset/xhat/normal/train"
BatchNorm = Callable[..., Tensor]
own: BatchNorm = bnkernels.batch_norm


def run(*arguments: str) -> int:
    return check.main(["--device", "cpu", *arguments])


def plant(monkeypatch: pytest.MonkeyPatch, layer: BatchNorm) -> None:
    monkeypatch.setattr(bnkernels, "batch_norm", layer)


def wrong_eps(x: Tensor, *rest: Any) -> Tensor:
    return own(x, *rest[:-1], rest[-1] * 10)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, dict[str, Any]]:
    """One run of --quick on the CPU, as users run it: exit code, output, JSON."""
    file = tmp_path_factory.mktemp("check") / "quick.json"
    command = [sys.executable, "-m", "bnkernels.check", "--quick", "--device", "cpu", "--json", str(file)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, since the elapsed time depends on other load on the machine.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 30, "--quick must be short enough for every CI run"
    assert done.stderr == "", "stderr is not a terminal: no output, no progress bar"
    return done.returncode, done.stdout, json.loads(file.read_text())


def test_quick_passes(quick: tuple[int, str, dict[str, Any]]) -> None:
    code, printed, data = quick
    assert code == 0, printed
    assert data["passed"] is True
    assert f"cpu: ok, {len([*cases('quick'), *fused_cases('quick')])} cases within bounds" in printed


def test_table_fits_a_terminal(quick: tuple[int, str, dict[str, Any]]) -> None:
    table = [line for line in quick[1].splitlines() if "python -m" not in line]
    assert max(map(len, table)) <= 80, max(table, key=len)
    for name in (*FAMILIES, *GRADS, *WEIGHTS, *EPILOGUES[1:]):
        assert any(line.startswith(f"{name} ") for line in table), name


def test_json_schema(quick: tuple[int, str, dict[str, Any]]) -> None:
    data = quick[2]
    assert set(data) == {"format", "tier", "passed", "versions", "build", "tolerance", "backends"}
    assert (data["format"], data["tier"]) == (1, "quick")
    assert set(data["versions"]) == {"bnkernels", "torch", "cuda", "python", "platform"}
    assert data["versions"]["torch"] == torch.__version__
    assert data["build"].keys() == bnkernels.build_info().keys()
    assert data["tolerance"] == {"K": K, "report_from": 8.0}
    (backend,) = data["backends"]
    assert set(backend) == {
        *("device", "name", "passed", "stopped", "seconds", "cases", "worst", "failures"),
        *("activations", "gradients", "weights", "dtypes", "epilogues"),
    }
    assert list(backend["activations"]) == list(FAMILIES)
    assert list(backend["epilogues"]) == ["none", *EPILOGUES[1:]]
    total = backend["cases"]
    for field in ("activations", "gradients", "weights", "dtypes", "epilogues"):
        groups = backend[field]
        assert sum(group["cases"] for group in groups.values()) == total
        for group in groups.values():
            assert set(group) == {"cases", "passed", "ratio", "bnkernels", "torch"}
            worst = group["bnkernels"]["worst"]
            assert set(worst) == {"quantity", "ratio", "index", "got", "expected", "bound", "dtype"}
            assert worst["ratio"] == group["ratio"] <= backend["worst"]["ratio"]
            Case.parse(group["bnkernels"]["case"])
            Case.parse(group["torch"]["case"])
    assert backend["failures"] == []


def test_printed_command_reproduces(
    quick: tuple[int, str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that a run prints for its worst case gives the same number in another process."""
    command = quick[2]["backends"][0]["worst"]["command"]
    assert command in quick[1]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "bnkernels.check"]
    assert check.main([*words[3:], "--json", str(tmp_path / "one.json")]) == 0
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["tier"] == "case" and one["backends"][0]["cases"] == 1
    assert one["backends"][0]["worst"]["ratio"] == quick[2]["backends"][0]["worst"]["ratio"]
    assert words[-1] in capsys.readouterr().out


def test_case_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--case", GOOD, "--case", HARD) == 0
    printed = capsys.readouterr().out
    for quantity in ("y", "dx", "dweight", "dbias", "running_mean", "running_var"):
        assert printed.count(f"\n  {quantity} ") == 4, "ours and torch's, of two cases"
    assert GOOD in printed and HARD in printed
    assert max(len(line) for line in printed.splitlines() if "python -m" not in line) <= 80


def test_wrong_eps_exits_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One wrong constant. The command printed for the failure fails too, with the same number."""
    plant(monkeypatch, wrong_eps)
    assert run("--case", GOOD, "--case", HARD, "--json", str(tmp_path / "a.json")) == 1
    printed = capsys.readouterr().out
    assert "cpu: FAILED, 2 of 2 cases out of bounds" in printed
    failures = json.loads((tmp_path / "a.json").read_text())["backends"][0]["failures"]
    assert len(failures) == 2
    for failure in failures:
        assert failure["command"] in printed
        words = shlex.split(failure["command"])
        assert check.main([*words[3:], "--json", str(tmp_path / "b.json")]) == 1
        (again,) = json.loads((tmp_path / "b.json").read_text())["backends"][0]["failures"]
        assert again == failure


def test_wrong_eps_is_found_by_quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, wrong_eps)
    every_fifth = [argument for case in list(cases("quick"))[::5] for argument in ("--case", str(case))]
    assert run(*every_fifth) == 1
    assert "more" in capsys.readouterr().out.splitlines()[-1], "a few failures are printed, the rest are counted"


class Wrong:
    """Layers with correct values that break another guarantee."""

    @staticmethod
    def writes_input(x: Tensor, *rest: Any) -> Tensor:
        y = own(x, *rest)
        x.data[0] = 0.0  # not visible to autograd, like a write by a kernel
        return y

    @staticmethod
    def writes_weight(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        y = own(x, mean, var, weight, *rest)
        weight.data.mul_(2)
        return y

    @staticmethod
    def writes_beyond(x: Tensor, mean: Tensor, *rest: Any) -> Tensor:
        y = own(x, mean, *rest)
        mean.as_strided((1,), (1,), mean.storage_offset() + mean.numel()).zero_()
        return y

    @staticmethod
    def updates_in_inference(x: Tensor, mean: Tensor, *rest: Any) -> Tensor:
        y = own(x, mean, *rest)
        mean.copy_(mean + mean.abs() * 2.0**-23)  # a change within the tolerance's rounding
        return y

    @staticmethod
    def leaves_memory_unwritten(x: Tensor, *rest: Any) -> Tensor:
        scratch = torch.empty(1)
        return own(x, *rest) + (scratch.isnan() * 1e-7)

    @staticmethod
    def is_not_repeatable(x: Tensor, *rest: Any) -> Tensor:
        return own(x, *rest) * (1 + 1e-7 * torch.rand(()))

    @staticmethod
    def widens(x: Tensor, *rest: Any) -> Tensor:
        return own(x, *rest).double()

    @staticmethod
    def raises(x: Tensor, *rest: Any) -> Tensor:
        raise RuntimeError("no kernel for this")

    @staticmethod
    def writes_residual(x: Tensor, *rest: Any, residual: Tensor, activation: str | None) -> Tensor:
        y = own(x, *rest, residual=residual, activation=activation)
        residual.data.neg_()
        return y

    @staticmethod
    def hands_on_too_much(x: Tensor, *rest: Any, residual: Tensor, activation: str | None) -> Tensor:
        y = own(x, *rest, residual=residual, activation=activation)
        return y + (residual - residual.detach()) * 2.0**-20


class WrongReLU:
    """Layers whose ReLU is nearly right."""

    @staticmethod
    def is_leaky(x: Tensor, *rest: Any, residual: Tensor | None, activation: str | None) -> Tensor:
        y = own(x, *rest, residual=residual)
        return y if activation is None else torch.nn.functional.leaky_relu(y, 1e-3)

    @staticmethod
    def lets_gradients_through(x: Tensor, *rest: Any, residual: Tensor | None, activation: str | None) -> Tensor:
        y = own(x, *rest, residual=residual)
        return y if activation is None else y + (y.relu() - y).detach()

    @staticmethod
    def forgets_the_residual(x: Tensor, *rest: Any, residual: Tensor | None, activation: str | None) -> Tensor:
        return own(x, *rest, activation=activation) + (0 if residual is None else 0 * residual)


@pytest.mark.parametrize(
    ("layer", "mode", "problem"),
    [
        (Wrong.writes_input, "train", "changed its input x"),
        (Wrong.writes_weight, "train", "changed its input weight"),
        (Wrong.writes_beyond, "train", "wrote out of bounds of running_mean"),
        (Wrong.updates_in_inference, "eval", "changed running_mean in inference"),
        (
            Wrong.leaves_memory_unwritten,
            "train",
            "y differs bitwise in a repeated call, in one thread and with NaN in fresh memory",
        ),
        (Wrong.is_not_repeatable, "train", "y differs bitwise in a repeated call"),
        (Wrong.widens, "train", "expected y to be torch.float32 (4, 3, 5, 7), but got torch.float64"),
        (Wrong.raises, "train", "raised RuntimeError: no kernel for this"),
        (Wrong.writes_residual, "train/add", "changed its input residual"),
        (Wrong.hands_on_too_much, "eval/add+relu", "the residual's gradient differs from the gradient of the sum"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_promises_exit_1(
    layer: BatchNorm, mode: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = GOOD.replace("train", mode)
    assert run("--case", case) == 0, "our layer passes"
    plant(monkeypatch, layer)
    assert run("--case", case) == 1
    printed = capsys.readouterr().out
    assert problem in printed and f"--case {case}" in printed


@pytest.mark.parametrize(
    ("layer", "epilogue"),
    [
        (WrongReLU.is_leaky, "relu"),
        (WrongReLU.lets_gradients_through, "relu"),
        (WrongReLU.lets_gradients_through, "add+relu"),
        (WrongReLU.forgets_the_residual, "add"),
        (WrongReLU.forgets_the_residual, "add+relu"),
    ],
)
def test_wrong_epilogues_exit_1(
    layer: BatchNorm, epilogue: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = f"{GOOD}/{epilogue}"
    assert run("--case", case) == 0, "our layer passes"
    plant(monkeypatch, layer)
    assert run("--case", case) == 1
    printed = capsys.readouterr().out
    assert "out of bounds" in printed and f"--case {case}" in printed


def could_not_run(capsys: pytest.CaptureFixture[str], reason: str) -> None:
    printed = capsys.readouterr()
    assert printed.err.startswith("bnkernels.check could not run: ") and reason in printed.err, printed
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device", "tpu"], "no such device: tpu"),
        (["--device", "meta"], "no backend for meta"),
        (["--case", "normal"], "of 7 or 8 fields, but 'normal' has 1"),
        (["--case", GOOD.replace("normal/4", "odd/4")], "unknown distribution 'odd'"),
        (["--case", GOOD + "/sigmoid"], "unknown epilogue 'sigmoid': expected one of relu, add, add+relu"),
    ],
)
def test_bad_arguments_exit_2(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(arguments) == 2
    could_not_run(capsys, reason)


def test_unknown_option_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--fast"], ["--quick", "--full"]):
        with pytest.raises(SystemExit) as stopped:
            check.main(arguments)
        assert stopped.value.code == 2
    capsys.readouterr()


def test_no_cuda_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bnkernels, "build_info", lambda: {"with_cuda": False, "simd": "baseline"})
    assert check.main(["--device", "cuda"]) == 2
    could_not_run(capsys, "built without CUDA")
    monkeypatch.setattr(bnkernels, "build_info", lambda: {"with_cuda": True, "simd": "baseline"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["--device", "cuda"]) == 2
    could_not_run(capsys, "no usable GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check.main(["--device", "cuda:2"]) == 2
    could_not_run(capsys, "no such device: cuda:2")


def test_unwritable_json_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--case", GOOD, "--json", str(tmp_path / "missing" / "x.json")) == 2
    could_not_run(capsys, "No such file")


@pytest.mark.parametrize(
    "error",
    [MemoryError("all gone"), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")],
)
def test_out_of_memory_exits_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This includes out-of-memory errors in our own layer: a machine that is too small is no evidence about the
    numbers."""

    def layer(*arguments: Any) -> Tensor:
        raise error

    plant(monkeypatch, layer)
    assert run("--case", GOOD) == 2
    could_not_run(capsys, "out of memory")


def test_fault_of_the_check_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("in the reference")

    monkeypatch.setattr(runner, "judge_calls", broken)
    assert run("--case", GOOD) == 2
    could_not_run(capsys, "ZeroDivisionError: in the reference")


def test_fault_after_a_failure_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A faulting kernel makes all later work on its device fail; the failure found before must still be reported."""
    inputs = Case.inputs

    def faulty(case: Case, device: torch.device) -> Any:
        if str(case) == HARD:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return inputs(case, device)

    monkeypatch.setattr(Case, "inputs", faulty)
    plant(monkeypatch, wrong_eps)
    assert run("--case", GOOD, "--case", HARD, "--case", GOOD) == 1
    printed = capsys.readouterr().out
    assert "FAILED, 1 of 1 cases" in printed and f"stopped after these: {HARD}: RuntimeError: CUDA error" in printed


def check_of_a_copy(folder: Path) -> str:
    """The check's output for the package in `folder`, which cannot run."""
    done = subprocess.run(
        [sys.executable, "-m", "bnkernels.check", "--quick"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_installation_without_its_library_exits_2(tmp_path: Path) -> None:
    """The most common reason. Exit code 1 would claim that numbers are wrong."""
    shutil.copytree(ROOT / "bnkernels", tmp_path / "bnkernels", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    assert "not built" in check_of_a_copy(tmp_path)


def test_library_of_other_sources_exits_2(tmp_path: Path) -> None:
    """Sources that were updated and not recompiled: the message names the problem and the fix."""
    shutil.copytree(ROOT / "bnkernels", tmp_path / "bnkernels", ignore=shutil.ignore_patterns("__pycache__"))
    ops = tmp_path / "bnkernels" / "_ops" / "__init__.py"
    ops.write_text(ops.read_text().replace("plan = _C.plan\n", "plan = _C.plan_of_tomorrow\n"))
    printed = check_of_a_copy(tmp_path)
    assert "does not match this version of bnkernels" in printed and "plan_of_tomorrow" in printed
    assert "Rebuild bnkernels" in printed and "Traceback" not in printed


def test_json_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the JSON goes to stdout, so that it can be piped; other output goes to stderr."""
    assert run("--case", GOOD, "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["passed"] is True
    assert GOOD in printed.err


def test_json_of_nonfinite_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN and infinity are written as strings, so that any JSON parser reads the file."""
    plant(monkeypatch, lambda x, *rest: own(x, *rest) * math.nan)
    assert run("--case", GOOD, "--json", str(tmp_path / "nan.json")) == 1

    def forbidden(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads((tmp_path / "nan.json").read_text(), parse_constant=forbidden)
    assert data["backends"][0]["worst"]["ratio"] == "inf"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.0, "0.00"),
        (0.004, "<0.01"),
        (0.0712, "0.07"),
        (1.0, "1.00"),
        (17.34, "17.3"),
        (2.9e9, "2.9e+09"),
        (math.inf, "inf"),
    ],
)
def test_ratio_text(ratio: float, text: str) -> None:
    assert report.ratio_text(ratio) == text and len(text) <= 7


def test_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios from 1 are marked with ! and ratios from 0.25 with *, to stand out in the column."""

    def result(ratio: float, distribution: str) -> runner.Result:
        error_report = ErrorReport("y", ratio, (0,), 1.0, 1.0, 1.0, torch.float32)
        return runner.Result(Case(distribution, (2, 4)), (error_report,), None, ())

    results = (result(0.2, "normal"), result(0.26, "zeros"), result(1.5, "cauchy"))
    lines = report.table(report.Backend(torch.device("cpu"), "", results, 1.0)).splitlines()
    rows = {line.split()[0]: line.split() for line in lines[: lines.index("")] if line}
    assert rows["normal"][2] == "0.20" and rows["zeros"][2] == "0.26*" and rows["cauchy"][2] == "1.50!"
    assert rows["normal"][-1] == "n/a", "torch's layer did not run"


def test_own_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without tqdm: one line, rewritten in place and erased at the end; no output if stderr is not a terminal."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with progress.bar(2) as bar:
            assert isinstance(bar, progress.OneLine)
            bar.set_description_str("cpu normal", refresh=False)
            bar.update()
            bar.update()
        printed = capsys.readouterr().err
        assert (
            "2/2" in printed and "cpu normal" in printed and printed.endswith("\r") and "\n" not in printed
        ) == terminal
        assert terminal or printed == ""
