"""Checks of the fake implementations: a wrong call fails during tracing instead of in compiled code.

test_ops.py, test_fused.py and test_sync_ops.py compare what fakes return with the real ops.

"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_arguments import OPS, SYNC_OPS, backward_arguments, fused_arguments
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bnkernels import _ops as ops

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def relu_backward_arguments(x: Tensor) -> tuple[Any, ...]:
    grad, x, weight, mean, invstd, *flags = backward_arguments(x).values()
    return grad, x, weight, mean, invstd, *flags, torch.stack([mean, mean + 1])


OPS: dict[str, tuple[Any, Callable[[Tensor], Sequence[Any]]]] = {
    **{name: (op, lambda x, make=make: [*make(x).values()]) for name, (op, make) in OPS.items()},
    **{f"sync_{name}": (op, lambda x, make=make: [*make(x).values()]) for name, (op, make) in SYNC_OPS.items()},
    "fused_train": (ops.train_op, lambda x: fused_arguments(x, True, True)),
    "fused_train_functional": (ops.train_functional, lambda x: fused_arguments(x, True, True)),
    "fused_eval": (ops.eval_op, lambda x: fused_arguments(x, True, True, training=False)),
    "relu_backward": (ops.backward_op, relu_backward_arguments),
}


def raises(op: Any, arguments: Sequence[Any]) -> bool:
    try:
        op(*(value.clone() if isinstance(value, Tensor) else value for value in arguments))
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "arguments"), OPS.values(), ids=OPS)
def test_fakes_raise_where_real_ops_raise(
    op: Any, arguments: Callable[[Tensor], Sequence[Any]], dtype: torch.dtype
) -> None:
    """Replaces each tensor by one of another dtype, size, rank and device."""
    given = list(arguments(torch.randn(4, 3, 5, 2).to(dtype)))
    for index, tensor in enumerate(given):
        if not isinstance(tensor, Tensor):
            continue
        wrong = [tensor.to(other) for other in (*DTYPES, torch.int64)]
        wrong += [tensor.new_ones(size) for size in (0, 1, 2, 4)]
        for value in (*wrong, tensor[None], tensor.to("meta")):
            changed = [*given[:index], value, *given[index + 1 :]]
            with FakeTensorMode() as mode:
                faked = raises(op, [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in changed])
            assert raises(op, changed) == faked, (index, value.shape, value.dtype, value.device)
