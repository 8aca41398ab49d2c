"""explain(): the execution plan of one BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _ops as ops
from ..functional import check_activation
from . import format as fmt
from .devices import DEFAULT, Device, cuda_device, has_gpu, named
from .passes import PassPlan, plan_of
from .spec import NO_EPILOGUE, Epilogue, Spec, spec_of

CPU_LINE = "cpu: plans exist for CUDA only; the CPU backend partitions the work by the shape alone (SIMD level {simd})"


@dataclass(frozen=True)
class Explanation:
    """How a BatchNorm runs for an input, forward and backward. str() formats it as text.

    device and both passes are None for the CPU, which has no plan. assumed: device is the default, because none was
    given and there is no GPU.
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
        """All fields and derived values as plain data."""
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
        title = f"{self.epilogue} in {mode} of {self.spec}: {fmt.amount(self.spec.bytes)} per tensor"
        if not self.spec.aligned:
            title += ", not aligned to 16 bytes"
        return "\n".join([title, device_text(self.device, self.assumed), *map(fmt.pass_text, self.passes)])


def device_text(device: Device | None, assumed: bool) -> str:
    """The line that describes the device."""
    if device is None:
        return f"on {CPU_LINE.format(simd=ops.build_info()['simd'])}"
    note = "\n(default device: none was given, and this installation has no usable GPU)" if assumed else ""
    return f"on {fmt.device_line(device)}{note}"


def device_of(device: torch.device | str | None, x: object) -> tuple[Device | None, bool]:
    """(device, assumed): the device to explain for, None for the CPU, and whether it is the default."""
    if device is None and isinstance(x, Tensor) and x.is_cuda:
        device = x.device
    if device is None:
        return (cuda_device(torch.cuda.current_device()), False) if has_gpu() else (named(DEFAULT), True)
    text = str(device).lower()
    if text == "cpu":
        return None, False
    kind, _, number = text.partition(":")
    if kind != "cuda":
        return named(text), False
    if number and not number.isdecimal():
        raise ValueError(f"expected cuda or cuda:N with N a number, but got {device!r}")
    return cuda_device(int(number) if number else torch.cuda.current_device() if has_gpu() else 0), False


def explain_spec(
    spec: Spec, device: Device | None, assumed: bool, training: bool, epilogue: Epilogue = NO_EPILOGUE
) -> Explanation:
    """explain() for parsed arguments."""
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
    """Explains how batch_norm() runs on a GPU: kernels, launch configuration, and memory traffic relative to the
    minimum.

    Computes the plan that the CUDA backend would make. Nothing runs, and no GPU is needed. On an actual device, the
    driver may allow fewer concurrent blocks than the limits suggest; the call then takes the two-pass path. Times are
    predicted bytes divided by memory bandwidth: lower bounds, not measurements.

    Args:
        x: an input, or the shape (N, C, ...) of an input. The data of a tensor is not read.
        dtype: a torch dtype or a name such as "bf16" (default: the dtype of x, or float32).
        layout: "nchw", "nhwc" or a torch memory format (default: the format of x, or contiguous).
        device: "cuda" or "cuda:N" for a GPU of this machine, "cpu", or a name in explain.devices.NAMED, e.g. "h200" or
            "h100-1g.10gb" (default: the device of x if it is a GPU, else the current GPU, else "h200").
        training: False explains inference.
        residual: whether a residual with the shape and dtype of x is added, as in batch_norm(..., residual=...).
        activation: None or "relu", as in batch_norm().

    Returns:
        An Explanation, with its values as fields. str() formats it.

    Raises:
        TypeError: x is neither a tensor nor a sequence of integers.
        ValueError: invalid shape, dtype, layout, device or activation; training with a single value per channel.
    """
    check_activation(activation)
    found, assumed = device_of(device, x)
    epilogue = Epilogue(residual=residual, relu=activation is not None)
    return explain_spec(spec_of(x, dtype, layout), found, assumed, training, epilogue)
