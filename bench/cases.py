"""One case of the benchmark: which input, in which layout and dtype, in which direction, with what behind it; and the
bytes it must move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import LayerShape

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LAYOUTS: dict[str, torch.memory_format] = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# Tensors of the input's size that must cross the memory bus: forward reads x and writes y; backward reads x and grad_y
# and writes grad_x. The per-channel vectors are left out: they are 1/(N*H*W) of a tensor.
FLOOR_TENSORS: dict[str, int] = {"forward": 2, "eval": 2, "backward": 3, "step": 5}

# What may follow, y = relu(batch_norm(x) + residual), and the tensors more that it makes each direction move: forward
# reads the residual. Backward writes the residual's gradient, unless it is y's own; which y are positive is a bit each.
EPILOGUES: dict[str, dict[str, int]] = {
    "": {"forward": 0, "eval": 0, "backward": 0, "step": 0},
    "relu": {"forward": 0, "eval": 0, "backward": 0, "step": 0},
    "add": {"forward": 1, "eval": 1, "backward": 0, "step": 1},
    "add+relu": {"forward": 1, "eval": 1, "backward": 1, "step": 2},
}

DIRECTION_TITLES: dict[str, str] = {
    "forward": "forward in training",
    "eval": "forward in evaluation",
    "backward": "backward of training",
    "step": "forward + backward of training",
}


EPILOGUE_TITLES: dict[str, str] = {
    "": "BatchNorm",
    "relu": "BatchNorm and ReLU",
    "add": "BatchNorm and an addition",
    "add+relu": "BatchNorm, an addition and ReLU",
}


@dataclass(frozen=True)
class Case:
    """A BatchNorm2d input (shape, batch, layout, dtype by the names above), and what follows."""

    shape: LayerShape
    batch: int
    layout: str
    dtype: str
    epilogue: str = ""

    @property
    def adds(self) -> bool:
        return self.epilogue.startswith("add")

    @property
    def relu(self) -> bool:
        return self.epilogue.endswith("relu")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        return math.prod(self.shape.input_shape(self.batch))

    @property
    def tensor_bytes(self) -> int:
        return self.elements * self.torch_dtype.itemsize

    def floor_bytes(self, direction: str) -> int:
        return (FLOOR_TENSORS[direction] + EPILOGUES[self.epilogue][direction]) * self.tensor_bytes

    def __str__(self) -> str:
        return f"{self.batch}x{self.shape.name} {self.layout} {self.dtype}" + f" {self.epilogue}" * bool(self.epilogue)


@dataclass(frozen=True)
class Buffers:
    """One input, one gradient of the output, and what is added, if anything is; inputs are leaves that require grad."""

    x: Tensor
    grad: Tensor
    residual: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a module is called with."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def copy(self) -> Buffers:
        """The same values at other addresses."""
        residual = None if self.residual is None else self.residual.detach().clone().requires_grad_()
        return Buffers(self.x.detach().clone().requires_grad_(), self.grad.clone(), residual)


def make_buffers(case: Case, device: torch.device, seed: int = 0) -> Buffers:
    """Normal data whose mean and scale differ by channel, as activations' do; the gradient is plain normal."""
    generator = torch.Generator(device=device).manual_seed(seed)
    size = case.shape.input_shape(case.batch)
    channels = (1, case.shape.channels, 1, 1)
    memory_format = LAYOUTS[case.layout]

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x = normal(size).mul_(normal(channels).exp_()).add_(normal(channels))
    grad = normal(size)

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.to(case.torch_dtype).contiguous(memory_format=memory_format)

    residual = laid_out(normal(size)).requires_grad_() if case.adds else None
    return Buffers(laid_out(x).requires_grad_(), laid_out(grad), residual)


def make_ring(case: Case, device: torch.device, count: int, seed: int = 0) -> list[Buffers]:
    """`count` buffers of the same values at different addresses, for calls to go round."""
    first = make_buffers(case, device, seed)
    return [first, *(first.copy() for _ in range(count - 1))]


MAX_RING = 512


def ring_length(case: Case, per_call: int, cold_bytes: int, limit_bytes: int) -> int:
    """How many buffers a ring needs so that more than `cold_bytes` pass before a buffer comes round again.

    `per_call` is what one call touches of memory that goes round with the ring. At least 2 buffers; no more than hold
    `limit_bytes` of inputs (x, grad and what is added), so that small memories survive, and no more than MAX_RING:
    tensors of a few kilobytes stay in a cache, and nobody reads them from memory in a program either.
    """
    wanted = max(2, cold_bytes // per_call + 2)
    affordable = max(2, limit_bytes // ((3 if case.adds else 2) * case.tensor_bytes))
    return min(wanted, affordable, MAX_RING)
