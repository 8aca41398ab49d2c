"""The implementations that are timed, and one call of each direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cases import Buffers, Case

OURS = "ours"
EAGER = "eager"
COMPILED = "compiled"
COPY = "copy"

# With an epilogue, bnkernels computes it in the BatchNorm kernels; torch's layer is followed by torch's operations.
TITLES: dict[str, str] = {
    OURS: "bnkernels",
    EAGER: "nn.BatchNorm2d",
    COMPILED: "torch.compile(nn.BatchNorm2d)",
    COPY: "a copy of x (the reference: reads and writes one tensor)",
}


def make_layer(case: Case, device: torch.device, seed: int = 1) -> nn.BatchNorm2d:
    """A torch layer with random parameters and running statistics.

    Parameters and statistics are float32 for 16-bit inputs too, as in mixed-precision training.
    """
    channels = case.shape.channels
    generator = torch.Generator().manual_seed(seed)
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        layer.bias.copy_(torch.randn(channels, generator=generator))
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(torch.randn(channels, generator=generator))
        layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return layer.to(device)


class WithEpilogue(nn.Module):
    """torch's layer followed by torch's in-place operations, as in networks."""

    def __init__(self, layer: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.layer = layer
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x)
        if residual is not None:
            y += residual
        return torch.relu_(y) if self.relu else y


def _convert(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
    import bnkernels  # imported here: the rest of this module works without the extension

    converted = bnkernels.convert(layer)
    if not case.relu:
        return converted
    with_relu = bnkernels.BatchNormAct2d(layer.num_features)
    with_relu.bn = converted
    return with_relu


def _eager(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
    return WithEpilogue(layer, case.relu) if case.epilogue else layer


def _compile(layer: nn.BatchNorm2d, case: Case) -> nn.Module:
    torch._dynamo.reset()  # compiles each case for its own shape
    module = _eager(layer, case)
    module.compile(dynamic=False, fullgraph=True)
    return module


BUILDERS: dict[str, Callable[[nn.BatchNorm2d, Case], nn.Module]] = {OURS: _convert, EAGER: _eager, COMPILED: _compile}


@dataclass
class Provider:
    """A module for one case, with the torch layer that owns its parameters and buffers."""

    name: str
    layer: nn.BatchNorm2d
    module: nn.Module
    initial: dict[str, Tensor]

    @classmethod
    def make(cls, name: str, case: Case, device: torch.device) -> Provider:
        layer = make_layer(case, device)
        initial = {key: value.clone() for key, value in layer.state_dict().items()}
        return cls(name, layer, BUILDERS[name](layer, case), initial)

    def reset(self) -> None:
        """Restores the parameters and running statistics of make_layer, in place."""
        self.layer.load_state_dict(self.initial)

    def leaves(self, buffers: Buffers) -> tuple[Tensor, ...]:
        return (buffers.x, self.layer.weight, self.layer.bias, *buffers.inputs[1:])


def make_call(provider: Provider, direction: str, ring: Sequence[Buffers]) -> Callable[[int], object]:
    """call(i) runs the direction on ring[i] and returns all tensors it created, so that a caller can keep them alive.

    For "backward", the forwards of all buffers run here, outside the timed call. ValueError for an unknown direction.
    """
    module = provider.module
    module.train(direction != "eval")

    if direction == "eval":

        def evaluate(index: int) -> object:
            with torch.no_grad():
                return module(*ring[index].inputs)

        return evaluate

    if direction == "forward":
        return lambda index: module(*ring[index].inputs)

    if direction == "step":

        def step(index: int) -> object:
            buffers = ring[index]
            y = module(*buffers.inputs)
            return y, torch.autograd.grad(y, provider.leaves(buffers), buffers.grad)

        return step

    if direction == "backward":
        outputs = _forward_for_many_backwards(provider, ring)

        def backward(index: int) -> object:
            buffers = ring[index]
            return torch.autograd.grad(outputs[index], provider.leaves(buffers), buffers.grad, retain_graph=True)

        return backward

    raise ValueError(f"expected forward, backward, step or eval, got {direction!r}")


def _forward_for_many_backwards(provider: Provider, ring: Sequence[Buffers]) -> list[Tensor]:
    """The outputs of all buffers, with autograd graphs that allow repeated backwards."""
    if provider.name != COMPILED:
        return [provider.module(*buffers.inputs) for buffers in ring]
    # A compiled backward may overwrite saved tensors unless donated buffers are disabled at compile time.
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        return [provider.module(*buffers.inputs) for buffers in ring]


def make_copy(ring: Sequence[Buffers]) -> Callable[[int], object]:
    return lambda index: ring[index].x.detach().clone()


def why_no_compiler(device: torch.device) -> str | None:
    """Why torch.compile does not work on this device (no compiler, no Triton), or None if it does."""
    layer = nn.BatchNorm2d(2).to(device)
    x = torch.randn(2, 2, 2, 2, device=device, requires_grad=True)
    try:
        torch._dynamo.reset()
        torch.compile(layer, dynamic=False, fullgraph=True)(x).sum().backward()
    except Exception as error:  # any error of the compiler: the run continues without it and notes the error
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line}"
    return None
