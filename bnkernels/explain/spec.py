"""Spec: the shape, dtype and layout of an input, from a tensor or from names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

_VECTOR_BYTES = 16

_DTYPES = {
    "float64": ("fp64", "double"),
    "float32": ("fp32", "float"),
    "float16": ("fp16", "half"),
    "bfloat16": ("bf16",),
}
_LAYOUTS = {
    "contiguous": ("contiguous_format", "channels_first", "nc", "ncl", "nchw", "ncdhw"),
    "channels_last": ("channels_last_3d", "nhwc", "ndhwc"),
}


@dataclass(frozen=True)
class Epilogue:
    """The operations fused after normalisation: y = relu(v + residual), where both parts are optional."""

    residual: bool = False
    relu: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return ("an addition",) * self.residual + ("ReLU",) * self.relu

    def __str__(self) -> str:
        parts = ("BatchNorm", *self.parts)
        return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


NO_EPILOGUE = Epilogue()


@dataclass(frozen=True)
class Spec:
    """An input of shape (N, C, ...). aligned: whether its first element is aligned to 16 bytes."""

    shape: tuple[int, ...]
    dtype: str
    layout: str  # "contiguous" or "channels_last"
    aligned: bool = True

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def inner(self) -> int:
        """The number of consecutive elements in memory that belong to the same channel."""
        return 1 if self.layout == "channels_last" else math.prod(self.shape[2:])

    @property
    def outer(self) -> int:
        return math.prod(self.shape) // (self.channels * self.inner)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * torch.finfo(getattr(torch, self.dtype)).bits // 8

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"


def _one_of(what: str, given: object, names: dict[str, tuple[str, ...]]) -> str:
    """The canonical name for a name or a torch object such as torch.bfloat16."""
    word = str(given).removeprefix("torch.").lower().replace("-", "_")
    for name, others in names.items():
        if word == name or word in others:
            return name
    allowed = "; ".join(f"{name} ({', '.join(others)})" for name, others in names.items())
    raise ValueError(f"expected {what} to be one of {allowed}, but got {given!r}")


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(map(index, shape))
    except TypeError:
        raise TypeError(f"expected a tensor or a shape (N, C, ...) of integers, but got {shape!r}") from None
    if len(sizes) < 2:
        raise ValueError(f"expected a shape of 2 or more dimensions, (N, C, ...), but got {sizes}")
    if min(sizes) < 1:
        raise ValueError(f"expected sizes of at least 1, but got {sizes}: an empty input has no plan")
    return sizes


def _check_layout(layout: str, shape: tuple[int, ...]) -> None:
    if layout == "channels_last" and len(shape) not in (4, 5):
        raise ValueError(
            f"expected a shape of 4 or 5 dimensions for channels_last, but got {shape}: "
            "torch has channels_last formats for 4 and 5 dimensions only; omit the layout"
        )


def spec_of(
    x: Tensor | Sequence[int], dtype: torch.dtype | str | None, layout: torch.memory_format | str | None
) -> Spec:
    """The spec of a tensor or shape. dtype and layout override those of the tensor, or float32 and contiguous."""
    shape = _check_shape(x.shape if isinstance(x, Tensor) else x)
    if dtype is None:
        dtype = x.dtype if isinstance(x, Tensor) else "float32"
    name = _one_of("dtype", dtype, _DTYPES)
    own = torch.contiguous_format
    if isinstance(x, Tensor):
        own = torch._prims_common.suggest_memory_format(x)
    order = _one_of("layout", own if layout is None else layout, _LAYOUTS)
    _check_layout(order, shape)
    aligned = True
    if isinstance(x, Tensor) and layout is None and x.is_contiguous(memory_format=own):
        # Such inputs are read in place. Others are copied to aligned memory first.
        aligned = int(x.storage_offset()) * x.element_size() % _VECTOR_BYTES == 0
    return Spec(shape, name, order, aligned)
