"""Arguments for random calls (tests/support/fuzz_ops.py): other arrangements of the same values, and invalid arguments.

arrange_*    a tensor of the same values with other strides, offset, shape, sign bit or autograd state
spoil        replaces one argument of a valid call by one that no op may accept
Memory       every byte that a call can reach through its arguments, for comparison afterwards
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bnkernels import testing

Arguments = dict[str, Any]

READ_VECTORS = ("weight", "bias", "mean", "invstd")
RUNNING = ("running_mean", "running_var")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.bool, torch.complex64)
WRONG_EPS: tuple[Any, ...] = (0.0, -1e-5, float("-inf"), float("nan"), None, "small")


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes that weight, bias and the running statistics may have with an input of `dtype`."""
    return (dtype, torch.float32) if dtype in (torch.float16, torch.bfloat16) else (dtype,)


# Arrangements


def _strided(t: Tensor) -> Tensor:
    wide = torch.full((2 * t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
    return wide[1::2].copy_(t)


def _negative(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


_READ: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t,
    testing.misaligned,
    _strided,
    _negative,
    _inference,
    lambda t: t.view(1, -1),
    lambda t: t.view(-1, 1),
    lambda t: _strided(t).view(-1, 1),
    lambda t: t.clone().requires_grad_(),
)
# torch has no kernel for an op that writes to two negative views.
_WRITTEN = tuple(arrange for arrange in _READ if arrange is not _negative)


def arrange_read(rng: random.Random, t: Tensor | None) -> Tensor | None:
    """A vector that is only read."""
    return t if t is None else rng.choice(_READ)(t)


def arrange_running(rng: random.Random, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics: each in a fresh tensor, or both in one buffer."""
    if mean is None or var is None:
        return mean, var
    if mean.dtype == var.dtype and rng.random() < 0.2:
        dim = rng.randrange(2)
        first, second = torch.stack((mean, var), dim).unbind(dim)
        return first, second
    first, second = (rng.choice(_WRITTEN)(t.clone()) for t in (mean, var))
    return first, second


def arrange_data(rng: random.Random, t: Tensor) -> Tensor:
    """x, a gradient or a residual: as it is, a negative view, a leaf of autograd, or an inference tensor."""
    choice = rng.random()
    if choice < 0.06:
        return _negative(t)
    if choice < 0.12:
        return t.detach().requires_grad_()
    return _inference(t) if choice < 0.15 else t


# Invalid arguments


def spoil(rng: random.Random, arguments: Arguments, in_place: bool) -> tuple[str, Arguments]:
    """What was changed, and the changed call. All arguments are equally likely to be changed.

    in_place: the op writes to the running statistics. If it returns new ones, they may overlap.
    """
    groups = _invalid_values(rng, arguments, in_place)
    while True:
        group = rng.choice(list(groups))
        ways = list(groups.pop(group))
        if ways:
            what, changes = rng.choice(ways)
            return f"{group}: {what}", arguments | changes


def _invalid_values(rng: random.Random, a: Arguments, in_place: bool) -> dict[str, Iterable[tuple[str, Arguments]]]:
    """Invalid values of each argument or group of arguments, generated lazily."""
    x = a.get("x")
    training = "momentum" in a
    channels = x.shape[1] if x is not None else (a["rows"].shape[1] - 1) // 2
    dtype = x.dtype if x is not None else a["dtype"]
    device = x.device if x is not None else a["rows"].device

    def of(name: str, values: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Arguments]]:
        return ((what, {name: value}) for what, value in values)

    groups: dict[str, Iterable[tuple[str, Arguments]]] = {}
    if x is not None:
        groups["x"] = of("x", _wrong_inputs(a, x))
    for name in (*READ_VECTORS, *RUNNING):
        if name in a:
            groups[name] = of(name, _wrong_vectors(rng, name, channels, dtype, device))
    for name in ("grad", "residual"):
        if a.get(name) is not None:
            groups[name] = of(name, _wrong_likes(a[name]))
    if "bias" in a or "running_mean" in a:
        groups["pair"] = _wrong_pairs(a, channels, dtype, device)
    if in_place and channels > 0:
        groups["overlap"] = _overlaps(a, channels, dtype, device)
    if training:
        groups["num_batches_tracked"] = _wrong_counters(a, device)
        groups["momentum"] = of("momentum", [("a string", "0.1")])
    if "eps" in a:
        may_be_zero = "running_mean" in a and not training
        groups["eps"] = of("eps", [(f"{eps}", eps) for eps in WRONG_EPS if eps != 0 or not may_be_zero])
    for name, wrong_ones in _WRONG_OTHERS.items():
        if name in a:
            groups[name] = of(name, wrong_ones(a[name]))
    flags = [name for name in ("need_input", "need_bias", "relu") if name in a]
    groups["flag"] = ((f"{name} is a string", {name: "yes"}) for name in flags)
    return groups


def _wrong_inputs(a: Arguments, x: Tensor) -> Iterable[tuple[str, Any]]:
    dense = x.detach().clone()
    yield "None", None
    yield "no dimension", dense.new_ones(())
    yield "one dimension", dense.new_ones(x.shape[1])
    for dtype in OTHERS:
        yield f"{dtype}", torch.ones(x.shape, dtype=dtype, device=x.device)
    yield "conjugate", torch.ones(x.shape, dtype=torch.complex64, device=x.device).conj()
    on_cpu = x.device.type == "cpu"  # the fake CUDA device has no sparse tensors
    if on_cpu:
        yield "sparse", dense.to_sparse()
    if on_cpu and not {"grad", "residual"} & set(a) and x.dim() > 2 and 0 not in x.shape:
        beyond = dense.flatten()[0].expand(1 << 20, x.shape[1], 1 << 26)
        yield "beyond memory", beyond
    if any(isinstance(a.get(name), Tensor) for name in (*READ_VECTORS, *RUNNING)):
        yield "meta", dense.to("meta")


def _wrong_vectors(
    rng: random.Random, name: str, channels: int, dtype: torch.dtype, device: torch.device
) -> Iterable[tuple[str, Any]]:
    saved = name in ("mean", "invstd")
    right = (statistic_dtype(dtype),) if saved else parameter_dtypes(dtype)
    size = rng.choice([n for n in (0, 1, channels - 1, channels + 1, 2 * channels) if n >= 0 and n != channels])
    yield f"{size} elements", torch.ones(size, dtype=right[0], device=device)
    wrong = rng.choice([t for t in (*FLOATS, *OTHERS) if t not in right])
    yield f"{wrong}", torch.ones(channels, dtype=wrong, device=device)
    yield "meta", torch.ones(channels, dtype=right[0], device="meta")
    if channels > 0 and device.type == "cpu":
        yield "sparse", torch.ones(channels, dtype=right[0], device=device).to_sparse()
    yield "a string", "ones"
    if saved:
        yield "None", None


def _wrong_likes(t: Tensor) -> Iterable[tuple[str, Any]]:
    dense = t.detach().clone()
    yield "longer", torch.cat((dense, dense[:1]) if t.shape[0] else (dense, dense.new_ones(1, *t.shape[1:])))
    yield "one dimension more", dense.unsqueeze(-1)
    if t.numel() > 1:
        yield "broadcastable", dense.flatten()[0].view((1,) * t.dim())
    for dtype in (*FLOATS, torch.int64):
        if dtype != t.dtype:
            yield f"{dtype}", dense.to(dtype)
    yield "meta", dense.to("meta")
    yield "a number", 1.0


def _wrong_pairs(
    a: Arguments, channels: int, dtype: torch.dtype, device: torch.device
) -> Iterable[tuple[str, Arguments]]:
    sixteen_bit = len(parameter_dtypes(dtype)) == 2
    on: Arguments = {"dtype": dtype, "device": device}
    for pair in (("weight", "bias"), RUNNING):
        if sixteen_bit and pair[0] in a and pair[1] in a:
            kinds = dict(zip(pair, (dtype, torch.float32)))
            yield (
                f"{pair[0]} and {pair[1]} of two dtypes",
                {name: torch.ones(channels, dtype=kind, device=device) for name, kind in kinds.items()},
            )
    if "running_mean" not in a:
        return
    mean, var = RUNNING
    one = torch.ones(channels, **on)
    yield "running_mean alone", {mean: one, var: None}
    yield "running_var alone", {mean: None, var: one}


def _overlaps(a: Arguments, channels: int, dtype: torch.dtype, device: torch.device) -> Iterable[tuple[str, Arguments]]:
    """Running statistics that overlap themselves, each other, or an argument that is read."""
    mean, var = RUNNING
    on: Arguments = {"dtype": dtype, "device": device}
    one = torch.ones(channels, **on)
    yield "one tensor", {mean: one, var: one}
    yield "one storage", {mean: one, var: one.view(1, -1)}
    if channels > 1:
        buffer = torch.ones(2 * channels, **on)
        yield "running_mean in one element", {mean: buffer[:1].expand(channels), var: buffer[channels:]}
        yield "the end of one, the start of the other", {mean: buffer[:channels], var: buffer[channels - 1 : -1]}
        yield "every second element and every one", {mean: buffer[: 2 * channels : 2], var: buffer[1 : channels + 1]}
    for name in ("weight", "bias"):
        if isinstance(a.get(name), Tensor):
            other = "bias" if name == "weight" else "weight"
            yield f"running_mean is {name}", {mean: one, var: one.clone(), name: one, other: None}
    x = a.get("x")
    if x is not None and x.shape[0] > 1 and x.numel() == x.shape[0] * channels and not x.is_neg():
        dense = x.detach().clone(memory_format=torch.contiguous_format).view(x.shape)
        yield "running_var in x", {"x": dense, mean: one, var: dense[0].flatten()}


def _wrong_counters(a: Arguments, device: torch.device) -> Iterable[tuple[str, Arguments]]:
    name = "num_batches_tracked"
    on: Arguments = {"device": device, "dtype": torch.int64}
    yield "two", {name: torch.zeros(2, **on)}
    yield "none", {name: torch.zeros(0, **on)}
    yield "float", {name: torch.zeros((), device=device)}
    yield "meta", {name: torch.zeros((), device="meta", dtype=torch.int64)}
    if a["running_mean"] is not None:
        yield "None, of a cumulative average", {name: None, "momentum": None}


def _wrong_bounds(t: Tensor) -> Iterable[tuple[str, Any]]:
    yield "a row more", torch.cat((t, t[:1]))
    yield "flat", t.flatten()
    yield "a channel more", torch.cat((t, t.new_ones(2, 1)), 1)
    yield "16-bit", t.half()
    yield "meta", t.to("meta")


def _wrong_rows(t: Tensor) -> Iterable[tuple[str, Any]]:
    yield "one number more", torch.cat((t, t[:, :1]), 1)
    yield "no rank", t[:0]
    yield "flat", t.flatten()
    yield "float32", t.float()
    yield "empty rows", t[:, :0]


def _wrong_counts(t: Tensor) -> Iterable[tuple[str, Any]]:
    yield "two", torch.cat((t, t))
    yield "float32", t.float()
    yield "none", t[:0]
    yield "meta", t.to("meta")


_WRONG_OTHERS: dict[str, Callable[[Tensor], Iterable[tuple[str, Any]]]] = {
    "relu_bounds": _wrong_bounds,
    "rows": _wrong_rows,
    "count": _wrong_counts,
}


# Memory


class Memory:
    """A copy of the storages of the arguments of a call."""

    def __init__(self, arguments: Arguments) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        for value in arguments.values():
            if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
                storage = value.untyped_storage()
                if storage.nbytes() > 0:
                    now = _bytes(storage, value.device)
                    self._held.setdefault(storage.data_ptr(), (now, now.clone()))

    def changed(self, tensor: Tensor | None = None) -> bool:
        """Whether any byte has changed, in all storages or in one tensor's."""
        held = self._held.values()
        if tensor is not None:
            storage = tensor.untyped_storage()
            held = [self._held[storage.data_ptr()]] if storage.nbytes() > 0 else []  # type: ignore[assignment]
        return any(not torch.equal(now, before) for now, before in held)

    def changed_outside(self, written: Iterable[Tensor]) -> bool:
        """Whether a byte outside of these tensors' elements has changed."""
        tensors = [t for t in written if t.untyped_storage().nbytes() > 0]
        now = [t.detach().clone() for t in tensors]
        for t in tensors:
            _, before = self._held[t.untyped_storage().data_ptr()]
            old = torch.empty(0, dtype=t.dtype, device=t.device)
            old.set_(before.untyped_storage(), t.storage_offset(), t.shape, t.stride())
            _write(t, old)
        outside = self.changed()
        for t, value in zip(tensors, now):
            _write(t, value)
        return outside


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _write(t: Tensor, value: Tensor) -> None:
    with torch.inference_mode() if t.is_inference() else nullcontext():
        t.detach().copy_(value)
