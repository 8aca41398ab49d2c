"""Errors for arguments that no kernel accepts.

The ops, pybind11 and the dispatcher do not name such an argument. The search for it runs after the failure, so that
successful calls do not pay for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNNAMED = (AttributeError, RuntimeError, TypeError)


def name_the_cause(**arguments: Any) -> None:
    """Raises an error with the argument that no kernel accepts, what it is, and what to pass instead.

    Returns if every argument is a dense tensor: the call's own error then names its cause.

    Raises:
        TypeError: an argument is no tensor.
        NotImplementedError: one is nested, sparse or quantized.
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
    """Why no kernel accepts a tensor, and what to pass instead; "" for a dense one."""
    if tensor.is_nested:
        jagged = tensor.layout == torch.jagged  # the values of the other layout have one dimension
        parts = f"{name}.values(), with the channels in dimension 1" if jagged else f"the tensors of {name}.unbind()"
        padded = "or pad it by torch.nested.to_padded_tensor (the padding counts in the statistics)"
        return f"a nested one of layout {tensor.layout}: pass {parts}, {padded}"
    if tensor.layout != torch.strided:
        return f"one of layout {tensor.layout}: pass {name}.to_dense()"
    if tensor.is_quantized:
        tools = "Quantization handles only torch.nn's layers: call bnkernels.revert(model) first"
        return f"a quantized one, {tensor.dtype}: pass {name}.dequantize(). {tools}"
    return ""
