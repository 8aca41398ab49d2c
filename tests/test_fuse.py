"""fuse(): what becomes part of a BatchNorm, what does not, and that the result computes what the model did."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing import (
    CHANNELS,
    CLOSE,
    RELUS,
    Behind,
    Branches,
    Model,
    assert_computes_the_same,
    calls,
    fused,
    images,
    with_hook,
)
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import bnkernels as bnk


def augmented(model: Model, y: Tensor, skip: Tensor) -> Tensor:
    y += skip
    return y


ADDS: dict[str, Behind] = {
    "bn + x": lambda m, y, skip: y + skip,
    "x + bn": lambda m, y, skip: skip + y,
    "bn += x": augmented,
    "iadd(bn, x)": lambda m, y, skip: operator.iadd(y, skip),
    "iadd(x, bn)": lambda m, y, skip: operator.iadd(skip, y),
    "torch.add(bn, x)": lambda m, y, skip: torch.add(y, skip),
    "torch.add(x, other=bn)": lambda m, y, skip: torch.add(skip, other=y),
    "torch.add(input=bn, other=x, alpha=1)": lambda m, y, skip: torch.add(input=y, other=skip, alpha=1),
    "bn.add(x)": lambda m, y, skip: y.add(skip),
    "x.add(other=bn)": lambda m, y, skip: skip.add(other=y),
    "bn.add_(x)": lambda m, y, skip: y.add_(skip),
    "x.add_(bn)": lambda m, y, skip: skip.add_(y),
    "bn + a parameter, broadcast": lambda m, y, _: y + m.offset,
    "nn.Identity between": lambda m, y, skip: m.nothing(y) + m.nothing(skip),
}


@pytest.mark.parametrize("behind", RELUS.values(), ids=RELUS)
def test_relu(behind: Behind) -> None:
    result, what, _ = fused(model := Model(behind))
    assert what == {"bn": "relu"} and calls(result) == {"conv", "bn", "skip"}
    assert_computes_the_same(result, model, images())


@pytest.mark.parametrize("activation", [True, False], ids=["and a ReLU", "alone"])
@pytest.mark.parametrize("behind", ADDS.values(), ids=ADDS)
def test_addition(behind: Behind, activation: bool) -> None:
    """The residual is computed after the BatchNorm's input here: the call has to move."""
    model = Model((lambda m, y, skip: m.relu(behind(m, y, skip))) if activation else behind)
    result, what, _ = fused(model)
    assert what == {"bn": "add + relu" if activation else "add"} and calls(result) == {"conv", "bn", "skip"}
    assert_computes_the_same(result, model, images())


NORMS = {
    "nn.BatchNorm1d": (nn.BatchNorm1d, bnk.BatchNorm1d, 3),
    "nn.BatchNorm2d": (nn.BatchNorm2d, bnk.BatchNorm2d, 4),
    "nn.BatchNorm3d": (nn.BatchNorm3d, bnk.BatchNorm3d, 5),
    "bnk.BatchNorm1d": (bnk.BatchNorm1d, bnk.BatchNorm1d, 2),
    "bnk.BatchNorm2d": (bnk.BatchNorm2d, bnk.BatchNorm2d, 4),
    "bnk.BatchNorm3d": (bnk.BatchNorm3d, bnk.BatchNorm3d, 5),
}


@pytest.mark.parametrize(("norm", "ours", "rank"), NORMS.values(), ids=NORMS)
def test_each_class(norm: Any, ours: type[nn.Module], rank: int) -> None:
    """And options of theirs; in a Sequential."""
    model = nn.Sequential(nn.Identity(), norm(CHANNELS, eps=0.1, momentum=None, affine=False), nn.ReLU())
    result, what, _ = fused(model)
    assert what == {"1": "relu"} and type(result.get_submodule("1")) is ours
    assert_computes_the_same(result, model, torch.randn(6, CHANNELS, *range(2, rank), dtype=torch.float64))


def test_two_batch_norms_added() -> None:
    """The later takes the other's result: nothing moves."""
    result, what, left = fused(model := Branches())
    assert what == {"skip.1": "add + relu"} and left == {"main.1": "its result is the residual of skip.1"}
    assert_computes_the_same(result, model, images())


def test_two_batch_norms_added_one_of_which_cannot() -> None:
    """What is left leaves the addition to the other: for its class, or because it is called at another place."""
    model = Branches()
    model.skip[1] = Custom(CHANNELS)
    result, what, _ = fused(model)
    assert what == {"main.1": "add + relu"}
    assert_computes_the_same(result, model, images())

    model = Model(lambda m, y, skip: m.other_bn(y + m.other_bn(skip)))
    result, what, _ = fused(model)
    assert what == {"bn": "add"}
    assert_computes_the_same(result, model, images())


