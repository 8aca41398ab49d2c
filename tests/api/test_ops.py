"""The ops in torch: registration, fakes, mutation, argument checks of both entry points, loading."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility import cells, row
from op_arguments import OPS, Arguments, backward_arguments, eval_arguments, train_arguments
from torch import Tensor
from torch._subclasses import FakeTensorMode

import bnkernels as bnk
from bnkernels import _ops as ops
from bnkernels import testing
from bnkernels._ops import load

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


each_op = pytest.mark.parametrize(("op", "arguments"), OPS.values(), ids=OPS)


# Registration


INPUTS: dict[str, tuple[tuple[int, ...], torch.dtype, str, Arguments]] = {
    "plain": ((4, 3, 5, 2), torch.float32, "contiguous", {}),
    "channels_last": ((4, 3, 5, 2), torch.float32, "channels_last", {}),
    "3-D": ((4, 3, 5), torch.float64, "contiguous", {}),
    "5-D channels_last": ((2, 3, 4, 3, 2), torch.float32, "channels_last", {}),
    "2-D": ((4, 3), torch.bfloat16, "contiguous", {}),
    "sliced": ((4, 3, 5, 2), torch.float16, "sliced", {}),
    "transposed": ((4, 3, 5, 2), torch.float32, "transposed", {}),
    "no weight": ((4, 3, 5), torch.float32, "contiguous", {"weight": None}),
    "no batch": ((0, 3, 5), torch.float32, "contiguous", {}),
}
TRAINING_ONLY: dict[str, Arguments] = {
    "cumulative": {"momentum": None},
    "untracked": {"running_mean": None, "running_var": None, "num_batches_tracked": None},
    "uncounted": {"num_batches_tracked": None},
}


def opcheck(op: Any, arguments: Arguments) -> None:
    torch.library.opcheck(op, tuple(arguments.values()))


@row("torch.compile", "torch.library.opcheck of every op", cells(compiled=(True,)))
@each_op
@pytest.mark.parametrize(("shape", "dtype", "layout", "changes"), INPUTS.values(), ids=INPUTS)
def test_opcheck(
    op: Any,
    arguments: Callable[..., Arguments],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    changes: Arguments,
    device: str,
) -> None:
    """Schema (mutation, aliasing), fake tensors, and tracing with static and dynamic shapes."""
    x = testing.lay_out(torch.randn(shape, device=device).to(dtype), layout)
    opcheck(op, arguments(x, **changes))


@pytest.mark.parametrize("op", [ops.train_op, ops.train_functional], ids=["train", "train_functional"])
@pytest.mark.parametrize("changes", TRAINING_ONLY.values(), ids=TRAINING_ONLY)
def test_opcheck_of_training(op: Any, changes: Arguments, device: str) -> None:
    opcheck(op, train_arguments(torch.randn(4, 3, 5, device=device), **changes))


@pytest.mark.parametrize("flags", [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_opcheck_of_backward(flags: tuple[bool, bool, bool], training: bool, device: str) -> None:
    needs = dict(zip(("need_input", "need_weight", "need_bias"), flags))
    opcheck(ops.backward_op, backward_arguments(torch.randn(4, 3, 5, device=device), training=training, **needs))


SHAPES = [
    (4, 3),
    (4, 3, 5),
    (4, 3, 5, 2),
    (2, 3, 4, 3, 2),
    (4, 1, 5, 2),
    (4, 3, 1, 1),
    (1, 3, 5, 1),
    (2, 3, 2, 2, 2, 2),
]


@each_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fakes_have_the_strides_of_real_outputs(
    op: Any, arguments: Callable[..., Arguments], shape: tuple[int, ...], device: str
) -> None:
    """Compilers plan memory and layouts by the fake: wrong strides give wrong results."""
    for name, layout in testing.LAYOUTS.items():
        if not layout.applies(shape):
            continue
        real_arguments = arguments(testing.lay_out(torch.randn(shape, device=device), name))
        real = op(*real_arguments.values())
        with FakeTensorMode() as mode:
            to_fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in real_arguments.items()}
            fake = op(*to_fake.values())
        for index, (r, f) in enumerate(zip(real, fake)):
            assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device), (name, index)


@each_op
def test_meta(op: Any, arguments: Callable[..., Arguments]) -> None:
    x = torch.empty(4, 3, 5, 2, device="meta").contiguous(memory_format=torch.channels_last)
    y = op(*arguments(x).values())[0]
    assert y.is_meta and y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)


# Two entry points, one kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_entry_points_agree(dtype: torch.dtype, momentum: float | None, device: str) -> None:
    """The pybind function, the op and the functional op give the same bits and the same state."""
    x = torch.randn(4, 3, 5, 2, device=device).to(dtype)
    given = train_arguments(x, momentum=momentum)
    copies = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()} for _ in range(3)]
    direct = ops.forward_train(*copies[0].values())
    op = ops.train_op(*copies[1].values())
    functional = ops.train_functional(*copies[2].values())
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    for one, two, three in zip(direct[:3], op, functional):
        assert testing.same_bits(one, two) and testing.same_bits(one, three)
    assert direct[3] is None and op[3].numel() == functional[3].numel() == 0  # no ReLU, no bounds
    for name, updated in zip(buffers, functional[4:]):
        assert testing.same_bits(copies[0][name], copies[1][name]) and testing.same_bits(copies[0][name], updated)
        assert testing.same_bits(copies[2][name], given[name]), "train_functional changed its argument"

    inference = eval_arguments(x)
    for one, two in zip(ops.forward_eval(*inference.values())[:3], ops.eval_op(*inference.values())):
        assert testing.same_bits(one, two)
    backward = backward_arguments(x, mean=direct[1], invstd=direct[2])
    for one, two in zip(ops.backward(*backward.values()), ops.backward_op(*backward.values())):
        assert testing.same_bits(one, two)


def test_versions(device: str) -> None:
    """Autograd detects mutation by version counters. Training increases them; the functional op does not."""
    x = torch.randn(4, 3, 5, device=device)
    names = ("running_mean", "running_var", "num_batches_tracked")
    for entry, changes in ((ops.forward_train, True), (ops.train_op, True), (ops.train_functional, False)):
        for strided in (False, True):
            spread = {name: torch.ones(5, device=device)[::2] for name in names[:2]} if strided else {}
            arguments = train_arguments(x, **spread)
            before = {name: arguments[name]._version for name in names}
            entry(*arguments.values())
            for name in names:
                assert (arguments[name]._version > before[name]) == changes, (entry, name, strided)
        arguments = train_arguments(x[:0])
        entry(*arguments.values())
        assert arguments["num_batches_tracked"]._version == changes, "of an empty batch"
        assert x._version == 0 and arguments["weight"]._version == train_arguments(x)["weight"]._version


def test_inference_tensors_have_no_version(device: str) -> None:
    with torch.inference_mode():
        arguments = train_arguments(torch.randn(4, 3, 5, device=device))
        ops.forward_train(*arguments.values())
    assert arguments["num_batches_tracked"] == 4


def test_unneeded_gradients_are_none_or_empty(device: str) -> None:
    x = torch.randn(4, 3, 5, device=device)
    arguments = backward_arguments(x, need_weight=False, need_input=False)
    dx, dweight, dbias = ops.backward(*arguments.values())
    assert dx is None and dweight is None and dbias is not None
    assert [t.shape for t in ops.backward_op(*arguments.values())] == [(0,), (0,), (3,)]


def test_names_of_arguments() -> None:
    """Both entry points accept the argument names of the schema."""
    inference = eval_arguments(torch.randn(4, 3, 5), eps=0.5)
    backwards = dict(reversed(inference.items()))
    assert testing.same_bits(ops.forward_eval(**backwards)[0], ops.eval_op(**backwards)[0])


# Argument errors: both entry points raise, and no argument is written


X = (4, 3, 5, 2)


def vector(n: int, **options: Any) -> Tensor:
    return torch.ones(n, **options)


BAD_VECTORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "too small": (lambda: vector(2), "should contain 3 elements not 2"),
    "too large": (lambda: vector(4), "should contain 3 elements not 4"),
    "empty": (lambda: vector(0), "should contain 3 elements not 0"),
    "float64": (lambda: vector(3, dtype=torch.float64), "dtype"),
    "bfloat16": (lambda: vector(3, dtype=torch.bfloat16), "dtype"),
    "int64": (lambda: vector(3, dtype=torch.int64), "dtype"),
    "meta": (lambda: vector(3, device="meta"), "device"),
}
each_bad_vector = pytest.mark.parametrize(("bad", "match"), BAD_VECTORS.values(), ids=BAD_VECTORS)


def assert_both_raise(direct: Any, op: Any, arguments: Arguments, error: type[Exception], match: str) -> None:
    """Both raise the error and change no argument."""
    for entry in (direct, op):
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor) and not v.is_meta}
        with pytest.raises(error, match=match):
            entry(*arguments.values())
        for name, tensor in before.items():
            assert testing.same_bits(arguments[name], tensor), name


@each_bad_vector
@pytest.mark.parametrize("which", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bad_vectors(bad: Callable[[], Tensor], match: str, which: str, training: bool, device: str) -> None:
    x = torch.randn(X, device=device)
    wrong = bad() if bad().is_meta else bad().to(device)
    names = f"{which}.*{match}|{which} {match}"
    if training:
        assert_both_raise(ops.forward_train, ops.train_op, train_arguments(x, **{which: wrong}), RuntimeError, names)
        assert_both_raise(
            ops.train_functional, ops.train_functional, train_arguments(x, **{which: wrong}), RuntimeError, names
        )
    else:
        assert_both_raise(ops.forward_eval, ops.eval_op, eval_arguments(x, **{which: wrong}), RuntimeError, names)


@each_bad_vector
@pytest.mark.parametrize("which", ["weight", "mean", "invstd"])
def test_bad_vectors_of_backward(bad: Callable[[], Tensor], match: str, which: str, device: str) -> None:
    wrong = bad() if bad().is_meta else bad().to(device)
    arguments = backward_arguments(torch.randn(X, device=device), **{which: wrong})
    assert_both_raise(ops.backward, ops.backward_op, arguments, RuntimeError, f"{which}.*{match}|{which} {match}")


@pytest.mark.parametrize(
    ("x_dtype", "changes", "match"),
    [
        (torch.bfloat16, {"weight": torch.bfloat16, "bias": torch.float32}, "weight and bias of one dtype"),
        (
            torch.float16,
            {"running_mean": torch.float32, "running_var": torch.float16},
            "running_mean and running_var of",
        ),
        (torch.float16, {"weight": torch.bfloat16, "bias": torch.bfloat16}, "weight of dtype"),
        (torch.float64, {"weight": torch.float32, "bias": torch.float32}, "weight of dtype"),
        (torch.float64, {"running_mean": torch.float32, "running_var": torch.float32}, "running_mean of dtype"),
    ],
)
def test_mixed_dtypes(x_dtype: torch.dtype, changes: dict[str, torch.dtype], match: str, device: str) -> None:
    x = torch.randn(X, device=device).to(x_dtype)
    wrong = {name: torch.ones(3, device=device, dtype=dtype) for name, dtype in changes.items()}
    assert_both_raise(ops.forward_train, ops.train_op, train_arguments(x, **wrong), RuntimeError, match)
    assert_both_raise(ops.forward_eval, ops.eval_op, eval_arguments(x, **wrong), RuntimeError, match)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["mean", "invstd"])
def test_saved_statistics_of_another_dtype(which: str, dtype: torch.dtype, device: str) -> None:
    """Saved statistics of 16-bit inputs are float32: another dtype, the input's included, would be misread."""
    x = torch.randn(X, device=device).to(dtype)
    right = torch.float64 if dtype == torch.float64 else torch.float32
    for wrong in {torch.float16, torch.bfloat16, torch.float32, torch.float64} - {right}:
        arguments = backward_arguments(x, **{which: torch.ones(3, device=device, dtype=wrong)})
        assert_both_raise(ops.backward, ops.backward_op, arguments, RuntimeError, f"{which} of dtype")


