"""explain_model(): the execution plans of every BatchNorm of a model, and their total."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..convert import OURS, reason_to_leave
from ..modules import ForwardMixin
from . import format as fmt
from .devices import Device
from .explanation import Explanation, device_of, device_text, explain_spec
from .passes import PassPlan
from .spec import Epilogue, spec_of


@dataclass(frozen=True)
class LayerExplanation:
    """A call of a layer. name: the path of the layer in the model, "" for the model itself."""

    name: str
    explanation: Explanation


@dataclass(frozen=True)
class ModelExplanation:
    """How the BatchNorms of a model run in training, in call order. str() gives a table.

    device, assumed: as in Explanation.
    """

    layers: tuple[LayerExplanation, ...]
    device: Device | None
    assumed: bool

    def _plans(self, direction: str | None = None) -> list[PassPlan]:
        explanations = [layer.explanation for layer in self.layers]
        return [plan for e in explanations for plan in e.passes if direction is None or plan.name.startswith(direction)]

    def ratio(self, direction: str | None = None) -> float:
        """Predicted DRAM bytes over the floor, for all layers. direction: "forward", "backward", or None for both."""
        plans = self._plans(direction)
        return sum(p.whole.total for p in plans) / sum(p.whole_floor.total for p in plans)

    @property
    def seconds(self) -> float | None:
        """Lower bound of the time of all layers, forward and backward, by memory bandwidth; None if unknown."""
        times = [plan.seconds for plan in self._plans()]
        known = [time for time in times if time is not None]
        return sum(known) if known and len(known) == len(times) else None

    def as_json(self) -> dict[str, Any]:
        plans = self._plans()
        return {
            "layers": [{"name": layer.name, **layer.explanation.as_json()} for layer in self.layers],
            "floor_bytes": sum(plan.whole_floor.total for plan in plans),
            "predicted_bytes": sum(plan.whole.total for plan in plans),
            "launches": sum(plan.launches for plan in plans),
            "lower_estimate_seconds": self.seconds,
        }

    def __str__(self) -> str:
        head = f"{fmt.count(len(self.layers), 'call')} of BatchNorm layers in training"
        rows: list[tuple[str, ...]] = [("layer", "shape", "dtype", "layout", "forward", "backward", "at least")]
        rows += [_row(layer) for layer in self.layers]
        plans = self._plans()
        if plans:
            sums = (f"x{self.ratio('forward'):.2f}", f"x{self.ratio('backward'):.2f}", fmt.duration(self.seconds))
            rows.append(("total", "", "", "", *sums))
        widths = [max(map(len, column)) for column in zip(*rows)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines = [head, device_text(self.device, self.assumed), *table]
        if plans:
            lines.append(
                f"DRAM: floor {fmt.amount(sum(p.whole_floor.total for p in plans))}, predicted "
                f"{fmt.amount(sum(p.whole.total for p in plans))} (x: predicted over floor). "
                f"{sum(p.launches for p in plans)} launches. Times are bandwidth bounds, not measurements."
            )
        return "\n".join(lines)


def _row(layer: LayerExplanation) -> tuple[str, ...]:
    explanation = layer.explanation
    spec = explanation.spec
    cells = [f"{plan.path} x{plan.ratio:.2f}" for plan in explanation.passes] or ["-", "-"]
    times = [plan.seconds for plan in explanation.passes]
    known = [time for time in times if time is not None]
    time = fmt.duration(sum(known)) if known else "-"
    name = " + ".join((layer.name or "(model)", *explanation.epilogue.parts))
    return (name, "x".join(map(str, spec.shape)), spec.dtype, spec.layout, *cells, time)


def _empty(tensor: Tensor) -> Tensor:
    """An uninitialised tensor with the same size, strides and dtype; without data in FakeTensorMode."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


