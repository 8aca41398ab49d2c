"""The benchmark harness's parts: shapes, bytes, statistics, sampling, the tolerance, the report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import report, shapes, tolerance
from bench.cases import DTYPES, EPILOGUES, FLOOR_TENSORS, Case, make_buffers, make_ring, ring_length
from bench.markdown import table
from bench.providers import BUILDERS, COMPILED, COPY, EAGER, OURS, Provider, make_call
from bench.results import Comparison, Record, Run, ToleranceRecord
from bench.sampling import Effort, Ring, interleave
from bench.shapes import LayerShape
from bench.stats import Spread, geometric_mean, quantile

CPU = torch.device("cpu")
SMALL = Case(LayerShape(3, 5, 5), 4, "nchw", "fp32")


# ---- shapes and bytes


def test_resnet50_has_53_layers_of_12_shapes():
    layers = shapes.resnet50()
    assert len(layers) == 12
    assert sum(layer.count for layer in layers) == 53
    # Weight and bias of every layer: 53,120 of the network's 25,557,032 parameters.
    assert sum(2 * layer.channels * layer.count for layer in layers) == 53_120
    assert {layer.name: layer.count for layer in layers} == {
        "64x112x112": 1,
        "64x56x56": 6,
        "256x56x56": 4,
        "128x56x56": 1,
        "128x28x28": 7,
        "512x28x28": 5,
        "256x28x28": 1,
        "256x14x14": 11,
        "1024x14x14": 7,
        "512x14x14": 1,
        "512x7x7": 5,
        "2048x7x7": 4,
    }


def test_resnet50_agrees_with_torchvision():
    models = pytest.importorskip("torchvision.models")
    seen: list[tuple[int, ...]] = []
    model = models.resnet50().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    ours = [(layer.channels, layer.height, layer.width) for layer in shapes.resnet50() for _ in range(layer.count)]
    assert sorted(seen) == sorted(ours)


def test_quick_shapes_are_four_of_them():
    assert len(shapes.quick()) == 4
    assert set(shapes.quick()) <= set(shapes.resnet50())


@pytest.mark.parametrize("dtype", DTYPES)
def test_floor_bytes(dtype: str):
    case = Case(LayerShape(64, 7, 9), 5, "nhwc", dtype)
    tensor = 5 * 64 * 7 * 9 * torch.empty(0, dtype=DTYPES[dtype]).element_size()
    assert case.tensor_bytes == tensor
    # Forward: read x, write y. Backward: read x and grad, write grad_x. Then both.
    assert [case.floor_bytes(name) / tensor for name in ("forward", "eval", "backward", "step")] == [2, 2, 3, 5]
    assert set(FLOOR_TENSORS) == {"forward", "eval", "backward", "step"}


@pytest.mark.parametrize(
    ("epilogue", "tensors"),
    [
        ("relu", [2, 2, 3, 5]),
        # The residual is read; its gradient is y's gradient.
        ("add", [3, 3, 3, 6]),
        # After a ReLU the residual's gradient is a tensor of its own, which is written.
        ("add+relu", [3, 3, 4, 7]),
    ],
)
def test_floor_bytes_with_an_epilogue(epilogue: str, tensors: list[int]):
    case = Case(LayerShape(3, 5, 5), 4, "nchw", "fp32", epilogue)
    floors = [case.floor_bytes(name) / case.tensor_bytes for name in ("forward", "eval", "backward", "step")]
    assert floors == tensors
    assert str(case) == f"4x3x5x5 nchw fp32 {epilogue}"
    (residual,) = make_buffers(case, CPU).inputs[1:] if case.adds else (None,)
    assert (residual is None) == (epilogue == "relu")
    assert residual is None or (residual.is_leaf and residual.requires_grad)


def test_ring_is_longer_than_the_cache_and_within_the_limit():
    case = Case(LayerShape(1, 1, 256), 1, "nchw", "fp32")  # 1 KiB
    per_call = 2048
    length = ring_length(case, per_call, cold_bytes=100_000, limit_bytes=1 << 30)
    # Between two uses of one buffer, the other buffers alone exceed the cache.
    assert (length - 1) * per_call > 100_000
    assert ring_length(case, per_call, cold_bytes=0, limit_bytes=1 << 30) == 2
    assert ring_length(case, per_call, cold_bytes=1 << 30, limit_bytes=20 * 1024) == 10
    assert ring_length(case, per_call, cold_bytes=1 << 30, limit_bytes=0) == 2
    assert ring_length(case, per_call, cold_bytes=1 << 40, limit_bytes=1 << 40) == 512


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_buffers(layout: str):
    case = Case(LayerShape(3, 5, 5), 4, layout, "bf16")
    ring = make_ring(case, CPU, 3)
    memory_format = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}[layout]
    for buffers in ring:
        assert buffers.x.is_leaf and buffers.x.requires_grad and not buffers.grad.requires_grad
        for tensor in (buffers.x, buffers.grad):
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous(memory_format=memory_format)
        assert torch.equal(buffers.x, ring[0].x) and torch.equal(buffers.grad, ring[0].grad)
    assert len({tensor.data_ptr() for buffers in ring for tensor in (buffers.x, buffers.grad)}) == 6
    assert not torch.equal(make_buffers(case, CPU, seed=1).x, ring[0].x)


# ---- statistics and sampling


def test_quantiles():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([10.0, 20.0], 0.2) == pytest.approx(12.0)
    assert quantile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="empty"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="expected 0 <= q <= 1"):
        quantile([1.0], 1.5)


def test_geometric_mean():
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    with pytest.raises(ValueError):
        geometric_mean([])
    with pytest.raises(ValueError):
        geometric_mean([1.0, 0.0])


def test_spreads_overlap():
    assert Spread(2.0, 1.0, 3.0).overlaps(Spread(4.0, 3.0, 5.0))
    assert not Spread(2.0, 1.0, 3.0).overlaps(Spread(4.0, 3.1, 5.0))


def test_ring_is_shared():
    ring = Ring(5)
    assert ring.take(3) == [0, 1, 2]
    assert ring.take(4) == [3, 4, 0, 1]
    assert ring.take(1) == [2]


def test_interleave_rotates_and_scales():
    """Two fake clocks of 1 ms and 3 ms per call: samples are seconds per call, independent of the calls per sample."""
    asked: list[tuple[str, int]] = []

    def clock(name: str, each: float):
        def timer(count: int) -> float:
            asked.append((name, count))
            return count * each

        return timer

    effort = Effort(sample_s=10e-3, budget_s=0.2, min_rounds=3, max_rounds=50)
    samples = interleave({"a": clock("a", 1e-3), "b": clock("b", 3e-3)}, effort)
    assert all(value == pytest.approx(1e-3) for value in samples["a"])
    assert all(value == pytest.approx(3e-3) for value in samples["b"])
    # 10 calls of a and 4 of b take 22 ms per round: 9 rounds fit into 0.2 s.
    assert len(samples["a"]) == len(samples["b"]) == 9
    rounds = [name for name, _ in asked[-18:]]
    assert rounds == ["a", "b", "b", "a"] * 4 + ["a", "b"]
    assert {(name, count) for name, count in asked[-18:]} == {("a", 10), ("b", 4)}
    least = interleave({"slow": clock("slow", 1.0)}, effort)
    assert len(least["slow"]) == 3


# ---- calls and the tolerance


@pytest.mark.parametrize("direction", ["forward", "eval", "backward", "step"])
def test_calls_return_what_they_make(direction: str):
    ring = make_ring(SMALL, CPU, 2)
    call = make_call(Provider.make(EAGER, SMALL, CPU), direction, ring)
    for index in (0, 1, 0):
        made = call(index)
        if direction == "forward":
            assert isinstance(made, Tensor) and made.requires_grad
        elif direction == "eval":
            assert isinstance(made, Tensor) and not made.requires_grad
        elif direction == "backward":
            assert isinstance(made, tuple)
            assert [tuple(grad.shape) for grad in made] == [(4, 3, 5, 5), (3,), (3,)]
        else:
            assert isinstance(made, tuple) and len(made) == 2
    assert ring[0].x.grad is None  # gradients are not accumulated, since that would be timed too
    with pytest.raises(ValueError, match="sideways"):
        make_call(Provider.make(EAGER, SMALL, CPU), "sideways", ring)


def wrong_eps(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
    layer.eps = 1e-2
    return layer


class WrongElement(nn.Module):
    """A layer with an error of one part in a thousand in one element of y."""

    def __init__(self, layer: nn.BatchNorm2d, case: Case) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        factor = torch.ones_like(y)
        factor[1, 2, 3, 4] += 1e-3
        return y * factor


def no_running_statistics(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
    layer.momentum = 0.0
    return layer


@pytest.mark.parametrize("wrong", [wrong_eps, WrongElement, no_running_statistics])
def test_tolerance_rejects_a_wrong_provider(monkeypatch: pytest.MonkeyPatch, wrong):
    buffers = make_buffers(SMALL, CPU)
    right = {name: Provider.make(name, SMALL, CPU) for name in (OURS, EAGER)}
    records = tolerance.check(SMALL, right, buffers, training=True) + tolerance.check(
        SMALL, right, buffers, training=False
    )
    assert len(records) == 4 and all(record.passed for record in records)

    monkeypatch.setitem(BUILDERS, EAGER, wrong)
    native = {OURS: right[OURS], EAGER: Provider.make(EAGER, SMALL, CPU)}
    records = tolerance.check(SMALL, native, buffers, training=True)
    assert {record.provider: record.passed for record in records} == {OURS: True, EAGER: False}

    monkeypatch.setitem(BUILDERS, OURS, wrong)
    with pytest.raises(tolerance.ToleranceError, match="4x3x5x5 nchw fp32"):
        tolerance.check(SMALL, {OURS: Provider.make(OURS, SMALL, CPU)}, buffers, training=True)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_tolerance_checks_channels_in_blocks(epilogue: str, monkeypatch: pytest.MonkeyPatch):
    """The tolerance check finds the same worst error whether channels are checked singly or all at once."""
    case = replace(SMALL, epilogue=epilogue)
    buffers = make_buffers(case, CPU)
    outcomes = {EAGER: tolerance.run_once(Provider.make(EAGER, case, CPU), buffers, training=True)}
    whole = tolerance.judge(case, buffers, outcomes, training=True)[EAGER]
    monkeypatch.setattr(tolerance, "_ELEMENTS_AT_ONCE", 1)
    cut = tolerance.judge(case, buffers, outcomes, training=True)[EAGER]
    assert {(v.quantity, v.ratio) for v in whole} == {(v.quantity, v.ratio) for v in cut}
    quantities = {"y", "running_mean", "running_var", "dx", "dweight", "dbias"}
    assert {v.quantity for v in whole} == quantities | ({"dresidual"} if case.adds else set())


class Leaky(nn.Module):
    """A ReLU with a slope of 0.001 for negative values, in the forward and the backward."""

    def __init__(self, layer: nn.BatchNorm2d, case: Case) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        return nn.functional.leaky_relu(y if residual is None else y + residual, 1e-3)


class Doubled(Leaky):
    """Correct results, but twice the residual's gradient."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is not None
        return torch.relu(self.layer(x) + 2 * residual - residual.detach())


