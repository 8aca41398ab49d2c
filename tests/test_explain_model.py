"""bnkernels.explain_model: every BatchNorm of a model, found without computing anything and without changing it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnkernels as bnk


class Residual(nn.Module):
    """Two calls of one layer, and one layer of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(6), bnk.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.head(self.bn(x.relu()) + x)


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "identities": [id(value) for value in [*model.parameters(), *model.buffers()]],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    for name, value in before.pop("tensors").items():
        torch.testing.assert_close(after["tensors"][name], value, rtol=0, atol=0)
    assert {name: after[name] for name in before} == before


@pytest.fixture
def model() -> nn.Module:
    model = Residual()
    model(torch.randn(4, 3, 6, 6))
    return model


def test_every_call_in_order_and_nothing_changes(model: nn.Module) -> None:
    model.bn.eval()  # type: ignore[union-attr]
    before = state(model)
    explanation = bnk.explain_model(model, torch.randn(4, 3, 6, 6), device="h200")
    assert_same(model, before)
    assert [layer.name for layer in explanation.layers] == ["bn", "bn", "head.2"]
    assert [layer.explanation.subject.shape for layer in explanation.layers] == [(4, 8, 6, 6), (4, 8, 6, 6), (4, 6)]
    for layer in explanation.layers:
        assert layer.explanation == bnk.explain(layer.explanation.subject.shape, device="h200")
    plans = [plan for layer in explanation.layers for plan in layer.explanation.passes]
    told = explanation.as_json()
    assert told["floor_bytes"] == sum(plan.floor.total for plan in plans)
    assert told["predicted_bytes"] == sum(plan.predicted.total for plan in plans)
    assert told["launches"] == sum(plan.launches for plan in plans)
    assert explanation.seconds == pytest.approx(sum(plan.seconds or 0 for plan in plans))
    text = str(explanation)
    assert text.startswith("3 calls of BatchNorm layers in training\non h200")
    for part in ("head.2", "4x8x6x6", "all", "not measurements"):
        assert part in text


def test_inputs_in_every_form(model: nn.Module) -> None:
    shape = (4, 3, 6, 6)
    by_shape = bnk.explain_model(model, shape, device="l4")
    for given in (torch.Size(shape), torch.empty(shape), torch.empty(shape, device="meta"), (torch.empty(shape),)):
        assert bnk.explain_model(model, given, device="l4") == by_shape
    last = bnk.explain_model(model, torch.empty(shape).to(memory_format=torch.channels_last), device="l4")
    assert [layer.explanation.subject.layout for layer in last.layers] == ["channels_last"] * 2 + ["contiguous"]
    half = bnk.explain_model(model, shape, dtype="bf16", device="l4")
    assert {layer.explanation.subject.dtype for layer in half.layers} == {"bfloat16"}
    converted = bnk.explain_model(bnk.convert(copy.deepcopy(model)), shape, device="l4")
    assert converted == by_shape


def test_lazy_layers_need_an_input_first() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), bnk.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="lazy layers know their sizes: run it once"):
        bnk.explain_model(model, (2, 3, 8, 8), device="t4")
    model(torch.randn(2, 3, 8, 8))
    explanation = bnk.explain_model(model, (2, 3, 8, 8), device="t4")
    assert [layer.explanation.subject.shape for layer in explanation.layers] == [(2, 8, 6, 6)] * 2


def test_a_layer_itself_and_the_cpu() -> None:
    explanation = bnk.explain_model(nn.BatchNorm2d(4), (2, 4, 3, 3), device="cpu")
    assert "(model)" in str(explanation) and "plans concern CUDA" in str(explanation)
    assert explanation.seconds is None and explanation.as_json()["launches"] == 0


def test_what_is_fused_counts() -> None:
    """The additions and the ReLUs that layers are given; their bytes are in the sums."""

    class Block(nn.Module):
        def __init__(self, activation: str | None) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.first = bnk.BatchNorm2d(8, activation=activation)
            self.second = bnk.BatchNorm2d(8, activation=activation)
            self.adds = activation is not None

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(self.conv(x))
            return self.second(y, x) if self.adds else self.second(y) + x  # type: ignore[no-any-return]

    plain = bnk.explain_model(Block(None), (4, 8, 6, 6), device="h200")
    fused = bnk.explain_model(Block("relu"), (4, 8, 6, 6), device="h200")
    first, second = (layer.explanation for layer in fused.layers)
    shape = (4, 8, 6, 6)
    assert first == bnk.explain(shape, device="h200", activation="relu")
    assert second == bnk.explain(shape, device="h200", residual=True, activation="relu")
    more = fused.as_json()["predicted_bytes"] - plain.as_json()["predicted_bytes"]
    assert more == 4 * first.subject.bytes  # the residual; and threshold_backward's three
    assert "second + an addition + ReLU" in str(fused) and "first + ReLU" in str(fused)


def test_sync_batch_norm_is_left_out() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm2d(4)).eval()
    assert [layer.name for layer in bnk.explain_model(model, (2, 4, 3, 3), device="t4").layers] == ["1"]


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (nn.ReLU(), (2, 3), ValueError, "expected a model with BatchNorm layers, but ReLU called none"),
        (
            LooksAtValues(),
            (2, 3),
            RuntimeError,
            r"(?s)LooksAtValues cannot run without data .*explain\(\) takes single shapes",
        ),
        (
            nn.BatchNorm2d(4),
            (2, 5, 3, 3),
            RuntimeError,
            r"BatchNorm2d cannot run without data on inputs of \[\(2, 5, 3, 3\)\]",
        ),
        (nn.BatchNorm2d(4), "2x4", TypeError, "expected a tensor, a tuple of tensors or a shape, but got '2x4'"),
        (nn.BatchNorm2d(4), (2, torch.ones(1)), TypeError, "expected a tensor, a tuple of tensors or a shape"),
        ("resnet50", (2, 4), TypeError, "expected a torch.nn.Module, but got str"),
    ],
)
def test_what_is_wrong_is_said(model: Any, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bnk.explain_model(model, given, device="h200")


def test_resnet50() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    explanation = bnk.explain_model(models.resnet50(), (256, 3, 224, 224), dtype="bf16", device="h200")
    assert len(explanation.layers) == 53
    assert explanation.ratio("forward") == explanation.ratio("backward") == 1
    assert all(plan.launches == 1 for layer in explanation.layers for plan in layer.explanation.passes)
