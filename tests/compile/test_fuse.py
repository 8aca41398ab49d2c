"""fuse(): what becomes part of a BatchNorm, what does not, and that the model computes the same."""

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
    RELUS,
    After,
    Branches,
    Model,
    assert_computes_the_same,
    fused,
    images,
    reasons,
    whats,
    with_hook,
)
from torch import Tensor, nn

import bnkernels as bnk


def augmented(model: Model, y: Tensor, skip: Tensor) -> Tensor:
    y += skip
    return y


ADDS: dict[str, After] = {
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
    "nn.Identity between": lambda m, y, skip: m.nothing(y) + m.nothing(skip),
}


@pytest.mark.parametrize("after", RELUS.values(), ids=RELUS)
def test_relu(after: After) -> None:
    result, report = fused(model := Model(after))
    assert_computes_the_same(result, model, images())
    assert whats(report) == {"bn": "relu"}


@pytest.mark.parametrize("after", ADDS.values(), ids=ADDS)
def test_addition(after: After) -> None:
    """The residual is computed after the BatchNorm's input, so the call has to move."""
    result, report = fused(model := Model(lambda m, y, skip: m.relu(after(m, y, skip))))
    assert_computes_the_same(result, model, images())
    assert whats(report) == {"bn": "add + relu"}


def test_addition_alone() -> None:
    result, report = fused(model := Model(lambda m, y, skip: (y + skip).exp()))
    assert_computes_the_same(result, model, images())
    assert whats(report) == {"bn": "add"}


NORMS = {
    "nn.BatchNorm1d": (nn.BatchNorm1d, 3),
    "nn.BatchNorm3d": (nn.BatchNorm3d, 5),
    "bnk.BatchNorm1d": (bnk.BatchNorm1d, 2),
    "bnk.BatchNorm2d": (bnk.BatchNorm2d, 4),
    "bnk.BatchNorm3d": (bnk.BatchNorm3d, 5),
}


@pytest.mark.parametrize(("norm", "rank"), NORMS.values(), ids=NORMS)
def test_each_class(norm: Any, rank: int) -> None:
    """Each class with some options, in a Sequential. A layer without parameters and statistics is named by its path."""
    options = {"momentum": None} if norm.__module__.startswith("bnkernels") else {"track_running_stats": False}
    model = nn.Sequential(nn.Identity(), norm(CHANNELS, eps=0.1, affine=False, **options), nn.ReLU())
    result, report = fused(model)
    assert_computes_the_same(result, model, torch.randn(6, CHANNELS, *range(2, rank), dtype=torch.float64))
    assert whats(report) == {"1": "relu"}


def test_torch_layer_with_momentum_none() -> None:
    """torch reads the counter on the host, which breaks the graph: values computed from it are unknown in the next."""
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.ReLU())
    result, _ = fused(model)
    assert_computes_the_same(result, model, images())


def test_two_batch_norms_added() -> None:
    """The later BatchNorm takes the output of the other as its residual: no call moves."""
    result, report = fused(model := Branches())
    assert_computes_the_same(result, model, images())
    assert whats(report) == {"skip.1": "add + relu"} and "residual of another" in reasons(report)["main.1"]


def test_two_batch_norms_added_one_not_fusible() -> None:
    """The BatchNorm that cannot be fused leaves the addition to the other."""
    model = Branches()
    model.skip[1] = Custom(CHANNELS)
    result, report = fused(model)
    assert_computes_the_same(result, model, images())
    assert whats(report) == {"main.1": "add + relu"}


def test_two_additions_in_a_row() -> None:
    """Three branches: one sum is the residual of the next."""
    result, report = fused(model := Model(lambda m, y, skip: m.relu((skip + m.other_bn(skip)) + y)))
    assert_computes_the_same(result, model, images())
    assert whats(report) == {"bn": "add + relu", "other_bn": "add"}


