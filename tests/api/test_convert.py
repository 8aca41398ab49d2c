"""convert() and revert(): what they change, what they leave, and what they report."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bnkernels as bnk

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: bnk.BatchNorm1d,
    nn.BatchNorm2d: bnk.BatchNorm2d,
    nn.BatchNorm3d: bnk.BatchNorm3d,
    nn.LazyBatchNorm1d: bnk.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: bnk.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: bnk.LazyBatchNorm3d,
    nn.SyncBatchNorm: bnk.SyncBatchNorm,
}


class Custom(nn.BatchNorm2d):
    """A subclass with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.GroupNorm(2, 8)),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.LazyBatchNorm1d(),
    )


def types(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("torch_class", PAIRS, ids=lambda cls: cls.__name__)
def test_each_class(torch_class: Any) -> None:
    """The root module is converted too, and revert() restores its class."""
    model = torch_class() if "Lazy" in torch_class.__name__ else torch_class(3)
    assert bnk.convert(model) is model and type(model) is PAIRS[torch_class]
    attributes = set(vars(model))
    assert bnk.revert(model) is model and type(model) is torch_class
    assert (
        set(vars(model)) == set(vars(torch_class() if "Lazy" in torch_class.__name__ else torch_class(3))) <= attributes
    )


def test_converted_model_computes_the_same() -> None:
    plain, converted = network(), bnk.convert(network())  # two networks: lazy layers cannot be copied
    for parameter, other in zip(plain.parameters(), converted.parameters()):
        if not nn.parameter.is_lazy(parameter):
            other.data.copy_(parameter.data)
    assert bnk.BatchNorm2d in types(converted) and bnk.LazyBatchNorm1d in types(converted)
    results = []
    for model in (converted, plain):
        torch.manual_seed(2)  # for the lazy layers
        model(torch.randn(4, 3, 8, 8))
        y = model(torch.randn(4, 3, 8, 8))
        y.square().sum().backward()
        model.eval()
        state = dict(model.state_dict())
        results.append((y, model(torch.ones(4, 3, 8, 8)), [p.grad for p in model.parameters()], state))
    torch.testing.assert_close(*results)
    assert bnk.BatchNorm1d in types(converted)


def test_only_the_class_changes() -> None:
    """Parameters, buffers and their memory, hooks, flags, and references to the module stay."""
    layer = nn.BatchNorm2d(3)
    model = nn.Sequential(layer, nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.eval()
    layer.weight.requires_grad_(False)
    layer.mark = "mine"  # type: ignore[assignment]
    tensors = [*layer.parameters(), *layer.buffers()]
    state = copy.deepcopy(model.state_dict())

    bnk.convert(model)
    assert model[0] is layer and type(layer) is bnk.BatchNorm2d
    assert all(a is b for a, b in zip([*layer.parameters(), *layer.buffers()], tensors))
    assert not layer.training and not layer.weight.requires_grad and layer.mark == "mine"
    assert list(model.state_dict()) == list(state) and model.state_dict()._metadata == state._metadata
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)

    model(torch.randn(4, 3, 2, 2, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    optimizer.step()
    assert torch.equal(layer.bias, tensors[1]) and not torch.equal(layer.bias, state["0.bias"])

    bnk.revert(model)
    assert type(layer) is nn.BatchNorm2d and layer.mark == "mine"
    model(torch.randn(4, 3, 2, 2))
    assert seen[3:] == ["before", "after"]


def test_filter() -> None:
    """filter_fn sees each candidate with its name, and nothing else; candidates for which it returns False stay."""
    seen: list[tuple[str, type[nn.Module]]] = []

    def inner_only(module: nn.Module, name: str) -> bool:
        seen.append((name, type(module)))
        return "." in name

    report = bnk.ConversionReport()
    model = bnk.convert(network(), inner_only, report=report)
    assert seen == [("1", nn.BatchNorm2d), ("3.1", nn.BatchNorm2d), ("6", nn.LazyBatchNorm1d)]
    assert [change.name for change in report.changed] == ["3.1"]
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("1", "filter_fn"), ("6", "filter_fn")]
    assert type(model[1]) is nn.BatchNorm2d and type(model[3][1]) is bnk.BatchNorm2d  # type: ignore[index]
    bnk.convert(model)
    bnk.revert(model, lambda module, name: name == "1")
    assert type(model[1]) is nn.BatchNorm2d and type(model[3][1]) is bnk.BatchNorm2d  # type: ignore[index]


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    module = nn.BatchNorm2d(3)
    parametrize.register_parametrization(module, "weight", Twice())
    return module


def replaced() -> nn.Module:
    module = nn.BatchNorm2d(3)
    module.forward = lambda input: input  # type: ignore[method-assign]
    return module


SKIPPED = {
    "subclass": (lambda: Custom(3), "subclass"),
    "parametrized": (parametrized, "subclass"),
    "forward replaced": (replaced, "forward was replaced"),
}


@pytest.mark.parametrize(("make", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_skipped_modules(make: Any, reason: str) -> None:
    """Reported and not modified."""
    module = make()
    before = type(module)
    report = bnk.ConversionReport()
    bnk.convert(nn.Sequential(module, nn.BatchNorm2d(3)), report=report)
    assert type(module) is before
    assert [change.name for change in report.changed] == ["1"]
    assert [(skip.name, skip.module) for skip in report.skipped] == [("0", before)]
    assert reason in report.skipped[0].reason and reason in str(report)


def test_other_norms_are_not_reported() -> None:
    report = bnk.ConversionReport()
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.Identity())
    before = types(model)
    bnk.revert(bnk.convert(model, report=report), report=report)
    assert types(model) == before and report == bnk.ConversionReport()


def test_subclasses_of_package_classes_stay() -> None:
    """A subclass of this package's class is neither converted nor reverted; only revert() reports it."""

    class Mine(bnk.BatchNorm2d):
        pass

    model = nn.Sequential(Mine(3))
    report = bnk.ConversionReport()
    bnk.convert(model, report=report)
    assert report == bnk.ConversionReport()
    bnk.revert(model, report=report)
    assert type(model[0]) is Mine and [skip.module for skip in report.skipped] == [Mine]


@pytest.mark.parametrize("foreign", ["relu", nn.ReLU()], ids=["string", "module"])
def test_foreign_attributes_are_ignored(foreign: object) -> None:
    """An attribute `activation` that other code has set does not change the result."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].activation = foreign
    expected = copy.deepcopy(model)
    bnk.convert(model)
    assert type(model[0]) is bnk.BatchNorm2d and repr(model[0].activation) == repr(foreign)
    torch.testing.assert_close(model(x := torch.randn(4, 3, 2, 2)), expected(x))


def test_shared_modules_are_converted_once() -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.ReLU(), shared)})
    report = bnk.ConversionReport()
    bnk.convert(model, report=report)
    assert [change.name for change in report.changed] == ["a.0"]
    assert model["a"][0] is model["b"][1] is shared  # type: ignore[index]
    assert type(shared) is bnk.BatchNorm2d


def test_convert_is_idempotent() -> None:
    model = network()
    bnk.convert(model)
    before, report = types(model), bnk.ConversionReport()
    bnk.convert(model, report=report)
    assert types(model) == before and report == bnk.ConversionReport()


def test_revert_undoes_convert() -> None:
    model = network()
    before = types(model)
    report = bnk.ConversionReport()
    bnk.revert(bnk.convert(model, report=report), report=report)
    assert types(model) == before
    converted, reverted = report.changed[:3], report.changed[3:]
    assert [(c.name, c.before, c.after) for c in converted] == [(c.name, c.after, c.before) for c in reverted]


def test_converted_models_can_be_pickled_and_copied() -> None:
    model = bnk.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert types(other) == types(model)
        torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()))


def test_torch_sync_converter_finds_converted_layers() -> None:
    """Converted layers are instances of torch's classes, so nn.SyncBatchNorm.convert_sync_batchnorm finds them."""
    model = bnk.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synchronised[0]) is nn.SyncBatchNorm


def test_torch_conv_bn_folding_takes_converted_layers() -> None:
    """fuse_conv_bn_eval() folds a converted BatchNorm into a convolution."""
    conv, layer = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    layer(torch.randn(8, 4, 3, 3))
    x = torch.randn(2, 3, 5, 5)
    model = bnk.convert(nn.Sequential(conv, layer).eval())
    fused = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(x), model(x))


def test_log_records(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), Custom(3), Custom(3), replaced())
    with caplog.at_level(logging.INFO, logger="bnkernels"):
        bnk.convert(model)
        bnk.revert(model)
    assert {record.name for record in caplog.records} == {"bnkernels"}
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "converted 2 BatchNorm modules of Sequential"
    assert "skipped 2 " in lines[1] and "Custom" in lines[1] and "subclass" in lines[1]
    assert "skipped 1 " in lines[2] and "forward was replaced" in lines[2]
    assert lines[3] == "reverted 2 BatchNorm modules of Sequential"
    assert len(lines) == 4
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="bnkernels"):
        bnk.convert(model)
    assert "0: nn.BatchNorm2d -> bnkernels.BatchNorm2d" in [record.getMessage() for record in caplog.records]


def test_report_as_text() -> None:
    report = bnk.ConversionReport()
    bnk.convert(nn.Sequential(nn.BatchNorm2d(3), Custom(3)), report=report)
    bnk.convert(nn.BatchNorm1d(3), report=report)
    assert str(report).splitlines() == [
        "2 BatchNorms changed, 1 skipped",
        "  0        nn.BatchNorm2d -> bnkernels.BatchNorm2d",
        "  (model)  nn.BatchNorm1d -> bnkernels.BatchNorm1d",
        f"  1        {__name__}.Custom skipped: a subclass, which may override forward",
    ]


def test_warning_if_nothing_changes() -> None:
    """The warning has counts and reasons. No warning if the layers are this package's already."""
    for model, why in (
        (nn.Sequential(nn.GroupNorm(1, 2)), "the model has none"),
        (nn.Sequential(Custom(2), Custom(2)), "2 x .*Custom: a subclass"),
    ):
        with pytest.warns(UserWarning, match=f"convert\\(\\) changed no BatchNorm of Sequential: {why}"):
            bnk.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnk.convert(bnk.convert(nn.BatchNorm2d(2)))


def test_argument_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not list"):
        bnk.convert([nn.BatchNorm2d(3)])  # type: ignore[type-var]
