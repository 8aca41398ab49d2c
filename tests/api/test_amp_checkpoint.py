"""Automatic mixed precision and activation checkpointing: the parts of a training step that run a model otherwise."""

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
    """A converted model, and torch's with the same parameters."""
    native = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 2),
    ).to(device)
    return bnk.convert(copy.deepcopy(native)), native


# Automatic mixed precision


@row(AMP, "autocast to bfloat16 and float16 with float32 parameters", cells())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_autocast(cell: Cell, dtype: torch.dtype, device: str) -> None:
    """A norm takes what the convolution gives, and gives that dtype on: no cast, as torch's. Statistics are float32."""
    ours, native = pair(device)
    model, reference = cell.prepared(ours), cell.eager.prepared(native)
    seen: dict[str, torch.dtype] = {}
    if not cell.compiled:
        ours[1].register_forward_hook(lambda m, inputs, y: seen.update(input=inputs[0].dtype, output=y.dtype))  # type: ignore[index]
    for _ in range(2):
        x = cell.laid_out(torch.randn(8, 3, 8, 8, device=device))
        results = []
        for way, module in ((model, ours), (reference, native)):
            module.zero_grad()
            with torch.autocast(device, dtype):
                y = way(x)
            y.float().square().mean().backward()
            results.append(
                {"y": y.detach(), **{n: p.grad for n, p in module.named_parameters()}, **dict(module.named_buffers())}
            )
        mine, native_value = results
        assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in native_value.items()}
        # Two roundings to 16 bits apart, in sums of 16-bit products.
        tolerance = 16 * testing.UNIT_ROUNDOFF[dtype]
        torch.testing.assert_close(mine, native_value, rtol=tolerance, atol=tolerance)
    if seen:
        assert seen == {"input": dtype, "output": dtype}


def train(model: nn.Module, way: Callable[[Tensor], Tensor], batches: list[Tensor], device: str) -> list[float]:
    """Scales after each step; the last batch overflows."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scales = []
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = way(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@row(AMP, "GradScaler with float16: scales, skipped steps, parameters", cells(training=(True,)))
def test_grad_scaler(cell: Cell, device: str) -> None:
    """An overflow reaches the scaler as an inf in the gradients; a step that is skipped has still seen its batch."""
    ours, native = pair(device)
    batches = [cell.laid_out(torch.randn(8, 3, 8, 8, device=device)) for _ in range(3)]
    batches.append(torch.full_like(batches[0], float("inf")))
    scales = train(ours, cell.prepared(ours), batches, device)
    assert scales == train(native, cell.eager.prepared(native), batches, device)
    assert scales[-1] < scales[-2]
    assert ours[1].num_batches_tracked == native[1].num_batches_tracked == 4  # type: ignore[index]
    tolerance = 16 * testing.UNIT_ROUNDOFF[torch.float16]
    torch.testing.assert_close(
        dict(ours.state_dict()), dict(native.state_dict()), rtol=tolerance, atol=tolerance, equal_nan=True
    )


# Activation checkpointing


def block(device: str) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, momentum=None)).to(device)


def run(model: nn.Module, cell: Cell, **options: Any) -> dict[str, Tensor]:
    """Results, gradients and state after a step, checkpointed with these options, if any."""
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
    "eager, the block runs twice and in training its statistics are updated twice, as torch's are; "
    "`checkpoint_contexts` makes it once. Compiled, they are updated once.",
)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpoint(cell: Cell, reentrant: bool, device: str) -> None:
    """The results of no checkpoint; of the statistics, what torch's layers have."""
    got = run(bnk.convert(block(device)), cell, use_reentrant=reentrant)
    plain = run(bnk.convert(block(device)), cell.eager)
    assert_same(got, {name: t for name, t in plain.items() if name not in dict(block(device).named_buffers())})
    native = run(block(device), cell.eager, **({} if cell.compiled else {"use_reentrant": reentrant}))
    torch.testing.assert_close(got, native)
    assert got["0.num_batches_tracked"] == (0 if not cell.training else 1 if cell.compiled else 2)


@row(
    CHECKPOINT,
    "`checkpoint_contexts`: statistics updated once",
    cells(compiled=(False,)),
    "with use_reentrant=False. torch.compile takes no such context_fn, and needs none.",
)
def test_checkpoint_contexts(cell: Cell, device: str) -> None:
    """Everything is as without a checkpoint, and the layers track again afterwards."""
    model = bnk.convert(block(device))
    contexts = partial(bnk.checkpoint_contexts, model)
    assert_same(run(model, cell, use_reentrant=False, context_fn=contexts), run(bnk.convert(block(device)), cell))
    assert model[0].track_running_stats  # type: ignore[index]


def test_checkpoint_contexts_leave_torchs_alone() -> None:
    """torch's layers save their statistics for the backward: without them the recomputation would be refused."""
    mixed = nn.Sequential(nn.BatchNorm2d(3), bnk.BatchNorm2d(3))
    cell = Cell(training=True, compiled=False, channels_last=False)
    got = run(mixed, cell, use_reentrant=False, context_fn=partial(bnk.checkpoint_contexts, mixed))
    assert got["0.num_batches_tracked"] == 2 and got["1.num_batches_tracked"] == 1


@row(CHECKPOINT, "`no_statistics_update`: forwards in training that leave the statistics", cells())
@pytest.mark.parametrize("convert", [True, False], ids=["ours", "torch"])
def test_no_statistics_update(cell: Cell, convert: bool, device: str) -> None:
    """The batch's statistics normalise, the buffers keep their values, and an exception does not leave them so."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).to(device)
    model[2].track_running_stats = False
    if convert:
        bnk.convert(model)
    before = copy.deepcopy(model.state_dict())
    x = cell.laid_out(torch.randn(4, 3, 5, 2, device=device))
    way = cell.prepared(model)
    expected = cell.prepared(copy.deepcopy(model))(x)
    with pytest.raises(KeyError), bnk.no_statistics_update(model):
        y = way(x)
        raise KeyError
    torch.testing.assert_close(y, expected)
    assert_same(dict(model.state_dict()), dict(before))
    assert [model[0].track_running_stats, model[2].track_running_stats] == [True, False]
    way(x)
    assert model[0].num_batches_tracked == int(cell.training)