@pytest.mark.parametrize(("epilogue", "wrong"), [("relu", Leaky), ("add+relu", Leaky), ("add+relu", Doubled)])
def test_tolerance_checks_epilogues(epilogue: str, wrong, monkeypatch: pytest.MonkeyPatch):
    """All providers compute the same function, and the reference follows each provider's own y; a provider with a wrong
    epilogue is rejected."""
    case = replace(SMALL, epilogue=epilogue)
    buffers = make_buffers(case, CPU)
    for training in (True, False):
        right = {name: Provider.make(name, case, CPU) for name in (OURS, EAGER)}
        assert all(record.passed for record in tolerance.check(case, right, buffers, training))
    monkeypatch.setitem(BUILDERS, OURS, wrong)
    with pytest.raises(tolerance.ToleranceError, match=f"4x3x5x5 nchw fp32 {re.escape(epilogue)}"):
        tolerance.check(case, {OURS: Provider.make(OURS, case, CPU)}, buffers, training=True)


def test_a_nan_does_not_pass():
    assert not ToleranceRecord(OURS, "case", "step", math.nan, "y").passed
    assert not ToleranceRecord(OURS, "case", "step", math.inf, "y").passed


# ---- report


def record(shape: str, ours: list[float], eager: list[float], count: int = 1, **fields: object) -> Record:
    known: dict[str, object] = {"mode": "cpu", "direction": "forward", "dtype": "fp32", "layout": "nchw", "batch": 8}
    return Record(
        **{**known, **fields},  # type: ignore[arg-type]
        shape=shape,
        count=count,
        tensor_bytes=1_000_000,
        floor_bytes=2_000_000,
        method={OURS: "wall", EAGER: "wall", COPY: "wall"},
        seconds={OURS: ours, EAGER: eager, COPY: [0.5e-3]},
    )