TRAIN_ERRORS: dict[str, tuple[Arguments, type[Exception], str]] = {
    "eps zero": ({"eps": 0.0}, ValueError, "eps must be positive during training"),
    "eps negative": ({"eps": -1e-5}, ValueError, "eps must be positive during training"),
    "eps NaN": ({"eps": float("nan")}, ValueError, "eps must be positive during training"),
    "mean alone": ({"running_var": None}, ValueError, "either both be None or neither be None"),
    "variance alone": ({"running_mean": None}, ValueError, "either both be None or neither be None"),
    "cumulative without a counter": (
        {"momentum": None, "num_batches_tracked": None},
        RuntimeError,
        "num_batches_tracked",
    ),
    "counter of two": ({"num_batches_tracked": torch.zeros(2, dtype=torch.int64)}, RuntimeError, "num_batches_tracked"),
    "counter of none": (
        {"num_batches_tracked": torch.zeros(0, dtype=torch.int64)},
        RuntimeError,
        "num_batches_tracked",
    ),
    "counter in int32": (
        {"num_batches_tracked": torch.tensor(0, dtype=torch.int32)},
        RuntimeError,
        "num_batches_tracked",
    ),
    "one value": ({"x": torch.randn(1, 3, 1, 1)}, ValueError, re.escape("got input size torch.Size([1, 3, 1, 1])")),
    "one value, 2-D": ({"x": torch.randn(1, 3)}, ValueError, re.escape("got input size torch.Size([1, 3])")),
}


