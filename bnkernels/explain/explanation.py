"""explain(): how one BatchNorm would run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..functional import check_activation
from . import format as fmt
from .devices import DEFAULT, Device, at_hand, has_gpu, named
from .passes import PassPlan, plan_of
from .spec import NO_EPILOGUE, Epilogue, Spec, spec_of

CPU_LINE = "cpu: plans concern CUDA; the CPU backend cuts the work by the problem alone (SIMD level {simd})"


@dataclass(frozen=True)
class Explanation:
    """How a BatchNorm over an input runs, forward and backward; str() tells it in words and figures.

    device and both passes are None for the CPU, which has no plan. assumed: the device is one that nobody named.
    """

    spec: Spec
    training: bool
    device: Device | None
    assumed: bool
    forward: PassPlan | None
    backward: PassPlan | None
    epilogue: Epilogue = NO_EPILOGUE

    @property
    def passes(self) -> tuple[PassPlan, ...]:
        return tuple(plan for plan in (self.forward, self.backward) if plan is not None)

    def as_json(self) -> dict[str, Any]:
        """Plain data: every field, and what follows from them."""
        return {
            "spec": {**asdict(self.spec), "bytes": self.spec.bytes},
            "training": self.training,
            "epilogue": asdict(self.epilogue),
            "device": None if self.device is None else asdict(self.device),
            "device_assumed": self.assumed,
            "passes": {plan.name: plan.as_json() for plan in self.passes},
        }

    def __str__(self) -> str:
        mode = "training" if self.training else "inference"
        title = f"{self.epilogue} in {mode} of {self.spec}: {fmt.amount(self.spec.bytes)} a tensor"
        if not self.spec.aligned:
            title += ", not on a boundary of 16 bytes"
        return "\n".join([title, device_text(self.device, self.assumed), *map(fmt.pass_text, self.passes)])


def device_text(device: Device | None, assumed: bool) -> str:
    """The line about the device."""
    if device is None:
        return f"on {CPU_LINE.format(simd=ops.build_info()['simd'])}"
    note = "\n(this installation has no GPU to use, and no device was named)" if assumed else ""
    return f"on {fmt.device_line(device)}{note}"


def device_of(device: torch.device | str | None, x: object) -> tuple[Device | None, bool]:
    """The device to explain for, None for the CPU; and whether it is the default, for want of a GPU and a name."""
    if device is None and isinstance(x, Tensor) and x.is_cuda:
        device = x.device
    if device is None:
        return (at_hand(torch.cuda.current_device()), False) if has_gpu() else (named(DEFAULT), True)
    text = str(device).lower()
    if text == "cpu":
        return None, False
    kind, _, number = text.partition(":")
    if kind != "cuda":
        return named(text), False
    if number and not number.isdecimal():
        raise ValueError(f"expected cuda or cuda:N with N a number, but got {device!r}")
    return at_hand(int(number) if number else torch.cuda.current_device() if has_gpu() else 0), False


def explain_spec(
    spec: Spec, device: Device | None, assumed: bool, training: bool, epilogue: Epilogue = NO_EPILOGUE
) -> Explanation:
    """Of what was parsed already."""
    if training and spec.outer * spec.inner < 2:
        raise ValueError(f"expected more than 1 value per channel when training, but got a shape of {spec.shape}")
    if device is None:
        return Explanation(spec, training, None, assumed, None, None, epilogue)
    mode = "train" if training else "eval"
    forward, backward = (
        plan_of(spec, f"{direction}_{mode}", device, epilogue) for direction in ("forward", "backward")
    )
    return Explanation(spec, training, device, assumed, forward, backward, epilogue)


def explain(
    x: Tensor | Sequence[int],
    *,
    dtype: torch.dtype | str | None = None,
    layout: torch.memory_format | str | None = None,
    device: torch.device | str | None = None,
    training: bool = True,
    residual: bool = False,
    activation: str | None = None,
) -> Explanation:
    """How batch_norm() over an input runs on a GPU: which kernels, which grid, how many bytes, how far from the floor.

    The plan that the CUDA backend would make, by arithmetic: nothing runs, and no GPU is needed. On a device at hand
    the driver has the last word: where it grants fewer blocks at a time than the limits say, a call takes the streaming
    path. Times are the predicted bytes over the memory's bandwidth: lower estimates, not measurements.

    Args:
        x: an input, or the shape (N, C, ...) of one. Of a tensor nothing but its description is read.
        dtype: as torch's or by name, e.g. "bf16" (default: the tensor's, or float32).
        layout: "nchw" or "nhwc", or as torch's memory format (default: the tensor's, or contiguous).
        device: "cuda" or "cuda:N" for a GPU at hand, "cpu", or a name of explain.devices.NAMED, e.g. "h200" or
            "h100-1g.10gb" (default: the tensor's if that is a GPU, else the GPU at hand, else "h200").
        training: False explains inference.
        residual: whether one of x's shape and dtype is added, as by batch_norm(..., residual=).
        activation: None or "relu", as batch_norm()'s.

    Returns:
        An Explanation: print it, or read its fields.

    Raises:
        TypeError, ValueError: shape, dtype, layout, device or activation are none; in training, a single value per
            channel.
    """
    check_activation(activation)
    found, assumed = device_of(device, x)
    epilogue = Epilogue(residual=residual, relu=activation is not None)
    return explain_spec(spec_of(x, dtype, layout), found, assumed, training, epilogue)
