"""Valid arguments for each registered op, by name, for an input x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnkernels import _ops as ops

Arguments = dict[str, Any]


def train_arguments(x: Tensor, **changes: Any) -> Arguments:
    c, kind = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    on: Arguments = {"device": x.device, "dtype": kind}
    return {
        "x": x,
        "weight": torch.rand(c, **on) + 0.5,
        "bias": torch.randn(c, **on),
        "running_mean": torch.randn(c, **on),
        "running_var": torch.rand(c, **on) + 0.5,
        "num_batches_tracked": torch.tensor(3, device=x.device),
        "momentum": 0.1,
        "eps": 1e-5,
    } | changes


def eval_arguments(x: Tensor, **changes: Any) -> Arguments:
    arguments = train_arguments(x, **changes)
    del arguments["num_batches_tracked"], arguments["momentum"]
    return arguments


def backward_arguments(x: Tensor, **changes: Any) -> Arguments:
    train = train_arguments(x)
    statistics = {"mean": train["running_mean"], "invstd": train["running_var"]}
    flags = dict.fromkeys(("training", "need_input", "need_weight", "need_bias"), True)
    return {"grad": torch.randn_like(x), "x": x, "weight": train["weight"], **statistics, **flags} | changes


OPS: dict[str, tuple[Any, Callable[..., Arguments]]] = {
    "train": (ops.train_op, train_arguments),
    "train_functional": (ops.train_functional, train_arguments),
    "eval": (ops.eval_op, eval_arguments),
    "backward": (ops.backward_op, backward_arguments),
}


def combine_arguments(x: Tensor, **changes: Any) -> Arguments:
    c, kind = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = torch.rand(3, 2 * c + 1, device=x.device, dtype=torch.float64) + 1
    on: Arguments = {"device": x.device, "dtype": kind}
    return {
        "rows": rows,
        "running_mean": torch.randn(c, **on),
        "running_var": torch.rand(c, **on) + 0.5,
        "num_batches_tracked": torch.tensor(3, device=x.device),
        "momentum": 0.1,
        "eps": 1e-5,
        "dtype": x.dtype,
    } | changes


def vectors(x: Tensor, *names: str) -> Arguments:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return {name: torch.rand(x.shape[1], device=x.device, dtype=kind) + 0.5 for name in names}


def statistics_arguments(x: Tensor, **changes: Any) -> Arguments:
    return {"x": x, "eps": 1e-5} | changes


def normalize_arguments(x: Tensor, **changes: Any) -> Arguments:
    return {"x": x} | vectors(x, "weight", "bias", "mean", "invstd") | changes


def grad_sums_arguments(x: Tensor, **changes: Any) -> Arguments:
    given = {"grad": torch.randn_like(x), "x": x} | vectors(x, "weight", "mean", "invstd")
    return given | {"need_weight": True, "need_bias": True} | changes


def grad_input_arguments(x: Tensor, **changes: Any) -> Arguments:
    given = {"grad": torch.randn_like(x), "x": x} | vectors(x, "weight", "mean", "invstd")
    on: Arguments = {"device": x.device, "dtype": torch.float64}
    return given | {"rows": torch.rand(3, 2 * x.shape[1], **on), "count": torch.ones(1, **on)} | changes


SYNC_OPS: dict[str, tuple[Any, Callable[..., Arguments]]] = {
    "statistics": (ops.sync_statistics, statistics_arguments),
    "combine": (ops.sync_combine, combine_arguments),
    "combine_functional": (ops.sync_combine_functional, combine_arguments),
    "normalize": (ops.sync_normalize, normalize_arguments),
    "grad_sums": (ops.sync_grad_sums, grad_sums_arguments),
    "grad_input": (ops.sync_grad_input, grad_input_arguments),
}


def fused_arguments(x: Tensor, adds: bool, relu: bool, training: bool = True) -> tuple[Any, ...]:
    c = x.shape[1]
    on: dict[str, Any] = {"device": x.device, "dtype": torch.float64 if x.dtype == torch.float64 else torch.float32}
    vectors = (torch.randn(c, **on), torch.randn(c, **on), torch.randn(c, **on), torch.rand(c, **on) + 0.5)
    count = (torch.tensor(3, device=x.device), 0.1) if training else ()
    return (x, *vectors, *count, 1e-5, torch.randn_like(x) if adds else None, relu)