@pytest.mark.parametrize(("changes", "error", "match"), TRAIN_ERRORS.values(), ids=TRAIN_ERRORS)
def test_bad_arguments_of_training(changes: Arguments, error: type[Exception], match: str, device: str) -> None:
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in changes.items()}
    arguments = train_arguments(torch.randn(X, device=device)) | moved
    assert_both_raise(ops.forward_train, ops.train_op, arguments, error, match)
    assert_both_raise(ops.train_functional, ops.train_functional, arguments, error, match)


OVERLAPS: dict[str, Callable[[Tensor], Arguments]] = {
    "the variances": lambda ones: {"running_var": ones[:1].expand(3)},
    "the means": lambda ones: {"running_mean": ones[:1].expand(3)},
    "one with the other": lambda ones: {"running_mean": ones[:3], "running_var": ones[2:]},
    "one across the other": lambda ones: {"running_mean": ones[::2], "running_var": ones[1:4]},
    "with the weight": lambda ones: {"running_mean": ones[:3], "weight": ones[2:]},
    "with the bias": lambda ones: {"running_var": ones[:3], "bias": ones[:3]},
}


@pytest.mark.parametrize("changes", OVERLAPS.values(), ids=OVERLAPS)
def test_statistics_that_overlap(changes: Callable[[Tensor], Arguments], device: str) -> None:
    """Rejected before anything is written: torch's copy back would fail after the mean was updated, and a kernel
    would read the weight after the mean overwrote it."""
    arguments = train_arguments(torch.randn(X, device=device), **changes(torch.ones(5, device=device)))
    assert_both_raise(ops.forward_train, ops.train_op, arguments, RuntimeError, "single memory location")