def test_two_additions_in_a_row() -> None:
    """Three branches: one sum is the residual of the next."""
    model = Model(lambda m, y, skip: m.relu(m.other_bn(skip) + y + skip))
    result, what, left = fused(model)
    assert what == {"other_bn": "add"} and left == {"bn": "its result is the residual of other_bn"}
    assert_computes_the_same(result, model, images())

    model = Model(lambda m, y, skip: m.relu((skip + m.other_bn(skip)) + y))
    result, what, _ = fused(model)
    assert what == {"bn": "add + relu", "other_bn": "add"} and calls(result) == {"conv", "bn", "skip", "other_bn"}
    assert_computes_the_same(result, model, images())


# What is left


class Custom(nn.BatchNorm2d):
    """A subclass, whose forward is its own, and which cannot be traced."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def replaced() -> nn.Module:
    module = nn.BatchNorm2d(CHANNELS)
    module.forward = lambda input: input * 2  # type: ignore[method-assign]
    return module


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    module = nn.BatchNorm2d(CHANNELS)
    parametrize.register_parametrization(module, "weight", Twice())
    return module


LEFT: dict[str, tuple[Behind, Callable[[], nn.Module | None], str]] = {
    "used elsewhere": (lambda m, y, _: m.relu(y) + y.sum(), lambda: None, "used in 2 places"),
    "used elsewhere, ReLU in place": (lambda m, y, _: (y.relu_(), y.exp())[1], lambda: None, "used in 2 places"),
    "another layer": (lambda m, y, _: torch.sigmoid(y), lambda: None, "followed by sigmoid"),
    "another module": (lambda m, y, _: m.conv(y[:, :3]), lambda: None, "followed by getitem"),
    "the output": (lambda m, y, _: y, lambda: None, "followed by output"),
    "a number": (lambda m, y, _: m.relu(y + 1.0), lambda: None, "added to 1.0, which is no tensor"),
    "a size": (lambda m, y, s: m.relu(y + s.size(0)), lambda: None, "may be a number"),
    "a number of the input's": (lambda m, y, s: m.relu(y + s.shape[0] * 2), lambda: None, "may be a number"),
    "itself": (lambda m, y, _: m.relu(y + y), lambda: None, "added to itself"),
    "alpha": (lambda m, y, s: m.relu(torch.add(y, s, alpha=2)), lambda: None, "followed by add"),
    "in place, to the input's view": (
        lambda m, y, s: s.view(s.shape).add_(y),
        lambda: None,
        "writes to a tensor that others may see",
    ),
    "in place, to what is used again": (
        lambda m, y, s: (s.add_(y), s)[1] * 2,
        lambda: None,
        "writes to a tensor that others may see",
    ),
    "in a ReLU of another kind": (lambda m, y, _: F.relu6(y), lambda: None, "followed by relu6"),
    "subclass": (RELUS["nn.ReLU"], lambda: Custom(CHANNELS), "a subclass"),
    "parametrized": (RELUS["nn.ReLU"], parametrized, "a subclass"),
    "forward replaced": (RELUS["nn.ReLU"], replaced, "forward has been replaced"),
    "hooks": (RELUS["nn.ReLU"], lambda: with_hook(nn.BatchNorm2d(CHANNELS)), "hooks"),
    "hooks, ours": (RELUS["nn.ReLU"], lambda: with_hook(bnk.BatchNorm2d(CHANNELS)), "hooks"),
    "activation": (RELUS["nn.ReLU"], lambda: bnk.BatchNorm2d(CHANNELS, activation="relu"), "an activation already"),
    "called twice, once alone": (lambda m, y, s: m.relu(y) * m.bn(s), lambda: None, "called 2 times"),
    "called twice, otherwise": (lambda m, y, s: m.relu(y) * m.relu(m.bn(s) + s), lambda: None, "called 2 times"),
    "the ReLU has hooks": (lambda m, y, _: m.relu_with_hook(y), lambda: None, "followed by ReLU"),
    "SyncBatchNorm": (RELUS["nn.ReLU"], lambda: bnk.SyncBatchNorm(CHANNELS), "SyncBatchNorm"),
}


@pytest.mark.parametrize(("behind", "norm", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left(behind: Behind, norm: Callable[[], nn.Module | None], reason: str) -> None:
    """Reported with the reason, and right."""
    result, what, left = fused(model := Model(behind, norm()))
    assert "bn" not in what and reason in left["bn"]
    with torch.no_grad():  # what is written in place may not be differentiable
        for _ in range(2):
            x = images()
            torch.testing.assert_close(result(x), model(x), **CLOSE)
    torch.testing.assert_close(dict(result.named_buffers()), dict(model.named_buffers()), **CLOSE)


def test_a_sum_that_is_used_elsewhere() -> None:
    """The ReLU then stays, the addition need not."""

    def behind(model: Model, y: Tensor, skip: Tensor) -> Tensor:
        total = y + skip
        return model.relu(total) * total

    result, what, _ = fused(model := Model(behind))
    assert what == {"bn": "add"} and "relu" in calls(result)
    assert_computes_the_same(result, model, images())


class Between(nn.Module):
    """Something happens to a BatchNorm's input, or to a view of its memory, before its result is added."""

    def __init__(self, happens: Callable[[Tensor], Any], of_view: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)
        self.happens, self.of_view, self.skip = happens, of_view, nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        view = z.view_as(z)
        y = self.bn(z)
        self.happens(view if self.of_view else z)
        return y + self.skip(z)  # type: ignore[no-any-return]


