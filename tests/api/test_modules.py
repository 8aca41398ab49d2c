"""Modules: everything of torch's interface except the arithmetic, and the state that training relies on."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import bnkernels as bnk

PAIRS = {
    nn.BatchNorm1d: bnk.BatchNorm1d,
    nn.BatchNorm2d: bnk.BatchNorm2d,
    nn.BatchNorm3d: bnk.BatchNorm3d,
}
LAZY_PAIRS = {
    nn.LazyBatchNorm1d: bnk.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: bnk.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: bnk.LazyBatchNorm3d,
}
SHAPES: dict[Any, list[tuple[int, ...]]] = {
    nn.BatchNorm1d: [(4, 3), (4, 3, 5)],
    nn.BatchNorm2d: [(4, 3, 5, 2)],
    nn.BatchNorm3d: [(4, 3, 2, 3, 2)],
}
HAS_BIAS = "bias" in inspect.signature(nn.BatchNorm1d.__init__).parameters  # not in torch 2.11
NO_BIAS: dict[str, dict[str, Any]] = {"no_bias": {"bias": False}} if HAS_BIAS else {}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "not_affine": {"affine": False},
    **NO_BIAS,
    "not_tracking": {"track_running_stats": False},
    "eps_momentum": {"eps": 1e-2, "momentum": 0.7},
    "float64": {"dtype": torch.float64},
    "plain": {"affine": False, "track_running_stats": False},
}

each_class = pytest.mark.parametrize("torch_class", PAIRS, ids=lambda cls: cls.__name__)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def pair(torch_class: Any, device: str = "cpu", **options: Any) -> tuple[Any, Any]:
    """torch's module and this package's, with equal nontrivial parameters and statistics."""
    torch_layer = torch_class(3, device=device, **options)
    with torch.no_grad():
        for tensor in [*torch_layer.parameters(), *torch_layer.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    ours = PAIRS[torch_class](3, device=device, **options)
    ours.load_state_dict(torch_layer.state_dict())
    return torch_layer, ours


def assert_same_state(ours: nn.Module, torch_layer: nn.Module) -> None:
    got, expected = ours.state_dict(), torch_layer.state_dict()
    assert list(got) == list(expected)
    torch.testing.assert_close(dict(got), dict(expected))


# Interface


@each_class
@each_option
def test_same_interface_as_torch(torch_class: Any, options: dict[str, Any]) -> None:
    torch_layer, ours = pair(torch_class, **options)
    assert isinstance(ours, torch_class)
    assert repr(ours) == repr(torch_layer)
    assert inspect.signature(type(ours)) == inspect.signature(torch_class)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in torch_layer.named_parameters()]
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in torch_layer.named_buffers()]
    fresh_ours, fresh_torch_layer = PAIRS[torch_class](3, **options), torch_class(3, **options)
    torch.testing.assert_close(dict(fresh_ours.state_dict()), dict(fresh_torch_layer.state_dict()), rtol=0, atol=0)


@each_class
@each_option
def test_state_dict_is_interchangeable(torch_class: Any, options: dict[str, Any]) -> None:
    torch_layer, ours = pair(torch_class, **options)
    assert ours.state_dict()._metadata == torch_layer.state_dict()._metadata
    assert torch_class(3, **options).load_state_dict(ours.state_dict()).missing_keys == []
    back = torch_class(3, **options)
    back.load_state_dict(ours.state_dict())
    assert_same_state(back, torch_layer)


def test_state_dict_of_version_1() -> None:
    """Version 1 has no num_batches_tracked: it loads, and the counter stays unchanged."""
    torch_layer, ours = pair(nn.BatchNorm2d)
    old = torch_layer.state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    ours.load_state_dict(old)
    assert ours.num_batches_tracked == 0
    current = torch_layer.state_dict()
    del current["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(current)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_duplicates(duplicate: Any) -> None:
    _, ours = pair(nn.BatchNorm2d)
    other = duplicate(ours)
    assert type(other) is bnk.BatchNorm2d
    assert_same_state(other, ours)
    ours(torch.randn(4, 3, 2, 2))
    assert other.num_batches_tracked == 0 and ours.num_batches_tracked == 1


# Errors


ERRORS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...], bool]] = {
    "1d_of_4d": (nn.BatchNorm1d, {}, (2, 3, 4, 4), True),
    "1d_of_1d": (nn.BatchNorm1d, {}, (3,), True),
    "2d_of_3d": (nn.BatchNorm2d, {}, (2, 3, 4), True),
    "3d_of_4d": (nn.BatchNorm3d, {}, (2, 3, 4, 4), False),
    "one_value": (nn.BatchNorm2d, {}, (1, 3, 1, 1), True),
    "one_value_untracked_eval": (nn.BatchNorm2d, {"track_running_stats": False}, (1, 3, 1, 1), False),
    "channels_train": (nn.BatchNorm2d, {}, (2, 4, 2, 2), True),
    "channels_eval": (nn.BatchNorm2d, {}, (2, 2, 2, 2), False),
    "channels_untracked": (nn.BatchNorm2d, {"track_running_stats": False}, (2, 2, 2, 2), True),
    "channels_not_affine": (nn.BatchNorm1d, {"affine": False}, (2, 65), True),
    "eps_zero": (nn.BatchNorm2d, {"eps": 0.0}, (2, 3, 2, 2), True),
    "eps_negative": (nn.BatchNorm2d, {"eps": -1.0}, (2, 3, 2, 2), True),
    "eps_negative_eval": (nn.BatchNorm2d, {"eps": -1.0}, (2, 3, 2, 2), False),
}


@pytest.mark.parametrize(("torch_class", "options", "shape", "training"), ERRORS.values(), ids=ERRORS)
def test_errors_match_torch(
    torch_class: Any, options: dict[str, Any], shape: tuple[int, ...], training: bool, device: str
) -> None:
    """Same type and message. Unlike torch's, a call that raises does not count its batch."""
    torch_layer, ours = pair(torch_class, device, **options)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(shape, device=device)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        torch_layer.train(training)(x)
    with pytest.raises(expected.type) as got:
        ours.train(training)(x)
    message = str(expected.value).splitlines()[0]
    if (
        "eps must be positive, but got" in message
    ):  # torch 2.11's text, for training and inference; ours is the newer one
        message = str(got.value)
        assert re.fullmatch(r"batch_norm eps must be (positive during training|non-negative), but got -?\d\.0", message)
    assert str(got.value).splitlines()[0] == message
    torch.testing.assert_close(dict(ours.state_dict()), dict(before), rtol=0, atol=0)