def test_negative_views(device: str) -> None:
    """Views with the negative bit (torch._neg_view), through both entry points. The running statistics are not such
    views: torch itself does not support ops that write to two of them."""
    x = torch.randn(X, device=device)

    def negated(tensor: Any) -> Any:
        is_data = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return torch._neg_view(-tensor) if is_data else tensor  # type: ignore[attr-defined]

    for direct, op, arguments in (
        (ops.forward_train, ops.train_op, train_arguments),
        (ops.forward_eval, ops.eval_op, eval_arguments),
        (ops.backward, ops.backward_op, backward_arguments),
    ):
        torch.manual_seed(0)
        plain = arguments(x)
        views = {name: value if "running" in name else negated(value) for name, value in plain.items()}
        assert views["x"].is_neg()
        for entry in (direct, op):
            expected = entry(*(value.clone() if isinstance(value, Tensor) else value for value in plain.values()))
            arguments_now = (v.clone() if "running" in name else v for name, v in views.items())
            for got, wanted in zip(entry(*arguments_now), expected):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_bad_eps_of_inference(device: str) -> None:
    x = torch.randn(X, device=device)
    for eps in (-1e-5, float("nan")):
        assert_both_raise(
            ops.forward_eval, ops.eval_op, eval_arguments(x, eps=eps), ValueError, "eps must be non-negative"
        )


BAD_INPUTS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "no dimension": (lambda: torch.randn(()), RuntimeError, "at least 2 dimensions"),
    "one dimension": (lambda: torch.randn(3), RuntimeError, "at least 2 dimensions"),
    "int64": (lambda: torch.ones(X, dtype=torch.int64), NotImplementedError, "not implemented for 'Long'"),
    "complex": (lambda: torch.ones(X, dtype=torch.complex64), NotImplementedError, "not implemented for 'Complex"),
    "sparse": (lambda: torch.ones(X).to_sparse(), NotImplementedError, "Could not run"),
}