HAPPENS: dict[str, tuple[Callable[[Tensor], Any], dict[str, str]]] = {
    "nothing": (lambda z: z, {"bn": "add"}),
    "it is read": (lambda z: torch.relu(z), {"bn": "add"}),
    "it is written": (lambda z: z.mul_(2), {}),
    "it is written by an argument": (lambda z: torch.neg(z, out=z), {}),
    "its view is written": (lambda z: z.flatten()[3:].mul_(2), {}),
}


@pytest.mark.parametrize("of_view", [False, True], ids=["the input", "a view of it"])
@pytest.mark.parametrize(("happens", "expected"), HAPPENS.values(), ids=HAPPENS)
def test_its_input_between_it_and_the_addition(
    happens: Callable[[Tensor], Any], expected: dict[str, str], of_view: bool
) -> None:
    """The fused call reads its input where the addition was."""
    result, what, left = fused(model := Between(happens, of_view))
    assert what == expected and ("bn" in what or "may change its input" in left["bn"])
    x = images()
    with torch.no_grad():  # writing to what a layer has saved cannot be differentiated
        torch.testing.assert_close(result(x), model(x), **CLOSE)


def test_called_at_several_places() -> None:
    """Fused where all calls are alike, in the same order: the running statistics depend on it."""
    model = Model(lambda m, y, skip: m.relu(y) * m.relu(m.bn(skip)))
    result, what, _ = fused(model)
    assert what == {"bn": "relu"}
    assert_computes_the_same(result, model, images())

    def crossed(model: Model, y: Tensor, skip: Tensor) -> Tensor:
        again = model.bn(skip)
        return (y + skip) * (again + skip)  # type: ignore[no-any-return]

    result, what, left = fused(model := Model(crossed))
    assert what == {} and "called 2 times" in left["bn"]
    assert_computes_the_same(result, model, images())


class Given(nn.Module):
    """A BatchNorm of this package that is given a residual by the model itself."""

    def __init__(self, behind: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.behind = nn.Conv2d(3, CHANNELS, 1), bnk.BatchNorm2d(CHANNELS), behind

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.behind(self.bn(z, z), z)


def test_a_residual_that_is_there() -> None:
    """A ReLU can still be fused, another addition cannot."""
    result, what, _ = fused(model := Given(lambda y, z: torch.relu(y)))
    assert what == {"bn": "relu"}
    assert_computes_the_same(result, model, images())
    _, what, left = fused(Given(lambda y, z: torch.relu(y + z)))
    assert what == {} and "a residual already" in left["bn"]


def test_lazy() -> None:
    report = bnk.FusionReport()
    model = nn.Sequential(bnk.LazyBatchNorm2d(), nn.ReLU())
    bnk.fuse(model, report=report)
    assert "run the model once" in report.left[0].reason
    model(torch.randn(2, 3, 2, 2))
    bnk.fuse(model, report=report)
    assert [fusion.what for fusion in report.fused] == ["relu"]


# What is said, and what is refused


def test_the_report_as_text(caplog: pytest.LogCaptureFixture) -> None:
    report = bnk.FusionReport()
    with caplog.at_level(logging.INFO, logger="bnkernels"):
        bnk.fuse(Branches(), report=report)
    assert str(report).splitlines() == [
        "1 BatchNorms fused, 1 left as they are",
        "  skip.1  add + relu",
        "  main.1  left: its result is the residual of skip.1",
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "fused 1 BatchNorm modules of Branches",
        "left 1 as they are: its result is the residual of skip.1",
    ]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_what_cannot_be_traced() -> None:
    """The error names the module and the line, says what to do, and comes from torch's."""
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.Sequential(Gate()))
    with pytest.raises(ValueError, match=rf"cannot trace Gate '1\.0' \({__file__}:\d+\)") as raised:
        bnk.fuse(model)
    assert "model.layer1 = bnk.fuse(model.layer1)" in str(raised.value)
    assert isinstance(raised.value.__cause__, fx.proxy.TraceError)
    model[0] = bnk.fuse(model[0])  # type: ignore[arg-type]
    model(torch.randn(2, 3, 2, 2))


class GateIsALeaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Gate) or super().is_leaf_module(m, module_qualified_name)


def test_a_tracer_of_ones_own() -> None:
    gate = Gate()
    gate.bn = nn.BatchNorm2d(3)
    report = bnk.FusionReport()
    result = bnk.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), gate), report=report, tracer=GateIsALeaf())
    assert [fusion.name for fusion in report.fused] == ["0"] and result.get_submodule("2") is gate
    assert [(skip.name, skip.reason) for skip in report.left] == [
        ("2.bn", "the trace has no call of it: it is unused, or within a leaf")
    ]


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not list"):
        bnk.fuse([nn.BatchNorm2d(3)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="BatchNorm2d itself"):
        bnk.fuse(nn.BatchNorm2d(3))
