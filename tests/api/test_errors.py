"""Calls that raise: their messages, and that they leave the running statistics unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import bnkernels as bnk
from bnkernels import _ops as ops
from bnkernels import testing

SHAPE = (4, 3, 5, 2)
Arguments = dict[str, Any]


def images() -> Tensor:
    return torch.randn(SHAPE)


# Entry points. Each takes all arguments of a training call.


def by_function(num_batches_tracked: object, **given: Any) -> Tensor:
    return bnk.batch_norm(**given, training=True)


def with_relu(activation: str | None, **given: Any) -> Tensor:
    return by_function(**given, activation=activation or "relu")


def without_gradients(**given: Any) -> Tensor:
    with torch.no_grad():
        return by_function(**given)


def in_forward_mode(**given: Any) -> Tensor:
    with forward_ad.dual_level():
        return by_function(**given)


def by(make: Callable[[], nn.Module]) -> Callable[..., Any]:
    """A layer whose parameters and buffers are replaced by the given objects."""

    def call(input: Any, residual: Any, activation: None, **given: Any) -> Any:
        layer = make()
        norm = layer.bn if isinstance(layer, bnk.BatchNormAct2d) else layer
        for name, value in given.items():
            delattr(norm, name)
            setattr(norm, name, value)
        return layer(input) if residual is None else layer(input, residual)

    return call


def by_op(op: Callable[..., Any], relu: bool) -> Callable[..., Any]:
    def call(input: Any, residual: Any, activation: None, **given: Any) -> Any:
        return op(input, **given, residual=residual, relu=relu)

    return call


PLAIN = {"input", "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "momentum", "eps"}
FUNCTION = (PLAIN | {"residual", "activation"}) - {"num_batches_tracked"}
ENTRY_POINTS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "batch_norm": (by_function, FUNCTION),
    "batch_norm with a ReLU": (with_relu, FUNCTION),
    "batch_norm without gradients": (without_gradients, FUNCTION),
    "batch_norm in forward mode": (in_forward_mode, FUNCTION),
    "BatchNorm2d": (by(lambda: bnk.BatchNorm2d(3)), PLAIN | {"residual"}),
    "BatchNormAct2d": (by(lambda: bnk.BatchNormAct2d(3)), PLAIN | {"residual"}),
    "SyncBatchNorm": (by(lambda: bnk.SyncBatchNorm(3)), PLAIN | {"residual"}),
    **{
        f"{name}{', relu' * relu}": (by_op(op, relu), PLAIN | {"residual"})
        for relu in (False, True)
        for name, op in (
            ("forward_train", ops.forward_train),
            ("train_op", ops.train_op),
            ("train_functional", ops.train_functional),
        )
    },
}


def arguments() -> Arguments:
    return {
        "input": images(),
        "weight": torch.rand(3) + 0.5,
        "bias": torch.randn(3),
        "running_mean": torch.randn(3),
        "running_var": torch.rand(3) + 0.5,
        "num_batches_tracked": torch.tensor(3),
        "momentum": 0.1,
        "eps": 1e-5,
        "residual": None,
        "activation": None,
    }


def vectors(name: str) -> dict[str, Callable[[], Any]]:
    return {
        f"{name}: a list": lambda: [1.0, 2.0, 3.0],
        f"{name}: numpy": lambda: np.ones(3, dtype=np.float32),
        f"{name}: too large": lambda: torch.ones(4),
        f"{name}: float64": lambda: torch.ones(3, dtype=torch.float64),
        f"{name}: int64": lambda: torch.ones(3, dtype=torch.int64),
        f"{name}: another device": lambda: torch.ones(3, device="meta"),
        f"{name}: sparse": lambda: torch.ones(3).to_sparse(),
    }


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(5, 3, 2), torch.randn(4, 3, 2)], layout=layout)


INPUTS: dict[str, Callable[[], Any]] = {
    "a list": lambda: images().tolist(),
    "a list of tensors": lambda: [images(), images()],
    "numpy": lambda: images().numpy(),
    "None": lambda: None,
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "sparse": lambda: images().to_sparse(),
    "mkldnn": lambda: images().to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(images(), 0.1, 0, torch.quint8),
    "int64": lambda: images().long(),
    "bool": lambda: images().bool(),
    "complex": lambda: images().to(torch.complex64),
    "float8": lambda: images().to(torch.float8_e4m3fn),
    "another device": lambda: images().to("meta"),
}
BAD: dict[str, Callable[[], Any]] = {
    **{f"input: {kind}": make for kind, make in INPUTS.items()},
    "input: no dimension": lambda: torch.tensor(1.0),
    "input: one dimension": lambda: torch.randn(3),
    "input: other channels": lambda: torch.randn(4, 2, 5, 2),
    "input: one value per channel": lambda: torch.randn(1, 3, 1, 1),
    **vectors("weight"),
    "weight: another dtype than bias": lambda: torch.ones(3, dtype=torch.float16),
    **vectors("bias"),
    **vectors("running_mean"),
    "running_mean: missing": lambda: None,
    "running_mean: overlaps itself": lambda: torch.ones(1).expand(3),
    "running_mean: a parameter": lambda: torch.ones(3, requires_grad=True),
    **vectors("running_var"),
    "running_var: missing": lambda: None,
    "running_var: overlaps itself": lambda: torch.ones(1).expand(3),
    "running_var: a parameter": lambda: torch.ones(3, requires_grad=True),
    "num_batches_tracked: a number": lambda: 3,
    "num_batches_tracked: int32": lambda: torch.tensor(3, dtype=torch.int32),
    "num_batches_tracked: two": lambda: torch.tensor([3, 3]),
    "num_batches_tracked: another device": lambda: torch.tensor(3, device="meta"),
    "momentum: a word": lambda: "fast",
    "eps: zero": lambda: 0.0,
    "eps: negative": lambda: -1e-5,
    "eps: a word": lambda: "small",
    "residual: a list": lambda: [1.0],
    "residual: numpy": lambda: images().numpy(),
    "residual: another shape": lambda: torch.randn(4, 3, 5, 7),
    "residual: another device": lambda: images().to("meta"),
    "residual: sparse": lambda: images().to_sparse(),
    "residual: quantized": lambda: torch.quantize_per_tensor(images(), 0.1, 0, torch.quint8),
    "activation: unknown": lambda: "gelu",
}
# Valid calls: ops do not track gradients, functional ops write to no argument, and torch adds a sparse residual.
VALID = (
    r"running_\w+: a parameter, by .*(without gradients|_train|_op|_functional)(, relu)?",
    r"running_\w+: overlaps itself, by .*_functional(, relu)?",
    r"residual: sparse, by batch_norm in forward mode",
)


CALLS = [
    (bad, entry_point)
    for bad in BAD
    for entry_point, (_, takes) in ENTRY_POINTS.items()
    if bad.split(":")[0] in takes and not any(re.fullmatch(right, f"{bad}, by {entry_point}") for right in VALID)
]


@pytest.mark.parametrize(("bad", "entry_point"), CALLS)
def test_failed_call_changes_nothing(bad: str, entry_point: str) -> None:
    """A call that raises leaves the values and versions of the running statistics and the counter, in every entry
    point."""
    name, call = bad.split(":")[0], ENTRY_POINTS[entry_point][0]
    given = arguments() | {name: BAD[bad]()}
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor) and not value.is_meta}
    state = {key: value for key, value in tensors.items() if key.startswith(("running", "num")) and not value.is_sparse}
    before = {key: (value.detach().clone(), value._version) for key, value in state.items()}
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        call(**given)
    for key, (value, version) in before.items():
        assert testing.same_bits(state[key].detach(), value) and state[key]._version == version, key


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_valid_call_updates_statistics(entry_point: str) -> None:
    """Control for the test above: the same call with valid arguments updates the running statistics."""
    given = arguments()
    before = given["running_mean"].clone()
    ENTRY_POINTS[entry_point][0](**given)
    assert torch.equal(given["running_mean"], before) == ("functional" in entry_point)


MESSAGES: dict[str, tuple[type[Exception], str]] = {
    "a list": (TypeError, "expected input to be a torch.Tensor, but got list: pass torch.tensor(input)"),
    "a list of tensors": (TypeError, "but got list: pass torch.stack(input) or torch.cat(input)"),
    "numpy": (TypeError, "but got numpy.ndarray: pass torch.from_numpy(input)"),
    "None": (TypeError, "but got NoneType: pass a tensor"),
    "nested": (
        NotImplementedError,
        "a nested tensor with layout torch.strided: pass the tensors of input.unbind(), or pad",
    ),
    "jagged": (
        NotImplementedError,
        "a nested tensor with layout torch.jagged: pass input.values(), with the channels in",
    ),
    "sparse": (
        NotImplementedError,
        "expected input to be a dense tensor, but got a tensor with layout torch.sparse_coo: pass",
    ),
    "mkldnn": (NotImplementedError, "a tensor with layout torch._mkldnn: pass input.to_dense()"),
    "quantized": (NotImplementedError, "a quantized tensor, torch.quint8: pass input.dequantize(). To quantize"),
    "int64": (NotImplementedError, "for 'Long': expected an input of dtype float64, float32, float16 or bfloat16"),
    "bool": (NotImplementedError, "for 'Bool': expected an input of dtype float64"),
    "complex": (NotImplementedError, "for 'ComplexFloat': expected an input of dtype float64"),
    "float8": (NotImplementedError, "for 'Float8_e4m3fn': expected an input of dtype float64"),
    "another device": (RuntimeError, "on the input's device, meta, not cpu"),
}


PUBLIC = [name for name in ENTRY_POINTS if name.lower().startswith("batch") or "Sync" in name]


@pytest.mark.parametrize("entry_point", PUBLIC)
@pytest.mark.parametrize("kind", INPUTS)
def test_messages_about_input(kind: str, entry_point: str) -> None:
    """Layers and function say what was given, what is expected and what to do."""
    error, message = MESSAGES[kind]
    with pytest.raises(error, match=re.escape(message)):
        ENTRY_POINTS[entry_point][0](**arguments() | {"input": INPUTS[kind]()})


@pytest.mark.parametrize("entry_point", PUBLIC)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "residual"])
def test_messages_name_the_argument(name: str, entry_point: str) -> None:
    """Any argument that is not a tensor is reported by its name."""
    wrong = np.ones(SHAPE if name == "residual" else 3, dtype=np.float32)
    with pytest.raises(TypeError, match=rf"expected {name} to be a torch\.Tensor, but got numpy\.ndarray"):
        ENTRY_POINTS[entry_point][0](**arguments() | {name: wrong})
