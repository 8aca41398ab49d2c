"""Automatic mixed precision and activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compatibility import Cell, cells, row
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnkernels as bnk
from bnkernels import testing

AMP, CHECKPOINT = "Automatic mixed precision", "Activation checkpointing"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def pair(device: str) -> tuple[nn.Module, nn.Module]:
    """A converted model and the torch model it was copied from, with equal parameters."""
    torch_model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 2),
    ).to(device)
    return bnk.convert(copy.deepcopy(torch_model)), torch_model


# Automatic mixed precision


@row(AMP, "autocast to bfloat16 and float16 with float32 parameters", cells())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_autocast(cell: Cell, dtype: torch.dtype, device: str) -> None:
    """The layer takes the convolution's 16-bit output and returns the same dtype, without a cast; statistics are
    float32."""
    converted, torch_model = pair(device)
    model, reference = cell.prepared(converted), cell.eager.prepared(torch_model)
    seen: dict[str, torch.dtype] = {}
    if not cell.compiled:
        converted[1].register_forward_hook(lambda m, inputs, y: seen.update(input=inputs[0].dtype, output=y.dtype))  # type: ignore[index]
    for _ in range(2):
        x = cell.laid_out(torch.randn(8, 3, 8, 8, device=device))
        results = []
        for call, module in ((model, converted), (reference, torch_model)):
            module.zero_grad()
            with torch.autocast(device, dtype):
                y = call(x)
            y.float().square().mean().backward()
            results.append(
                {"y": y.detach(), **{n: p.grad for n, p in module.named_parameters()}, **dict(module.named_buffers())}
            )
        got, expected = results
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in expected.items()}
        # The results differ by two roundings to 16 bits, in sums of 16-bit products.
        tolerance = 16 * testing.UNIT_ROUNDOFF[dtype]
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    if seen:
        assert seen == {"input": dtype, "output": dtype}


def train(model: nn.Module, call: Callable[[Tensor], Tensor], batches: list[Tensor], device: str) -> list[float]:
    """The loss scale after each step. The last batch overflows."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scales = []
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = call(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@row(AMP, "GradScaler with float16: scales, skipped steps, parameters", cells(training=(True,)))
def test_grad_scaler(cell: Cell, device: str) -> None:
    """An overflow reaches the scaler as inf in the gradients; a skipped step has still updated the statistics."""
    converted, torch_model = pair(device)
    batches = [cell.laid_out(torch.randn(8, 3, 8, 8, device=device)) for _ in range(3)]
    batches.append(torch.full_like(batches[0], float("inf")))
    scales = train(converted, cell.prepared(converted), batches, device)
    assert scales == train(torch_model, cell.eager.prepared(torch_model), batches, device)
    assert scales[-1] < scales[-2]
    assert converted[1].num_batches_tracked == torch_model[1].num_batches_tracked == 4  # type: ignore[index]
    tolerance = 16 * testing.UNIT_ROUNDOFF[torch.float16]
    torch.testing.assert_close(
        dict(converted.state_dict()), dict(torch_model.state_dict()), rtol=tolerance, atol=tolerance, equal_nan=True
    )


# Activation checkpointing


def block(device: str) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, momentum=None)).to(device)


def run(model: nn.Module, cell: Cell, **options: Any) -> dict[str, Tensor]:
    """Outputs, gradients and state after a step, checkpointed with these options if there are any."""
    prepared = cell.eager.prepared(model)
    call: Callable[[Tensor], Tensor] = (lambda x: checkpoint(model, x, **options)) if options else prepared
    if cell.compiled:
        torch.compiler.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    device = next(model.parameters()).device
    x = cell.laid_out(torch.randn(4, 3, 5, 2, device=device)).requires_grad_()
    y = call(x)
    y.backward(torch.randn(y.shape, device=device))
    assert x.grad is not None
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(model.named_buffers())}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert testing.same_bits(got[name], tensor), name


@row(
    CHECKPOINT,
    "torch.utils.checkpoint, reentrant and not",
    cells(),
    "in eager mode the block runs twice, and in training its statistics are updated twice, as torch's are; "
    "`checkpoint_contexts` updates them once. Compiled, they are updated once.",
)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpoint(cell: Cell, reentrant: bool, device: str) -> None:
    """Outputs and gradients equal those without a checkpoint; statistics equal those of torch's layers."""
    got = run(bnk.convert(block(device)), cell, use_reentrant=reentrant)
    plain = run(bnk.convert(block(device)), cell.eager)
    assert_same(got, {name: t for name, t in plain.items() if name not in dict(block(device).named_buffers())})
    torch_model = run(block(device), cell.eager, **({} if cell.compiled else {"use_reentrant": reentrant}))
    torch.testing.assert_close(got, torch_model)
    assert got["0.num_batches_tracked"] == (0 if not cell.training else 1 if cell.compiled else 2)


@row(
    CHECKPOINT,
    "`checkpoint_contexts`: statistics updated once",
    cells(compiled=(False,)),
    "with use_reentrant=False. torch.compile does not accept such a context_fn, and does not need one.",
)
def test_checkpoint_contexts(cell: Cell, device: str) -> None:
    """All results equal those without a checkpoint, and the layers track statistics again afterwards."""
    model = bnk.convert(block(device))
    contexts = partial(bnk.checkpoint_contexts, model)
    assert_same(run(model, cell, use_reentrant=False, context_fn=contexts), run(bnk.convert(block(device)), cell))
    assert model[0].track_running_stats  # type: ignore[index]


def test_checkpoint_contexts_ignore_torch_layers() -> None:
    """torch's layers save their statistics for the backward; without them, checkpoint rejects the recomputation."""
    mixed = nn.Sequential(nn.BatchNorm2d(3), bnk.BatchNorm2d(3))
    cell = Cell(training=True, compiled=False, channels_last=False)
    got = run(mixed, cell, use_reentrant=False, context_fn=partial(bnk.checkpoint_contexts, mixed))
    assert got["0.num_batches_tracked"] == 2 and got["1.num_batches_tracked"] == 1


@row(CHECKPOINT, "`no_statistics_update`: training forwards that do not update the statistics", cells())
@pytest.mark.parametrize("convert", [True, False], ids=["converted", "torch"])
def test_no_statistics_update(cell: Cell, convert: bool, device: str) -> None:
    """Batch statistics normalize, the buffers do not change, and tracking resumes after an exception."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).to(device)
    model[2].track_running_stats = False
    if convert:
        bnk.convert(model)
    before = copy.deepcopy(model.state_dict())
    x = cell.laid_out(torch.randn(4, 3, 5, 2, device=device))
    call = cell.prepared(model)
    expected = cell.prepared(copy.deepcopy(model))(x)
    with pytest.raises(KeyError), bnk.no_statistics_update(model):
        y = call(x)
        raise KeyError
    torch.testing.assert_close(y, expected)
    assert_same(dict(model.state_dict()), dict(before))
    assert [model[0].track_running_stats, model[2].track_running_stats] == [True, False]
    call(x)
    assert model[0].num_batches_tracked == int(cell.training)