def example() -> Run:
    run = Run(
        machine={
            "command": "python -m bench",
            "date": "2030-01-02T03:04:05+00:00",
            "commit": "abc",
            "dirty": True,
            "cpu": "A CPU",
            "cores": 2,
            "threads": 2,
            "last_level_cache_bytes": 32 << 20,
            "load_average_at_start": 0.0,
            "torch": "2",
            "python": "3",
            "system": "Linux",
            "build": {"simd": "avx2"},
        },
        settings={"preset": "default"},
    )
    run.records = [
        record("1x2x3", [1e-3, 1e-3, 1e-3], [2e-3, 2e-3, 2e-3], count=52),
        record("4x5x6", [4e-3, 4e-3, 5e-3], [2e-3, 2e-3, 2e-3]),
    ]
    run.tolerance = [ToleranceRecord(OURS, "a", "step", 0.1, "y"), ToleranceRecord(EAGER, "a", "step", 3.0, "dx")]
    return run


def test_comparison():
    compared = Comparison.of(example().records, EAGER)
    assert compared is not None
    assert compared.geomean == pytest.approx(1.0)  # 2 and 1/2
    assert (compared.least, compared.least_record.shape, compared.cases) == (0.5, "4x5x6", 2)
    assert compared.network == pytest.approx((52 * 2 + 2) / (52 * 1 + 4))
    assert Comparison.of(example().records, COMPILED) is None