def _copy_without_data(model: nn.Module) -> nn.Module:
    """A copy of the model, in FakeTensorMode, whose parameters and buffers have no data."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = _empty(tensor)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _inputs(given: Tensor | Sequence[int] | Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """The given inputs, or one input of the given shape, without data."""
    tensors = [given] if isinstance(given, Tensor) else [one for one in given if isinstance(one, Tensor)]
    if isinstance(given, Tensor) or (tensors and len(tensors) == len(given)):
        return [_empty(tensor) for tensor in tensors]
    try:
        shape = [index(size) for size in given]  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"expected a tensor, a tuple of tensors or a shape, but got {given!r}") from None
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return [torch.empty(shape, dtype=next(floating, torch.float32))]


Forward = Callable[[Tensor, Tensor | None, str | None], Tensor]


@dataclass(frozen=True)
class _Call:
    """A recorded call of a BatchNorm layer. input has no data."""

    name: str
    input: Tensor
    epilogue: Epilogue


def _with_recording(forward: Forward, name: str, calls: list[_Call]) -> Forward:
    """Wraps ForwardMixin._forward of a layer, which every call of its kernels uses, to append each call to `calls`."""

    def recording_forward(input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        calls.append(_Call(name, input, Epilogue(residual is not None, activation is not None)))
        return forward(input, residual, activation)

    return recording_forward


def _batch_norm_calls(model: nn.Module, given: Tensor | Sequence[int] | Sequence[Tensor]) -> list[_Call]:
    """The calls of this package's BatchNorms in the converted model, in order."""
    calls: list[_Call] = []
    with FakeTensorMode(), torch.no_grad():
        inputs = _inputs(given, model)
        try:
            data_free = _copy_without_data(model)
            for name, module in data_free.named_modules():
                if isinstance(module, nn.SyncBatchNorm):
                    module.eval()  # in training it would communicate
                    continue
                if isinstance(module, _BatchNorm) and not reason_to_leave(module):
                    module.__class__ = OURS[type(module)]  # type: ignore[assignment]
                if isinstance(module, ForwardMixin):
                    module.__dict__["_forward"] = _with_recording(module._forward, name, calls)
            data_free(*inputs)
        except Exception as error:
            shapes = [tuple(x.shape) for x in inputs]
            raise RuntimeError(
                f"{type(model).__name__} cannot run without data on inputs of shapes {shapes}: {error}\n"
                "Data-dependent control flow cannot be explained: call explain() for the shape of each layer instead"
            ) from error
    return calls


def explain_model(
    model: nn.Module,
    input_or_shape: Tensor | Sequence[int] | Sequence[Tensor],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> ModelExplanation:
    """Explains how every BatchNorm of a model runs in a training step, and the total: explain() for each layer's input.

    The layers' inputs are found by running a copy of the model on fake tensors, which have no data, in the model's
    current mode. Nothing is computed, no memory is allocated, and the model, including its statistics, counters, mode
    and hooks, does not change. Models with data-dependent control flow are not supported.

    The layers are those that use this package's kernels after convert(model). Layers that convert() skips are left out,
    and so is SyncBatchNorm: its ranks communicate between the passes, so nothing can be cached on chip.

    Args:
        model: any module with BatchNorm layers of torch.nn or of this package.
        input_or_shape: the model's input, a tuple of inputs, or the shape of an input, which is taken as contiguous
        with
            the dtype of the parameters. Memory formats propagate through the model: for channels_last, pass a tensor
            (a meta tensor suffices) or a model in that format.
        dtype: overrides the dtype of the layers' inputs, e.g. "bf16" for autocast.
        device: as in explain().

    Returns:
        A ModelExplanation. str() gives a table.

    Raises:
        TypeError: model is not a module; input_or_shape is neither a tensor, a tuple of tensors nor a shape.
        ValueError: the model calls no such layer, or has uninitialised lazy layers; otherwise as explain().
        RuntimeError: the model cannot run without data, or not on this input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("expected a model without uninitialised lazy layers: run a forward pass first")
    first = input_or_shape if isinstance(input_or_shape, Tensor) else None
    found, assumed = device_of(device, first)
    calls = _batch_norm_calls(model, input_or_shape)
    if not calls:
        raise ValueError(
            f"expected a model with BatchNorm layers, but {type(model).__name__} called none that convert() "
            "converts, and none of bnkernels"
        )
    layers = tuple(
        LayerExplanation(call.name, explain_spec(spec_of(call.input, dtype, None), found, assumed, True, call.epilogue))
        for call in calls
    )
    return ModelExplanation(layers, found, assumed)