def test_called_twice() -> None:
    """The order of the calls stays, as the running statistics depend on it. Each call is fused with what follows it."""
    twice: After = lambda m, y, skip: m.relu(y) * m.relu(m.bn(skip) + skip)  # noqa: E731
    result, report = fused(model := Model(twice, bnk.BatchNorm2d(CHANNELS)))
    assert_computes_the_same(result, model, images())
    assert [each.what for each in report.fused] == ["relu", "add + relu"]

    def crossed(model: Model, y: Tensor, skip: Tensor) -> Tensor:
        again = model.bn(skip)
        return (y + skip.square()) * (again + y.detach().exp())  # type: ignore[no-any-return]

    result, _ = fused(model := Model(crossed, bnk.BatchNorm2d(CHANNELS)))
    assert_computes_the_same(result, model, images())


def test_order_of_calls_is_preserved() -> None:
    """The first call must not move past the second, which would then update the statistics first."""

    def after(model: Model, y: Tensor, skip: Tensor) -> Tensor:
        again = model.bn(skip)
        return y + again.square()  # type: ignore[no-any-return]

    result, report = fused(model := Model(after, bnk.BatchNorm2d(CHANNELS)))
    assert_computes_the_same(result, model, images())
    assert any("may change its input" in each.reason for each in report.left)


# Not fused


