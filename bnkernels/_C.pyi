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
    residual: Tensor | None = None,
    relu: bool = False,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...
def forward_eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,  # None raises RuntimeError
    running_var: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...
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
    relu_bounds: Tensor | None = None,
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
