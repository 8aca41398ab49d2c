"""What fuse() returns: what it shares with the model, how it is stored, and what comes of known networks."""

from __future__ import annotations

import copy
import io
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from compatibility import cells, row
from fusing import (
    CHANNELS,
    CLOSE,
    RELUS,
    Branches,
    Model,
    assert_computes_the_same,
    calls,
    fused,
    images,
    prepared,
)
from torch import Tensor, nn

import bnkernels as bnk

# What is shared, kept and stored


class Whole(nn.Module):
    """State that no call uses, in an order that is not that of the calls; a module of two names; a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ModuleDict({"bn": nn.BatchNorm2d(2), "nothing": nn.Identity()})
        self.head = nn.Linear(CHANNELS, 2)
        self.body = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Dropout(0.5))
        self.same = self.body
        self.weights = nn.Parameter(torch.randn(2))
        self.register_buffer("mean", torch.randn(3, 1, 1))
        self.register_buffer("uncalled", torch.randn(2))
        self.register_buffer("passing", torch.randn(1), persistent=False)
        self.plain = torch.randn(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body((x - self.mean) * self.passing * self.plain + torch.ones(1))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def test_state() -> None:
    """Names, order, parameters and buffers are the model's; a checkpoint of either loads into the other."""
    model = Whole()
    result = bnk.fuse(model)
    assert list(result.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(result.parameters(), model.parameters(), strict=True))
    names = dict(result.named_buffers())
    assert all(names[name] is buffer for name, buffer in model.named_buffers())
    assert result.get_submodule("same.1") is result.get_submodule("body.1")

    other = Whole()
    stored, mine = io.BytesIO(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(result.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    torch.testing.assert_close(dict(other.state_dict()), mine)
    result.load_state_dict(Whole().state_dict())
    assert not torch.equal(model.head.weight, mine["head.weight"])
    result.load_state_dict(other.state_dict())
    torch.testing.assert_close(dict(model.state_dict()), mine)


def test_the_model_stays_as_it_was() -> None:
    """Its modules are what they were and compute what they did, with a hook that is theirs alone."""
    model = prepared(Model(lambda m, y, skip: m.relu_in_place(y + skip)))
    before, expected = copy.deepcopy(model), [type(module) for module in model.modules()]
    layer = model.bn
    result = bnk.fuse(model)
    assert model.bn is layer and [type(module) for module in model.modules()] == expected
    assert_computes_the_same(model, before, images())
    layer.register_forward_hook(lambda *_: pytest.fail("the hook of another module"))
    result(images())


@pytest.mark.parametrize("of_result", [True, False], ids=["the result's", "the model's"])
def test_both_keep_in_step(of_result: bool) -> None:
    """to() puts new tensors in the place of buffers; loading with assign=True in the place of parameters too."""
    model = Model(RELUS["nn.ReLU"])
    result = bnk.fuse(model)
    one = result if of_result else model
    one.double()
    one.load_state_dict(one.state_dict(), assign=True)
    model(images()).sum().backward()
    result(images())
    assert all(getattr(model.bn, name) is getattr(result.bn, name) for name in model.bn.state_dict())
    assert model.bn.num_batches_tracked == 2


def test_an_optimizer_of_the_model_goes_on() -> None:
    model = prepared(Model(RELUS["nn.ReLU"]))
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, other)]
    for each, optimizer in zip((bnk.fuse(model), other), optimizers):
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            each(images()).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), **CLOSE)


def stored_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


AGAIN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": stored_whole,
    "fuse": lambda model: bnk.fuse(copy.deepcopy(model)),
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
def test_the_result_again(again: Callable[[nn.Module], nn.Module]) -> None:
    result, *_ = fused(Branches())
    other = again(result)
    assert other.get_submodule("skip.1").activation == "relu" and calls(other) == calls(result)  # type: ignore[arg-type]
    assert_computes_the_same(other, result, images())


def test_compiled() -> None:
    result, *_ = fused(model := Branches())
    result.compile(backend="aot_eager", fullgraph=True)
    assert_computes_the_same(result, model, images())


def test_exported() -> None:
    result, *_ = fused(model := Branches())
    x = images()
    program = torch.export.export(result.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model.eval()(x), **CLOSE)


def test_reverted() -> None:
    """torch has no such layer: revert() says so, and the model stays right."""
    result, *_ = fused(model := Branches())
    report = bnk.ConversionReport()
    bnk.revert(result, report=report)
    assert [skip.name for skip in report.skipped] == ["skip.1"] and "activation" in report.skipped[0].reason
    assert_computes_the_same(result, model, images())


# Models as people have them


def torchvision_resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=5)


def torchvision_resnet50() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet50(num_classes=5)


def timm_resnet10t() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=5)


# (blocks, BatchNorms in each, in the stem, of branches that change the shape)
STRUCTURES = {
    torchvision_resnet18: (8, 2, 1, 3),
    torchvision_resnet50: (16, 3, 1, 4),
    timm_resnet10t: (4, 2, 3, 3),
}


@row(
    "Fusion",
    "fuse() of torchvision's and timm's residual networks",
    cells(training=(True,), compiled=(False,), channels_last=(False,)),
)
@pytest.mark.parametrize("make", STRUCTURES, ids=lambda make: make.__name__)
def test_a_residual_network(make: Callable[[], nn.Module]) -> None:
    """Each addition and each ReLU has become part of a BatchNorm; what is left is a residual."""
    blocks, norms, stem, downsampling = STRUCTURES[make]
    report = bnk.FusionReport()
    model = make().double()
    result = bnk.fuse(copy.deepcopy(model), report=report)
    whats = Counter(fusion.what for fusion in report.fused)
    assert whats == {"relu": stem + blocks * (norms - 1), "add + relu": blocks}
    assert len(report.left) == downsampling
    assert all(re.fullmatch(r"its result is the residual of layer\d\.0\.downsample\.\d", s.reason) for s in report.left)
    assert not any("relu" in name or "act" in name or "add" in name for name in calls(result))
    assert list(result.state_dict()) == list(model.state_dict())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    ys = [each.train()(x) for each in (result, model)]
    torch.testing.assert_close(*ys)
    for y in ys:
        y.square().mean().backward()
    torch.testing.assert_close(*([p.grad for p in each.parameters()] for each in (result, model)))
    torch.testing.assert_close(dict(result.named_buffers()), dict(model.named_buffers()))
    torch.testing.assert_close(result.eval()(x), model.eval()(x))
