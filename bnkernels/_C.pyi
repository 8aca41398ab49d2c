from typing import Any

from torch import Tensor

def forward_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def forward_eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,  # None raises
    running_var: Tensor | None,
    eps: float,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
def fused_forward_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    relu: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def fused_forward_eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,  # None raises
    running_var: Tensor | None,
    eps: float,
    relu: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def relu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu_range: Tensor,
    training: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
def empty_cache() -> int: ...
def build_info() -> dict[str, object]: ...
def plan(
    outer: int,
    channels: int,
    inner: int,
    dtype: str,
    pass_: str,
    aligned: bool,
    multiprocessors: int,
    max_threads_per_multiprocessor: int,
    max_blocks_per_multiprocessor: int,
    shared_per_multiprocessor: int,
    shared_per_block: int,
    shared_reserved: int,
    cooperative_launch: bool,
    max_cluster: int,
    force_two_pass: bool = False,
) -> dict[str, Any]: ...
def device_limits(device: int) -> dict[str, Any]: ...
def barrier_workspace(device: int) -> list[Tensor]: ...