class Custom(nn.BatchNorm2d):
    """A subclass with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def in_place_statement(model: Model, y: Tensor, skip: Tensor) -> Tensor:
    y.relu_()
    return y.exp()


def with_relu() -> nn.Module:
    return bnk.BatchNormAct2d(CHANNELS)


NOT_FUSED: dict[str, tuple[After, Callable[[], nn.Module | None], str]] = {
    "used elsewhere": (lambda m, y, _: m.relu(y) + y.sum(), lambda: None, "used in 2 places"),
    "used elsewhere, ReLU in place": (in_place_statement, lambda: None, "used in 2 places"),
    "a view is used": (lambda m, y, _: m.relu(y) + y.view(-1)[0], lambda: None, "used in 2 places"),
    "another layer": (lambda m, y, _: torch.sigmoid(y), lambda: None, "followed by sigmoid"),
    "another activation": (lambda m, y, _: F.relu6(y), lambda: None, "followed by relu6"),
    "the output": (lambda m, y, _: y, lambda: None, "leaves the captured graph"),
    "the output, and a ReLU": (lambda m, y, _: (y, m.relu(y)), lambda: None, "used in 2 places"),
    "a number": (lambda m, y, _: m.relu(y + 1.0), lambda: None, "added to something that is not a plain tensor"),
    "a size": (lambda m, y, s: m.relu(y + s.size(0)), lambda: None, "added to something that is not a plain tensor"),
    "itself": (lambda m, y, _: m.relu(y + y), lambda: None, "added to itself"),
    "alpha": (lambda m, y, s: m.relu(torch.add(y, s, alpha=2)), lambda: None, "followed by add"),
    "broadcast": (lambda m, y, _: m.relu(y + m.offset), lambda: None, "another shape"),
    "another dtype": (lambda m, y, s: m.relu(y + s.float()), lambda: None, "another shape, layout, dtype"),
    "another layout": (
        lambda m, y, s: m.relu(y + s.contiguous(memory_format=torch.channels_last)),
        lambda: None,
        "another shape, layout",
    ),
    "in place, to what is used again": (lambda m, y, s: (s.add_(y), s)[1] * 2 + s, lambda: None, "with other users"),
    "an activation of its own, and an addition": (lambda m, y, s: y + s, with_relu, "has an activation already"),
    "an activation of its own, and add + relu": (lambda m, y, s: m.relu(y + s), with_relu, "an activation already"),
    "an activation of its own, and another": (lambda m, y, _: m.relu(y), with_relu, "has an activation already"),
    "subclass": (RELUS["nn.ReLU"], lambda: Custom(CHANNELS), "followed by mul"),
    "hooks": (
        RELUS["nn.ReLU"],
        lambda: with_hook(nn.BatchNorm2d(CHANNELS)),
        "added to something that is not a plain tensor",
    ),
    "hooks, ours": (RELUS["nn.ReLU"], lambda: with_hook(bnk.BatchNorm2d(CHANNELS)), "not a plain tensor"),
}


@pytest.mark.parametrize(("after", "norm", "reason"), NOT_FUSED.values(), ids=NOT_FUSED)
def test_not_fused(after: After, norm: Callable[[], nn.Module | None], reason: str) -> None:
    """Reported with the reason, and the result is unchanged."""
    result, report = fused(model := Model(after, norm()))
    assert_computes_the_same(result, model, images())
    name = "bn.bn" if isinstance(model.bn, bnk.BatchNormAct2d) else "bn"
    assert name not in whats(report) and reason in reasons(report)[name]


# In-place writes between the calls. Without gradients, as autograd rejects most of them


def written(m: Model, y: Tensor, skip: Tensor, what: Tensor) -> Tensor:
    what.mul_(3)
    return m.relu(y + skip)  # type: ignore[no-any-return]


class Between(nn.Module):
    """An operation on memory between a BatchNorm and the addition to its output."""

    def __init__(self, operation: Callable[..., Any], of: str, early: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)
        self.operation, self.of, self.early = operation, of, early

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        residual = z * 2 if self.early else None
        view = (z if self.of == "input" else residual if residual is not None else z).view(-1, 5)
        y = self.bn(z)
        self.operation({"weight": self.bn.weight, "mean": self.bn.running_mean}.get(self.of, view))
        return F.relu(y + (z * 2 if residual is None else residual))


def into_half(value: Tensor) -> None:
    value[: len(value) // 2] = 1.0


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda value: value.mul_(2),
    "out=": lambda value: torch.neg(value, out=value),
    "setitem": into_half,
    "inplace, by position": lambda value: F.relu(value, True),
    "inplace, by keyword": lambda value: F.elu(value, inplace=True),
    "foreach": lambda value: torch._foreach_mul_([value], 2.0),
    "iadd": lambda value: operator.iadd(value, 1.0),
}


@pytest.mark.parametrize(("of", "early"), [("input", False), ("residual", True), ("weight", False), ("mean", False)])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_memory_written_in_between(operation: Callable[[Tensor], Any], of: str, early: bool) -> None:
    """A fused call would read its input where the addition was, or its residual where the BatchNorm was."""
    result, report = fused(model := Between(operation, of, early))
    assert_computes_the_same(result, model, images(), differentiates=False)
    assert whats(report) == {}
    assert all("may change" in each.reason or "a mode may" in each.reason for each in report.left)


@pytest.mark.parametrize(("of", "early"), [("input", False), ("residual", True)])
def test_memory_read_in_between(of: str, early: bool) -> None:
    result, report = fused(model := Between(lambda value: value.sum(), of, early))
    assert_computes_the_same(result, model, images())
    assert whats(report) == {"bn": "add + relu"}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bnk.BatchNorm2d], ids=["torch", "bnkernels"])
@pytest.mark.parametrize("which", ["running_mean", "running_var", "num_batches_tracked"])
def test_statistics_read_in_between(which: str, norm: Callable[[int], nn.Module]) -> None:
    """The residual is computed from statistics, which in training must be read after the BatchNorm has updated them."""

    def after(model: Model, y: Tensor, skip: Tensor) -> Tensor:
        return model.relu(y + skip * getattr(model.bn, which).sum())  # type: ignore[no-any-return]

    result, report = fused(model := Model(after, norm(CHANNELS)))
    assert_computes_the_same(result, model, images())
    if norm is bnk.BatchNorm2d or which != "num_batches_tracked":  # torch increments it with a separate op, before
        assert "may change its input" in reasons(report)["bn"]


class AddInto(nn.Module):
    """The sum is written to a tensor of the caller."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.add = nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), add

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.relu(self.add(target, self.bn(self.conv(x))))


INTO: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "iadd": (operator.iadd, "with other users"),
    "add_": (lambda target, y: target.add_(y), "with other users"),
    "add_ to a view": (lambda target, y: target.view(target.shape).add_(y), "with other users"),
    "torch.add(target, bn, out=target)": (lambda target, y: torch.add(target, y, out=target), "followed by add"),
    "torch.add(bn, target, out=target)": (lambda target, y: torch.add(y, target, out=target), "followed by add"),
    "torch.add(bn, other, out=target)": (lambda target, y: torch.add(y, target * 2, out=target), "followed by add"),
}