@pytest.mark.parametrize(("bad", "error", "match"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs(bad: Callable[[], Tensor], error: type[Exception], match: str, device: str) -> None:
    x, good = bad().to(device), torch.randn(X, device=device)
    for direct, op, arguments in (
        (ops.forward_train, ops.train_op, train_arguments(good)),
        (ops.forward_eval, ops.eval_op, eval_arguments(good)),
        (ops.backward, ops.backward_op, backward_arguments(good)),
    ):
        for entry in (direct, op):
            with pytest.raises(error, match=match):
                entry(*(arguments | {"x": x}).values())


BAD_GRADIENTS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "shape": (lambda: torch.randn(4, 3, 5, 3), "gradient of shape"),
    "fewer dimensions": (lambda: torch.randn(4, 3, 10), "gradient of shape"),
    "dtype": (lambda: torch.randn(X, dtype=torch.float64), "gradient of dtype"),
}


@pytest.mark.parametrize(("bad", "match"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_bad_gradients(bad: Callable[[], Tensor], match: str, device: str) -> None:
    arguments = backward_arguments(torch.randn(X, device=device), grad=bad().to(device))
    assert_both_raise(ops.backward, ops.backward_op, arguments, RuntimeError, match)


@pytest.mark.cuda
@pytest.mark.parametrize("which", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
def test_arguments_on_another_device(which: str) -> None:
    for x_device, device in (("cpu", "cuda"), ("cuda", "cpu")):
        arguments = train_arguments(torch.randn(X, device=x_device))
        arguments[which] = arguments[which].to(device)
        assert_both_raise(ops.forward_train, ops.train_op, arguments, RuntimeError, which)


# Loading


def test_build_info() -> None:
    info = bnk.build_info()
    assert str(info["torch"]).split("+")[0].split(".")[:2] == torch.__version__.split(".")[:2]
    assert {"torch", "cuda", "with_cuda", "arch_list", "compiler", "simd"} <= set(info)
    assert info["with_cuda"] == (info["cuda"] is not None)
    info["torch"] = "changed"
    assert bnk.build_info()["torch"] != "changed"


@pytest.mark.parametrize("cuda", ["13.0", "none"])
def test_load_error_names_both_versions(cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build tag is read from the file, as a library that does not load cannot be called."""
    library = tmp_path / "_C.cpython-311-x86_64-linux-gnu.so"
    library.write_bytes(
        b"\x7fELF\0\xff" * 100 + f"bnkernels-build torch=2.11.0+cu130 cuda={cuda}\0".encode() + b"\0" * 9
    )
    monkeypatch.setattr(load, "__file__", str(tmp_path / "_ops" / "load.py"))
    text = str(load.load_error("undefined symbol: _ZN2at"))
    assert "undefined symbol: _ZN2at" in text
    assert f"built against: torch 2.11.0+cu130, CUDA {cuda}" in text
    assert f"running: torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}" in text
    assert "pip install --no-build-isolation" in text


@pytest.mark.parametrize(
    ("built", "running", "reason"),
    [
        (("2.15.0+cu132", "13.0"), ("2.15.1", "13.2"), None),
        (("2.15.0+cpu", None), ("2.15.0+cu132", "13.2"), None),
        (("2.15.0+cu132", "13.0"), ("2.15.0+cpu", None), None),  # does not load: libc10_cuda is missing
        (("2.14.1", "13.0"), ("2.15.0", "13.2"), "C\\+\\+ interface"),
        (("2.15.0+cu132", "13.0"), ("2.15.0+cu128", "12.8"), "CUDA runtime"),
    ],
)
def test_version_mismatch(built: tuple[str, str | None], running: tuple[str, str | None], reason: str | None) -> None:
    """A library that loads with another torch or CUDA version than it was built for is rejected before it is used."""
    message = load._incompatibility(dict(zip(("torch", "cuda"), built)), *running)
    assert message is None if reason is None else re.search(reason, message or "")


def test_load_error_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "__file__", str(tmp_path / "_ops" / "load.py"))
    text = str(load.load_error("No module named _C"))
    assert "is not built" in text and torch.__version__ in text and "pip install" in text


def test_build_tag() -> None:
    """The tag in the file agrees with build_info()."""
    built, info = load._built_against(), bnk.build_info()
    assert built["torch"] == info["torch"] and built["cuda"] == (info["cuda"] or "none")
