"""bnkernels.explain and python -m bnkernels.explain report the launch plan, on machines with and without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bnkernels as bnk
from bench import shapes
from bnkernels import _ops as ops
from bnkernels.explain import cli, devices
from bnkernels.explain.devices import NAMED
from bnkernels.explain.spec import spec_of

SHAPE = (256, 64, 112, 112)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNKERNELS_PLAN", raising=False)


def raw(outer: int, channels: int, inner: int, dtype: str, pass_: str, device: str) -> dict[str, Any]:
    return ops.plan(outer, channels, inner, dtype, pass_, True, **NAMED[device].limits.arguments())


# The report agrees with the plan


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False])
def test_values_match_the_plan(layout: str, training: bool) -> None:
    explanation = bnk.explain(SHAPE, dtype="bf16", layout=layout, device="h200", training=training)
    outer, inner = (256, 112 * 112) if layout == "nchw" else (256 * 112 * 112, 1)
    for direction, plan in zip(("forward", "backward"), explanation.passes):
        expected = raw(outer, 64, inner, "bfloat16", f"{direction}_{'train' if training else 'eval'}", "h200")
        report = json.loads(json.dumps(plan.as_json()))
        assert {name: report[name] for name in expected} == expected
        assert plan.ratio == sum(expected["predicted"].values()) / sum(expected["floor"].values())
        assert plan.seconds == sum(expected["predicted"].values()) / 4.8e12
        if expected["persistent"] is not None:
            assert plan.launches == 1
            assert plan.on_chip == expected["persistent"]["grid"] * expected["persistent"]["shared_bytes"]
        else:
            assert plan.launches == (1 if plan.name == "forward_eval" else 3)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_named_device_has_plans_for_resnet50(name: str) -> None:
    limits = NAMED[name].limits
    assert limits.shared_per_block <= limits.shared_per_multiprocessor
    for layer in shapes.resnet50():
        for batch in (32, 256):
            for layout in ("nchw", "nhwc"):
                explanation = bnk.explain(layer.input_shape(batch), dtype=torch.bfloat16, layout=layout, device=name)
                text = str(explanation)
                assert NAMED[name].title in text and "not a measurement" in text
                for plan in explanation.passes:
                    assert 1 <= plan.ratio <= 5 / 3
                    assert plan.seconds is not None and plan.seconds > 0
                    assert {"persistent": "persistent kernel", "two_pass": "two-pass path"}[plan.path] in text


def test_slices_have_a_part_of_their_gpu() -> None:
    for name, device in NAMED.items():
        whole = next(
            (
                NAMED[gpu]
                for gpu in NAMED
                if "MIG" in device.title and device.title.startswith(f"{NAMED[gpu].title} MIG")
            ),
            None,
        )
        if whole is not None:
            assert name.startswith(whole.name)
            assert device.limits.multiprocessors <= whole.limits.multiprocessors
            assert device.bandwidth is not None and whole.bandwidth is not None
            assert device.bandwidth <= whole.bandwidth


def test_summary_text() -> None:
    text = str(bnk.explain(SHAPE, dtype="bf16", device="H200"))
    for part in (
        "BatchNorm in training of 256x64x112x112 bfloat16 contiguous: 411 MB per tensor",
        "h200 (NVIDIA H200): 132 multiprocessors, 227 KiB of shared memory",
        "forward in training: persistent kernel, 1 launch\n",
        "floor 822.1 MB, predicted 822.1 MB: 1.00 x the floor",
        "at least 171.3 us at 4.8 TB/s: a bandwidth bound, not a measurement",
    ):
        assert part in text
    partly = str(bnk.explain((256, 256, 56, 56), dtype="bf16", layout="nhwc", device="h200"))
    assert "persistent kernel, 1 launch" in partly and "the rest is reloaded, in reverse order" in partly
    two_pass = str(bnk.explain(SHAPE, dtype="bf16", layout="nhwc", device="t4"))
    assert "two-pass path, 3 launches" in two_pass and "too little of a channel tile fits in shared memory" in two_pass


def test_two_pass_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNKERNELS_PLAN", "two_pass")
    explanation = bnk.explain(SHAPE, dtype="bf16", device="h200")
    assert [plan.reason for plan in explanation.passes] == ["forced", "forced"]
    assert "requested by BNKERNELS_PLAN=two_pass" in str(explanation)
    monkeypatch.setenv("BNKERNELS_PLAN", "sideways")
    with pytest.raises(ValueError, match="BNKERNELS_PLAN=sideways: expected auto or two_pass"):
        bnk.explain(SHAPE, device="h200")


# Inputs of explain()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.empty(6, 5), (6, 5, 1, "float32", True)),
        (lambda: torch.empty(6, 5, 7, dtype=torch.float64), (6, 5, 7, "float64", True)),
        (lambda: torch.empty(6, 5, 3, 7, dtype=torch.half), (6, 5, 21, "float16", True)),
        (lambda: torch.empty(6, 5, 3, 7).to(memory_format=torch.channels_last), (126, 5, 1, "float32", True)),
        (lambda: torch.empty(2, 5, 3, 7, 4).to(memory_format=torch.channels_last_3d), (168, 5, 1, "float32", True)),
        (lambda: torch.empty(61)[1:].view(6, 10), (6, 10, 1, "float32", False)),
        (lambda: torch.empty(10, 6).t(), (6, 10, 1, "float32", True)),  # explain() plans for a contiguous copy
        (lambda: torch.empty(61)[1:].view(10, 6).t(), (6, 10, 1, "float32", True)),
        (lambda: torch.empty(6, 5, 3, 8)[..., 1:], (6, 5, 21, "float32", True)),
        (lambda: torch.empty(6, 5, 2**40, device="meta"), (6, 5, 2**40, "float32", True)),
    ],
)
def test_tensors(make: Callable[[], torch.Tensor], expected: tuple[Any, ...]) -> None:
    spec = spec_of(make(), None, None)
    assert (spec.outer, spec.channels, spec.inner, spec.dtype, spec.aligned) == expected


def test_dtype_and_layout_names() -> None:
    for dtype in ("bf16", "bfloat16", "torch.bfloat16", "BF16", torch.bfloat16):
        for layout in ("nhwc", "NHWC", "channels_last", "channels-last", torch.channels_last):
            spec = spec_of((2, 3, 4, 5), dtype, layout)
            assert (spec.dtype, spec.layout) == ("bfloat16", "channels_last")
    for layout in ("nchw", "contiguous", "channels_first", torch.contiguous_format):
        assert spec_of((2, 3, 4, 5), "half", layout).layout == "contiguous"
    x = torch.empty(2, 3, 4, 5)
    assert spec_of(x, "fp16", "nhwc") == spec_of((2, 3, 4, 5), "fp16", "nhwc")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": (8,)}, ValueError, r"2 or more dimensions, \(N, C, ...\), but got \(8,\)"),
        ({"x": (8, 0, 4)}, ValueError, r"sizes of at least 1, but got \(8, 0, 4\)"),
        ({"x": (8, 2.5)}, TypeError, r"expected a tensor or a shape .* but got \(8, 2.5\)"),
        ({"x": 8}, TypeError, "expected a tensor or a shape"),
        ({"x": (1, 8)}, ValueError, r"more than 1 value per channel when training, but got a shape of \(1, 8\)"),
        ({"x": (8, 8), "dtype": "int8"}, ValueError, r"expected dtype to be one of float64 .* but got 'int8'"),
        ({"x": torch.ones(8, 8, dtype=torch.int32)}, ValueError, r"expected dtype to be one of .* but got torch.int32"),
        ({"x": (8, 8), "layout": "nhcw"}, ValueError, r"expected layout to be one of contiguous .* but got 'nhcw'"),
        ({"x": (8, 8, 3), "layout": "nhwc"}, ValueError, r"4 or 5 dimensions for channels_last, but got \(8, 8, 3\)"),
        (
            {"x": (8, 8), "device": "h300"},
            ValueError,
            r"expected device to be one of t4, .*cuda:N or cpu, but got 'h300'",
        ),
        ({"x": (8, 8), "device": "cuda:x"}, ValueError, r"expected cuda or cuda:N with N a number, but got 'cuda:x'"),
        ({"x": (8, 8), "device": "cuda:99"}, ValueError, r"cuda:99: .*Named devices need no GPU, e.g. device='h200'"),
        ({"x": (2**40, 2**40), "device": "h200"}, ValueError, "2\\^57 bytes"),
        ({"x": (8, 8), "activation": "gelu"}, ValueError, "activation must be None or 'relu', but got 'gelu'"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"device": "h200", **arguments}
    with pytest.raises(error, match=message):
        bnk.explain(given.pop("x"), **given)


# Epilogues

EPILOGUES = [
    # residual, activation: tensors that each pass moves and its launches, with BatchNorm itself at the floor
    (False, "relu", (2, 1), (3, 1), "BatchNorm and ReLU"),
    (True, None, (3, 1), (3, 1), "BatchNorm and an addition"),
    (True, "relu", (3, 1), (6, 2), "BatchNorm, an addition and ReLU"),
]


@pytest.mark.parametrize(("residual", "activation", "forward", "backward", "title"), EPILOGUES)
def test_epilogues(
    residual: bool, activation: str | None, forward: tuple[int, int], backward: tuple[int, int], title: str
) -> None:
    """BatchNorm's own plan does not change; the bytes, ratio and time include the epilogue's tensors."""
    plain = bnk.explain(SHAPE, dtype="bf16", device="h200")
    fused = bnk.explain(SHAPE, dtype="bf16", device="h200", residual=residual, activation=activation)
    tensor = fused.spec.bytes
    for own, whole, (tensors, launches) in zip(plain.passes, fused.passes, (forward, backward)):
        assert (own.persistent, own.floor, own.predicted) == (whole.persistent, whole.floor, whole.predicted)
        assert whole.whole.total == tensors * tensor and whole.launches == launches
        assert whole.seconds == pytest.approx(tensors * tensor / 4.8e12)
    # The last backward moves six tensors; the floor is four: x and grad in, their gradients out.
    floors = (forward[0], 4 if backward[1] == 2 else 3)
    assert [plan.whole_floor.total // tensor for plan in fused.passes] == list(floors)
    assert str(fused).startswith(f"{title} in training of ")
    assert ("threshold_backward, 1 launch" in str(fused)) == (backward[1] == 2)
    data = fused.as_json()
    assert data["epilogue"] == {"residual": residual, "relu": activation is not None}
    assert data["passes"]["backward_train"]["whole_predicted_bytes"] == backward[0] * tensor


# Devices


def test_default_device_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    explanation = bnk.explain(SHAPE)
    assert explanation.assumed and explanation.device is NAMED["h200"]
    assert "default device: none was given, and this installation has no usable GPU" in str(explanation)
    assert not bnk.explain(SHAPE, device="h200").assumed


def test_cpu_has_no_plan() -> None:
    explanation = bnk.explain(SHAPE, device="cpu")
    assert explanation.device is None and explanation.passes == ()
    assert "plans exist for CUDA only; the CPU backend" in str(explanation) and str(bnk.build_info()["simd"]) in str(
        explanation
    )


@pytest.mark.parametrize(
    ("properties", "bandwidth", "source"),
    [
        ({"name": "NVIDIA H200"}, 4.8e12, "datasheet"),
        ({"name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb"}, 3.35e12 / 8, "datasheet, 1/8 of the GPU's"),
        ({"name": "Other", "memory_clock_rate": 1_000_000, "memory_bus_width": 256}, 64e9, "memory clock x bus width"),
        ({"name": "Other MIG 1g.1gb", "memory_clock_rate": 1_000_000, "memory_bus_width": 256}, None, "unknown"),
        ({"name": "Other"}, None, "unknown"),  # a torch version without these properties
    ],
)
def test_current_device(
    properties: dict[str, Any], bandwidth: float | None, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "device_limits", lambda index: NAMED["l4"].limits.arguments())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    device = devices.cuda_device(3)
    assert (device.name, device.title, device.limits) == ("cuda:3", properties["name"], NAMED["l4"].limits)
    assert (device.bandwidth, device.bandwidth_source) == (bandwidth, source)
    explanation = bnk.explain(SHAPE, device="cuda:3")
    assert all((plan.seconds is None) == (bandwidth is None) for plan in explanation.passes)
    assert ("time       unknown" in str(explanation)) == (bandwidth is None)


@pytest.mark.cuda
def test_the_current_gpu_is_the_default() -> None:
    x = torch.empty(8, 64, 14, 14, device="cuda")
    for explanation in (bnk.explain(x), bnk.explain((8, 64, 14, 14)), bnk.explain(x, device="cuda")):
        assert explanation.device is not None and explanation.device.title == torch.cuda.get_device_name()
        assert not explanation.assumed


# The command line


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "256,64,112,112", "--dtype", "bf16", "--layout", "nhwc", "--device", "h200"]
    assert cli.main(arguments) == 0
    explanation = bnk.explain(SHAPE, dtype="bf16", layout="nhwc", device="h200")
    assert capsys.readouterr().out == f"{explanation}\n"
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(json.dumps(explanation.as_json()))
    assert report["passes"]["forward_train"]["ratio"] == explanation.passes[0].ratio
    assert cli.main(["--shape", "8x4", "--inference", "--device", "t4", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["passes"]) == {"forward_eval", "backward_eval"}
    assert cli.main([*arguments, "--residual", "--activation", "relu"]) == 0
    fused = bnk.explain(SHAPE, dtype="bf16", layout="nhwc", device="h200", residual=True, activation="relu")
    assert capsys.readouterr().out == f"{fused}\n"


@pytest.mark.parametrize("arguments", [["--shape", "8"], ["--shape", "8,4", "--device", "h300"]])
def test_command_line_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("bnkernels.explain: expected")


@pytest.mark.parametrize("arguments", [[], ["--shape", "8,a"]])
def test_command_line_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_the_documentation_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(
        r"^\$ python -m bnkernels\.explain (.+)\n((?:.+\n)+)```",
        (ROOT / "docs" / "explain.md").read_text(),
        re.MULTILINE,
    )
    assert shown is not None
    assert cli.main(shown[1].split()) == 0
    assert capsys.readouterr().out == shown[2]


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bnkernels.explain", "--shape", "8,4,3", "--device", "l4"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BatchNorm in training of 8x4x3 float32 contiguous") and done.stderr == ""