def test_report_states_slowdowns_and_tolerances():
    run = example()
    text = report.render(run)
    assert "with uncommitted changes" in text
    assert "2 results, 1 outside the bound" in text
    assert re.search(r"outside: nn.BatchNorm2d, a, step: 3 times the bound at dx", text)
    losses = text.split("## Losses")[1].split("## All cases")[0]
    assert "8x4x5x6 nchw fp32, forward, cpu" in losses and "(**0.50**)" in losses
    assert "1x2x3" not in losses
    # 2 MB in 1 ms are 2 GB/s; the copy moves 2 MB in 0.5 ms.
    row = next(line for line in text.splitlines() if line.startswith("| 8   | 1x2x3"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *["8", "1x2x3", "52", "1 ms (+0 +0%)", "2 ms (+0 +0%)", "2.00", "2.0", "50%"]
    ]
    run.records = run.records[:1]
    assert "None: no other provider" in report.render(run)


def test_run_survives_json(tmp_path: Path):
    run = example()
    run.save(tmp_path / "run.json")
    again = Run.load(tmp_path / "run.json")
    assert again == run
    data = json.loads((tmp_path / "run.json").read_text())
    data["schema"] = 99
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="expected schema 1 or 2, got 99"):
        Run.load(tmp_path / "run.json")


def test_formats():
    assert report.format_time(1.5) == "1.5 s"
    assert report.format_time(0.01234) == "12.3 ms"
    assert report.format_time(0.5e-3) == "500 µs"
    assert report.format_time(12e-9) == "0.012 µs"
    assert report.format_ratio(1.0) == "1.00"
    assert report.format_ratio(0.5) == "**0.50**"
    assert report.format_ratio(0.999) == "**0.999**"  # a slowdown, shown as such and not as "1.00"
    assert report.format_ratio(None) == "-"
    assert report.format_spread(Spread(2e-3, 1e-3, 3e-3)) == "2 ms (-50 +50%)"


def test_table():
    assert table(["a", "bb"], [["x", "1"], ["long", "20"]]).splitlines() == [
        "| a    |  bb |",
        "| ---- | --: |",
        "| x    |   1 |",
        "| long |  20 |",
    ]
    with pytest.raises(ValueError, match="columns"):
        table(["a"], [["1", "2"]])


COMMITTED = sorted((Path(__file__).resolve().parents[2] / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_load(path: Path) -> None:
    """Of whichever schema: a report can be made of each run that was ever committed."""
    run = Run.load(path)
    assert run.records and run.tolerance and all(record.passed for record in run.tolerance if record.provider == OURS)
    assert OURS in run.providers() and report.render(run)
