"""Layouts (the same values with other strides), guard bands and poisoned memory.

`lay_out` creates all layouts under test. `guarded` detects out-of-bounds writes, and `poisoned_allocations` detects
missing writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _offset(t: Tensor) -> Tensor:
    """The same strides with a storage offset of one element: aligned to the element size only."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].as_strided(t.shape, t.stride()).copy_(t)


def _contiguous(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)  # contiguous() may return t itself


def _channels_last(t: Tensor) -> Tensor:
    return _contiguous(t.movedim(1, -1)).movedim(-1, 1)


def _sliced(t: Tensor) -> Tensor:
    """Every second element of the last dimension of a wider tensor."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype, device=t.device)
    return wide[..., 1::2].copy_(t)


def _channel_slice(t: Tensor) -> Tensor:
    """A slice of the channels of a larger tensor, as in a DenseNet: each sample is dense, with gaps between samples."""
    wide = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), math.nan, dtype=t.dtype, device=t.device)
    return wide[:, 2:-1].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """The last two dimensions swapped in memory."""
    return _contiguous(t.transpose(-1, -2)).transpose(-1, -2)


def _odd_ones(t: Tensor) -> Tensor:
    """Contiguous, except for the strides of dimensions of size 1, which are arbitrary and must be ignored."""
    t = _contiguous(t)
    strides = [7 + 2 * d if size == 1 else stride for d, (size, stride) in enumerate(zip(t.shape, t.stride()))]
    return t.as_strided(t.shape, strides)


@dataclass(frozen=True)
class Layout:
    arrange: Callable[[Tensor], Tensor]
    applies: Callable[[tuple[int, ...]], bool] = lambda shape: True


LAYOUTS: dict[str, Layout] = {
    "contiguous": Layout(_contiguous),
    # torch has no channels_last format for 3 dimensions, but a transpose produces (N, L, C) in memory.
    "channels_last": Layout(_channels_last, lambda shape: len(shape) > 2),
    "offset": Layout(lambda t: _offset(_contiguous(t))),
    "channels_last_offset": Layout(lambda t: _offset(_channels_last(t)), lambda shape: len(shape) > 2),
    "sliced": Layout(_sliced),
    "channel_slice": Layout(_channel_slice),
    "transposed": Layout(_transposed, lambda shape: len(shape) != 3),
    "odd_ones": Layout(_odd_ones, lambda shape: 1 in shape),
}


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The values of `t` (N, C, *) in a layout of LAYOUTS, as a new tensor with the same shape and dtype."""
    return LAYOUTS[layout].arrange(t.detach())


def misaligned(t: Tensor) -> Tensor:
    """A copy of a vector that is aligned to its element size only, like a slice of a larger buffer."""
    return _offset(t.detach().contiguous())


@dataclass(frozen=True)
class Guarded:
    """A dense tensor between two guard bands in the same storage."""

    tensor: Tensor
    storage: Tensor
    pattern: Tensor

    def intact(self) -> bool:
        """Whether the guard bands are unchanged."""
        start = self.tensor.storage_offset()
        stop = start + self.tensor.numel()
        bits = _bits(self.storage)
        return torch.equal(bits[:start], self.pattern[:start]) and torch.equal(bits[stop:], self.pattern[stop:])


def guarded(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    values: Tensor | None = None,
    channels_last: bool = False,
    offset: int = 1,
    band: int = 64,
) -> Guarded:
    """A tensor of NaN, or of `values`, between guard bands of `band` elements, misaligned by `offset` elements.

    Elements that are not written stay NaN. intact() detects writes outside the tensor.
    """
    size = math.prod(shape)
    storage = torch.full((offset + band + size + band,), math.nan, dtype=dtype, device=device)
    bits = _bits(storage)
    # NaN payloads: reads beyond the end propagate NaN, and arithmetic never produces these bits, so any write is
    # detected.
    noise = torch.arange(bits.numel(), dtype=torch.int64, device=bits.device) % 97 + 1
    bits += noise.to(bits.dtype)
    pattern = bits.clone()
    view = storage[offset + band : offset + band + size]
    if channels_last:
        tensor = view.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    else:
        tensor = view.view(shape)
    tensor.fill_(math.nan)
    if values is not None:
        tensor.copy_(values)
    return Guarded(tensor, storage, pattern)


def _bits(t: Tensor) -> Tensor:
    return t.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same shape, dtype and bits: NaN equals NaN, -0 differs from 0, None equals None."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    return torch.equal(_bits(a.contiguous()), _bits(b.contiguous()))


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Context in which torch.empty fills with NaN, which reveals unwritten elements of outputs and workspaces."""
    switch: Any = torch.utils.deterministic  # a module with a property, which type checkers reject
    mode, fill = torch.get_deterministic_debug_mode(), switch.fill_uninitialized_memory
    # Filling requires deterministic mode. With "warn", operations without a deterministic implementation still run.
    torch.set_deterministic_debug_mode("warn")
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        switch.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)
