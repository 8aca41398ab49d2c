"""Errors for arguments that no kernel accepts.

The messages of the ops, of pybind11 and of the dispatcher do not name such an argument. The arguments are searched
after the failure, so that successful calls have no overhead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNNAMED = (AttributeError, RuntimeError, TypeError)
"""The errors of a call whose messages may not name the argument."""


def name_the_cause(**arguments: Any) -> None:
    """Raises an error that names the unsupported argument, its type or layout, and what to pass instead.

    Returns if every argument is a dense tensor. The original error then names its cause.

    Raises:
        TypeError: an argument is not a tensor.
        NotImplementedError: an argument is a nested, sparse or quantized tensor.
    """
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if reason := _reason_against(name, value):
                raise NotImplementedError(
                    f"batch_norm: expected {name} to be a dense tensor, but got {reason}"
                ) from None
        elif value is not None or name == "input":
            cls = type(value)
            kind = f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")
            remedy = "pass a tensor"
            if cls.__module__ == "numpy":
                remedy = f"pass torch.from_numpy({name})"
            elif cls in (list, tuple):
                of_tensors = bool(value) and all(isinstance(each, Tensor) for each in value)
                remedy = (
                    f"pass torch.stack({name}) or torch.cat({name})" if of_tensors else f"pass torch.tensor({name})"
                )
            raise TypeError(f"batch_norm: expected {name} to be a torch.Tensor, but got {kind}: {remedy}") from None


def _reason_against(name: str, tensor: Tensor) -> str:
    """Why no kernel accepts the tensor, and what to pass instead; "" for a dense tensor."""
    if tensor.is_nested:
        jagged = tensor.layout == torch.jagged  # values() of a strided nested tensor has one dimension
        parts = f"{name}.values(), with the channels in dimension 1" if jagged else f"the tensors of {name}.unbind()"
        padded = "or pad it with torch.nested.to_padded_tensor (the statistics then include the padding)"
        return f"a nested tensor with layout {tensor.layout}: pass {parts}, {padded}"
    if tensor.layout != torch.strided:
        return f"a tensor with layout {tensor.layout}: pass {name}.to_dense()"
    if tensor.is_quantized:
        tools = "To quantize a model, call bnkernels.revert(model) first: quantization supports torch.nn layers only"
        return f"a quantized tensor, {tensor.dtype}: pass {name}.dequantize(). {tools}"
    return ""