@pytest.mark.parametrize(("add", "reason"), INTO.values(), ids=INTO)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sum_written_to_the_callers_tensor(
    add: Callable[[Tensor, Tensor], Tensor], reason: str, training: bool
) -> None:
    """A fused call would return the sum without writing to the caller's tensor."""
    result, report = fused(model := AddInto(add))
    x, target = images(), torch.randn(4, CHANNELS, 5, 5, dtype=torch.float64)
    seen = []
    for each in (result, model):
        written = target.clone()
        with torch.no_grad():
            seen.append((each.train(training)(x, written), written))
    torch.testing.assert_close(*seen)
    assert not torch.equal(seen[0][1], target)
    assert whats(report) == {} and reason in reasons(report)["bn"]


def test_inputs_of_a_graph_may_overlap() -> None:
    """Inputs may share memory in a later call: no residual is read before a write to another input."""

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, residual: Tensor, scratch: Tensor) -> Tensor:
            y = self.bn(x)
            scratch.zero_()
            return F.relu(y + residual)

    result, report = fused(model := Takes())
    for each in (result.eval(), model.eval()):
        each(images(), images(), images())
    x, residual = images(), images() + 5
    ys = []
    for each in (result, model):
        memory = residual.clone()
        ys.append(each(x, memory, memory.view(-1)[:150].view(2, 3, 5, 5)))
    torch.testing.assert_close(*ys)
    assert whats(report) == {} and "may change its residual" in reasons(report)["bn"]


def under_no_grad(m: Model, y: Tensor, skip: Tensor) -> Tensor:
    with torch.no_grad():
        z = m.relu(y)
    return z + skip  # type: ignore[no-any-return]


def under_autocast(m: Model, y: Tensor, skip: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = m.relu(y)
    return z + skip  # type: ignore[no-any-return]


@pytest.mark.parametrize("after", [under_no_grad, under_autocast], ids=lambda f: f.__name__)
def test_mode_that_changes_in_between(after: After) -> None:
    result, report = fused(model := Model(after))
    assert_computes_the_same(result, model, images())
    assert whats(report) == {} and "a mode may change" in reasons(report)["bn"]


class WithResidual(nn.Module):
    """The model itself passes a residual to the BatchNorm."""

    def __init__(self, after: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.after = nn.Conv2d(3, CHANNELS, 1), bnk.BatchNorm2d(CHANNELS), after

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.after(self.bn(z, z), z)


def test_explicit_residual() -> None:
    """A ReLU can still be fused, another addition cannot."""
    result, report = fused(model := WithResidual(lambda y, z: torch.relu(y)))
    assert_computes_the_same(result, model, images())
    assert whats(report) == {"bn": "relu"}
    result, report = fused(model := WithResidual(lambda y, z: torch.relu(y + z)))
    assert_computes_the_same(result, model, images())
    assert whats(report) == {} and "a residual already" in reasons(report)["bn"]


# Report and errors


def test_report_as_text(caplog: pytest.LogCaptureFixture) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.unused = Branches(), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)  # type: ignore[no-any-return]

    result, report = fused(Whole())
    assert str(report).splitlines()[0].startswith("0 BatchNorms fused; 3 left: 3 x not captured yet")
    with caplog.at_level(logging.INFO, logger="bnkernels"):
        result(images())
    assert str(report).splitlines() == [
        "1 BatchNorms fused, 1 x add + relu; 2 left: 1 x its result is the residual of another BatchNorm; "
        "1 x not captured yet: no captured graph has called it since fuse()",
        "  block.skip.1  add + relu",
        "  block.main.1  left: its result is the residual of another BatchNorm",
        "  unused        left: not captured yet: no captured graph has called it since fuse()",
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "block.main.1: left: its result is the residual of another BatchNorm",
        "block.skip.1: add + relu",
    ]


def test_invalid_arguments() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not list"):
        bnk.fuse([nn.BatchNorm2d(3)])  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not list"):
        bnk.unfuse([nn.BatchNorm2d(3)])  # type: ignore[type-var]
    with pytest.raises(ValueError, match="BatchNorm2d itself"):
        bnk.fuse(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="backend must be one of 'bnkernels', 'bnkernels_inductor', but got 'nvfuser'"):
        bnk.fuse(Branches(), backend="nvfuser")
    compiled = Branches()
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="already compiled"):
        bnk.fuse(compiled)