# State


@each_class
@each_option
def test_train_and_eval_steps(torch_class: Any, options: dict[str, Any], device: str) -> None:
    """Outputs and state match torch's while training and evaluation alternate."""
    torch_layer, ours = pair(torch_class, device, **options)
    for training in (True, True, False, True, False):
        for shape in SHAPES[torch_class]:
            x = torch.randn(shape, device=device, dtype=options.get("dtype"))
            torch.testing.assert_close(ours.train(training)(x), torch_layer.train(training)(x))
            assert_same_state(ours, torch_layer)


@each_option
def test_buffers_are_updated_in_place(options: dict[str, Any], device: str) -> None:
    """Graph capture, DDP and EMA hold the tensors: objects and memory stay, and the versions increase."""
    ours = bnk.BatchNorm2d(3, device=device, **options)
    before = {name: (b, b.data_ptr(), b._version, b.clone()) for name, b in ours.named_buffers()}
    ours(torch.randn(4, 3, 2, 2, device=device, dtype=options.get("dtype")))
    for name, buffer in ours.named_buffers():
        tensor, pointer, version, value = before[name]
        assert buffer is tensor and buffer.data_ptr() == pointer, name
        assert buffer._version > version, name
        assert not torch.equal(buffer, value), name


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_item_call(momentum: float | None) -> None:
    """The cumulative average uses 1/num_batches_tracked, which must not be read on the host: on a GPU that
    synchronizes."""

    class NoItem(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    torch_layer, ours = pair(nn.BatchNorm2d, momentum=momentum)
    x = torch.randn(4, 3, 2, 2)
    with NoItem():
        ours(x)
    if momentum is None:
        with pytest.raises(AssertionError), NoItem():
            torch_layer(x)


@pytest.mark.cuda
@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_synchronisation(momentum: float | None) -> None:
    ours = bnk.BatchNorm2d(3, momentum=momentum, device="cuda")
    x = torch.randn(4, 3, 8, 8, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)
    ours(x).backward(grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("built", [True, False], ids=["built_tracking", "built_not_tracking"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_track_running_stats_toggled(built: bool, momentum: float | None, device: str) -> None:
    """The flag controls updates; whether eval uses the statistics depends on whether they are None."""
    torch_layer, ours = pair(nn.BatchNorm2d, device, track_running_stats=built, momentum=momentum)
    for flag, training in [(not built, True), (not built, False), (built, True), (not built, True), (built, False)]:
        x = torch.randn(4, 3, 2, 2, device=device)
        for module in (ours, torch_layer):
            module.track_running_stats = flag
            module.train(training)
        torch.testing.assert_close(ours(x), torch_layer(x))
        assert_same_state(ours, torch_layer)


def test_cumulative_average_without_counter(device: str) -> None:
    """As in torch, the statistics are not updated: there is no count to average by."""
    torch_layer, ours = pair(nn.BatchNorm2d, device, momentum=None)
    torch_layer.num_batches_tracked = ours.num_batches_tracked = None
    x = torch.randn(4, 3, 2, 2, device=device)
    torch.testing.assert_close(ours(x), torch_layer(x))
    assert_same_state(ours, torch_layer)


def test_cumulative_average_is_the_average(device: str) -> None:
    ours = bnk.BatchNorm1d(3, momentum=None, device=device, dtype=torch.float64)
    batches = [torch.randn(7, 3, device=device, dtype=torch.float64) for _ in range(5)]
    for x in batches:
        ours(x)
    torch.testing.assert_close(ours.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(ours.running_var, torch.stack([x.var(0) for x in batches]).mean(0))


EMPTY = [(0, 3, 4, 4), (4, 3, 0, 4), (0, 3, 0, 0)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(shape: tuple[int, ...], momentum: float | None, training: bool, device: str) -> None:
    """The statistics stay, the batch is counted, the gradients are zero."""
    _, ours = pair(nn.BatchNorm2d, device, momentum=momentum)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(shape, device=device, requires_grad=True)
    y = ours.train(training)(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
    assert torch.equal(ours.weight.grad, torch.zeros(3, device=device))
    assert torch.equal(ours.bias.grad, torch.zeros(3, device=device))
    assert torch.equal(ours.running_mean, before["running_mean"])
    assert torch.equal(ours.running_var, before["running_var"])
    assert ours.num_batches_tracked == int(training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_channels(training: bool, device: str) -> None:
    ours = bnk.BatchNorm2d(0, device=device).train(training)
    x = torch.randn(4, 0, 2, 2, device=device, requires_grad=True)
    y = ours(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
    assert ours.weight.grad is not None and ours.weight.grad.shape == (0,)
    assert ours.num_batches_tracked == int(training)


# Lazy modules, parametrizations, functional_call, tensor subclasses


@pytest.mark.parametrize("torch_class", LAZY_PAIRS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("options", [{}, {"affine": False}, *NO_BIAS.values(), {"momentum": None}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_lazy(torch_class: Any, options: dict[str, Any], training: bool) -> None:
    torch_layer, ours = torch_class(**options).train(training), LAZY_PAIRS[torch_class](**options).train(training)
    assert isinstance(ours, torch_class) and repr(ours) == repr(torch_layer)
    x = torch.randn(SHAPES[torch_layer.cls_to_become][-1])
    torch.testing.assert_close(ours(x), torch_layer(x))
    assert type(ours) is PAIRS[type(torch_layer)] and repr(ours) == repr(torch_layer)
    assert_same_state(ours, torch_layer)
    torch.testing.assert_close(ours(x), torch_layer(x))


def test_lazy_takes_a_state_dict() -> None:
    torch_layer, _ = pair(nn.BatchNorm2d)
    ours = bnk.LazyBatchNorm2d()
    assert type(pickle.loads(pickle.dumps(ours))) is bnk.LazyBatchNorm2d
    ours.load_state_dict(torch_layer.state_dict())
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(ours(x), torch_layer(x))
    assert type(ours) is bnk.BatchNorm2d


def test_parametrized_weight() -> None:
    """A parametrized `weight` is a property and not among the module's parameters."""

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch_layer, ours = pair(nn.BatchNorm2d)
    for module in (torch_layer, ours):
        parametrize.register_parametrization(module, "weight", Twice())
    x = torch.randn(4, 3, 2, 2)
    for module in (torch_layer, ours):
        module(x).square().sum().backward()
    original = "parametrizations.weight.original"
    torch.testing.assert_close(ours.get_parameter(original).grad, torch_layer.get_parameter(original).grad)


def test_weight_that_is_a_plain_tensor() -> None:
    torch_layer, ours = pair(nn.BatchNorm2d)
    for module in (torch_layer, ours):
        del module.weight
        module.weight = torch.tensor([1.0, 2.0, 3.0])
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(ours(x), torch_layer(x))


def test_functional_call() -> None:
    """The given parameters and buffers are used, and the given buffers are updated."""
    torch_layer, ours = pair(nn.BatchNorm2d)
    state = {name: tensor.detach() + 1 for name, tensor in ours.state_dict().items()}
    state_copy, torch_state = copy.deepcopy(state), copy.deepcopy(state)
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(
        torch.func.functional_call(ours, state_copy, (x,)), torch.func.functional_call(torch_layer, torch_state, (x,))
    )
    torch.testing.assert_close(state_copy, torch_state)
    assert ours.num_batches_tracked == 0


def test_tensor_subclass() -> None:
    """The output has the subclass of the input, as in torch, and its __torch_function__ sees the call."""
    seen = []

    class Mine(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    torch_layer, ours = pair(nn.BatchNorm2d)
    x = torch.randn(4, 3, 2, 2)
    y = ours(x.as_subclass(Mine))
    assert type(y) is Mine and bnk.functional.batch_norm_tracked in seen
    torch.testing.assert_close(y.as_subclass(Tensor), torch_layer(x))
    assert_same_state(ours, torch_layer)
    z = bnk.batch_norm(x.as_subclass(Mine), None, None, training=True)
    assert type(z) is Mine and bnk.batch_norm in seen
