"""One case of the benchmark: shape, batch, layout, dtype and epilogue; its inputs, and the bytes it must move."""

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
# and writes grad_x. Per-channel vectors are left out: each is 1/(N*H*W) of a tensor.
FLOOR_TENSORS: dict[str, int] = {"forward": 2, "eval": 2, "backward": 3, "step": 5}

# Epilogues, y = relu(batch_norm(x) + residual), and the additional tensors that each direction moves: forward reads the
# residual; backward writes the residual's gradient unless it equals that of y. The mask of positive y is 1 bit each.
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
    """A BatchNorm2d input (shape, batch, layout and dtype, named as above) and an epilogue."""

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
    """An input, a gradient of the output and an optional residual. Inputs are leaves that require grad."""

    x: Tensor
    grad: Tensor
    residual: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the module."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def copy(self) -> Buffers:
        """Copies with the same values at other addresses."""
        residual = None if self.residual is None else self.residual.detach().clone().requires_grad_()
        return Buffers(self.x.detach().clone().requires_grad_(), self.grad.clone(), residual)


def make_buffers(case: Case, device: torch.device, seed: int = 0) -> Buffers:
    """Normal data with a mean and scale per channel, as activations have; the gradient is standard normal."""
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
    """`count` buffers with the same values at different addresses, for calls to cycle through."""
    first = make_buffers(case, device, seed)
    return [first, *(first.copy() for _ in range(count - 1))]


MAX_RING = 512


def ring_length(case: Case, per_call: int, cold_bytes: int, limit_bytes: int) -> int:
    """The number of buffers of a ring in which more than `cold_bytes` are touched before a buffer is used again.

    `per_call` is the number of bytes of the ring's memory that one call touches. At least 2 buffers; at most
    `limit_bytes` of inputs (x, grad and the residual), to fit small memories; and at most MAX_RING: tensors of a few
    kilobytes stay in a cache, as they do in a program.
    """
    wanted = max(2, cold_bytes // per_call + 2)
    affordable = max(2, limit_bytes // ((3 if case.adds else 2) * case.tensor_bytes))
    return min(wanted, affordable, MAX_RING)
