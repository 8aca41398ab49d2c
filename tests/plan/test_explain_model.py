"""bnkernels.explain_model reports every BatchNorm call of a model without computing or changing anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bnkernels as bnk
from bnkernels.modules import ForwardMixin


class Residual(nn.Module):
    """Calls one layer twice, and a layer of another kind once."""

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
    assert [layer.explanation.spec.shape for layer in explanation.layers] == [(4, 8, 6, 6), (4, 8, 6, 6), (4, 6)]
    for layer in explanation.layers:
        assert layer.explanation == bnk.explain(layer.explanation.spec.shape, device="h200")
    plans = [plan for layer in explanation.layers for plan in layer.explanation.passes]
    report = explanation.as_json()
    assert report["floor_bytes"] == sum(plan.floor.total for plan in plans)
    assert report["predicted_bytes"] == sum(plan.predicted.total for plan in plans)
    assert report["launches"] == sum(plan.launches for plan in plans)
    assert explanation.seconds == pytest.approx(sum(plan.seconds or 0 for plan in plans))
    text = str(explanation)
    assert text.startswith("3 calls of BatchNorm layers in training\non h200")
    for part in ("head.2", "4x8x6x6", "total", "not measurements"):
        assert part in text


def test_inputs_in_every_form(model: nn.Module) -> None:
    shape = (4, 3, 6, 6)
    by_shape = bnk.explain_model(model, shape, device="l4")
    for given in (torch.Size(shape), torch.empty(shape), torch.empty(shape, device="meta"), (torch.empty(shape),)):
        assert bnk.explain_model(model, given, device="l4") == by_shape
    last = bnk.explain_model(model, torch.empty(shape).to(memory_format=torch.channels_last), device="l4")
    assert [layer.explanation.spec.layout for layer in last.layers] == ["channels_last"] * 2 + ["contiguous"]
    half = bnk.explain_model(model, shape, dtype="bf16", device="l4")
    assert {layer.explanation.spec.dtype for layer in half.layers} == {"bfloat16"}
    converted = bnk.explain_model(bnk.convert(copy.deepcopy(model)), shape, device="l4")
    assert converted == by_shape


def test_lazy_layers_need_an_input_first() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), bnk.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="without uninitialised lazy layers: run a forward pass"):
        bnk.explain_model(model, (2, 3, 8, 8), device="t4")
    model(torch.randn(2, 3, 8, 8))
    explanation = bnk.explain_model(model, (2, 3, 8, 8), device="t4")
    assert [layer.explanation.spec.shape for layer in explanation.layers] == [(2, 8, 6, 6)] * 2


def test_a_layer_itself_and_the_cpu() -> None:
    explanation = bnk.explain_model(nn.BatchNorm2d(4), (2, 4, 3, 3), device="cpu")
    assert "(model)" in str(explanation) and "plans exist for CUDA only" in str(explanation)
    assert explanation.seconds is None and explanation.as_json()["launches"] == 0


def test_what_is_fused_counts() -> None:
    """Fused additions and ReLUs are reported, and the totals include their bytes."""

    class Block(nn.Module):
        def __init__(self, relu: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.first, self.second = (bnk.BatchNormAct2d(8, apply_act=relu) for _ in range(2))
            self.adds = relu

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(self.conv(x))
            return self.second(y, x) if self.adds else self.second(y) + x  # type: ignore[no-any-return]

    plain = bnk.explain_model(Block(False), (4, 8, 6, 6), device="h200")
    fused = bnk.explain_model(Block(True), (4, 8, 6, 6), device="h200")
    first, second = (layer.explanation for layer in fused.layers)
    shape = (4, 8, 6, 6)
    assert first == bnk.explain(shape, device="h200", activation="relu")
    assert second == bnk.explain(shape, device="h200", residual=True, activation="relu")
    more = fused.as_json()["predicted_bytes"] - plain.as_json()["predicted_bytes"]
    assert more == 4 * first.spec.bytes  # the residual, and the three tensors of threshold_backward
    assert "second.bn + an addition + ReLU" in str(fused) and "first.bn + ReLU" in str(fused)


class Doubled(nn.BatchNorm2d):
    """A subclass of nn.BatchNorm2d with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class TwoKernelCalls(bnk.BatchNorm2d):
    """A subclass of bnkernels.BatchNorm2d that calls the kernels twice."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return torch.cat([super(TwoKernelCalls, self).forward(half) for half in input.chunk(2)])


def shared() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(norm, nn.Sequential(nn.ReLU(), norm), nn.BatchNorm2d(4))


def lazy(norm: type[nn.Module]) -> nn.Module:
    model = nn.Sequential(norm(), nn.ReLU())
    model(torch.randn(SHAPE))
    return model


def changed(norm: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(norm)
    return nn.Sequential(norm, nn.BatchNorm2d(4))


def with_bn(bn: nn.Module) -> nn.Module:
    layer = bnk.BatchNormAct2d(4)
    layer.bn = bn
    return nn.Sequential(layer)


def double_weight(norm: nn.Module) -> None:
    parametrize.register_parametrization(norm, "weight", nn.Softplus())


def replace_forward(norm: Any) -> None:
    norm.forward = norm.forward


SHAPE = (4, 4, 5, 5)
CONVERTIBLE: dict[str, Callable[[], nn.Module]] = {
    "torch's": lambda: nn.BatchNorm2d(4),
    "ours": lambda: bnk.BatchNorm2d(4),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.BatchNorm2d(4))), bnk.BatchNorm2d(4)),
    "shared": shared,
    "eval": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval(),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "no parameters, no statistics": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "subclass": lambda: nn.Sequential(Doubled(4), nn.BatchNorm2d(4)),
    "subclasses alone": lambda: nn.Sequential(Doubled(4), Doubled(4)),
    "subclass of ours": lambda: TwoKernelCalls(4),
    "synchronised": lambda: nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm2d(4)).eval(),
    "synchronised, ours": lambda: nn.Sequential(bnk.SyncBatchNorm(4), nn.BatchNorm2d(4)),
    "lazy": lambda: lazy(nn.LazyBatchNorm2d),
    "lazy, ours": lambda: lazy(bnk.LazyBatchNorm2d),
    "other norms": lambda: nn.Sequential(
        nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)
    ),
    "no BatchNorm": lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True)),
    "BatchNormAct2d": lambda: nn.Sequential(bnk.BatchNormAct2d(4), bnk.BatchNormAct2d(4, apply_act=False)),
    "BatchNormAct2d, reverted": lambda: bnk.revert(nn.Sequential(bnk.BatchNormAct2d(4), nn.ReLU())),
    "BatchNormAct2d of a subclass": lambda: with_bn(Doubled(4)),
    "BatchNormAct2d, synchronised": lambda: with_bn(bnk.SyncBatchNorm(4)),
    "hook": lambda: changed(nn.BatchNorm2d(4), lambda m: m.register_forward_hook(lambda m, x, y: 2 * y)),
    "hook, ours": lambda: changed(bnk.BatchNorm2d(4), lambda m: m.register_forward_pre_hook(lambda m, x: None)),
    "hook within BatchNormAct2d": lambda: changed(
        bnk.BatchNormAct2d(4), lambda m: m.bn.register_forward_hook(lambda m, x, y: None)
    ),
    "parametrization": lambda: changed(nn.BatchNorm2d(4), double_weight),
    "parametrization, ours": lambda: changed(bnk.BatchNorm2d(4), double_weight),
    "forward replaced": lambda: changed(nn.BatchNorm2d(4), replace_forward),
}


@pytest.mark.filterwarnings("ignore:convert.* changed no BatchNorm")
@pytest.mark.parametrize("make", CONVERTIBLE.values(), ids=CONVERTIBLE)
def test_agrees_with_convert(make: Callable[[], nn.Module]) -> None:
    """explain_model reports the layers that convert() replaces or that belong to this package, as after the
    conversion.
    """
    model = make()
    converted = bnk.convert(copy.deepcopy(model))
    ours = {
        name
        for name, module in converted.named_modules()
        if isinstance(module, ForwardMixin) and not isinstance(module, nn.SyncBatchNorm)
    }
    if not ours:
        with pytest.raises(ValueError, match=r"called none that convert\(\)"):
            bnk.explain_model(model, SHAPE, device="h200")
        return
    explanation = bnk.explain_model(model, SHAPE, device="h200")
    assert {layer.name for layer in explanation.layers} == ours
    assert explanation == bnk.explain_model(converted, SHAPE, device="h200")


def test_counts_each_call_of_a_subclass_and_what_follows_it() -> None:
    """Each kernel call is reported with its own sizes, and with the ReLU that a BatchNormAct2d fuses into it."""
    halves = bnk.explain_model(TwoKernelCalls(4), SHAPE, device="h200").layers
    assert [layer.explanation for layer in halves] == [bnk.explain((2, *SHAPE[1:]), device="h200")] * 2
    watched = bnk.BatchNormAct2d(4)
    watched.bn.register_forward_hook(lambda m, x, y: None)
    (fused,), (plain,) = (
        bnk.explain_model(each, SHAPE, device="h200").layers for each in (bnk.BatchNormAct2d(4), watched)
    )
    assert fused.explanation == bnk.explain(SHAPE, device="h200", activation="relu")
    assert plain.explanation == bnk.explain(SHAPE, device="h200")


def test_sync_batch_norm_is_left_out() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm2d(4)).eval()
    assert [layer.name for layer in bnk.explain_model(model, (2, 4, 3, 3), device="t4").layers] == ["1"]


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (nn.ReLU(), (2, 3), ValueError, "expected a model with BatchNorm layers, but ReLU called none"),
        (
            DataDependent(),
            (2, 3),
            RuntimeError,
            r"(?s)DataDependent cannot run without data .*call explain\(\) for the shape",
        ),
        (
            nn.BatchNorm2d(4),
            (2, 5, 3, 3),
            RuntimeError,
            r"BatchNorm2d cannot run without data on inputs of shapes \[\(2, 5, 3, 3\)\]",
        ),
        (nn.BatchNorm2d(4), "2x4", TypeError, "expected a tensor, a tuple of tensors or a shape, but got '2x4'"),
        (nn.BatchNorm2d(4), (2, torch.ones(1)), TypeError, "expected a tensor, a tuple of tensors or a shape"),
        ("resnet50", (2, 4), TypeError, "expected a torch.nn.Module, but got str"),
    ],
)
def test_errors(model: Any, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bnk.explain_model(model, given, device="h200")


def test_resnet50() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    explanation = bnk.explain_model(models.resnet50(), (256, 3, 224, 224), dtype="bf16", device="h200")
    assert len(explanation.layers) == 53
    assert explanation.ratio("forward") == explanation.ratio("backward") == 1
    assert all(plan.launches == 1 for layer in explanation.layers for plan in layer.explanation.passes)
