"""Training in several gloo processes: DDP, FSDP2, checkpoints, and SyncBatchNorm with them.

test_sync.py tests SyncBatchNorm alone.

"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from compatibility import cells, row
from distributed_training import Block, batches, of_this_rank, small, train
from processes import Pool
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bnkernels as bnk
from bnkernels.testing import same_bits

PROCESSES = "Several processes"
TRAINING = cells(training=(True,), compiled=(False,), channels_last=(False,))


@pytest.fixture(scope="module", params=[2, 4])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(request.param, "gloo")
    yield made
    made.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    made = Pool(2, "gloo")
    yield made
    made.close()


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=5)
    return model


def full(model: nn.Module) -> dict[str, Tensor]:
    """The full state of a model on each rank, whatever wraps it."""
    return {
        name.removeprefix("module."): t.full_tensor() if isinstance(t, DTensor) else t.clone()
        for name, t in model.state_dict().items()
    }


# SyncBatchNorm under DDP: the curve of one process


MODELS = {"small": small, "resnet18": resnet18}


def curve(name: str, broadcast: bool, converted_before: bool) -> tuple[list[float], dict[str, Tensor]]:
    model = MODELS[name]().double()
    if converted_before:
        model = bnk.SyncBatchNorm.convert_sync_batchnorm(model)
        ddp = bnk.DistributedDataParallel(model, broadcast_buffers=broadcast)
    else:
        ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
        bnk.SyncBatchNorm.convert_sync_batchnorm(ddp.module)
    assert sum(type(module) is bnk.SyncBatchNorm for module in ddp.modules()) > 3
    losses = of_this_rank(ddp, batches(4, 8))
    return losses, full(ddp)


@row(PROCESSES, "DistributedDataParallel with SyncBatchNorm, buffers broadcast or not", TRAINING)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("broadcast", "converted_before"), [(True, True), (False, False)])
def test_loss_curve_of_one_process(pair: Pool, name: str, broadcast: bool, converted_before: bool) -> None:
    """The mean of the ranks' losses equals the loss of one process on the whole batch at every step; so does the
    state."""
    if name == "resnet18" and (importlib.util.find_spec("torchvision") is None or not broadcast):
        pytest.skip("torchvision is not installed" if broadcast else "once is enough for a large model")
    torch.manual_seed(0)  # as each process does
    model = MODELS[name]().double()
    expected = train(model, batches(4, 8))
    (one, state), (two, other) = pair.run(curve, name, broadcast, converted_before)
    assert all(same_bits(state[key], other[key]) for key in state)
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(one, two)], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-7, atol=1e-9)
    assert expected[-1] != expected[0] and one != two


def sync_error() -> str:
    """DDP's error for a SyncBatchNorm on the CPU: torch's DDP for both layers, and this package's DDP for torch's."""
    said = []
    for layer, wrapper in (
        (bnk.SyncBatchNorm(3), DistributedDataParallel),
        (nn.SyncBatchNorm(3), DistributedDataParallel),
        (nn.SyncBatchNorm(3), bnk.DistributedDataParallel),
    ):
        try:
            wrapper(nn.Sequential(layer))
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    (message,) = set(said)
    return message


def test_ddp_rejects_sync_batch_norm_on_cpu(pair: Pool) -> None:
    """The reason for bnkernels.DistributedDataParallel, which accepts this package's layer only."""
    assert pair.run(sync_error) == ["SyncBatchNorm layers only work with GPU modules"] * 2


# BatchNorm under DDP and FSDP2: as torch.nn's


def two_forwards(broadcast: bool, converted: bool, backward: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of two forwards and one backward, while DDP may overwrite the buffers between them; and the state."""
    model = small().double()
    if converted:
        bnk.convert(model)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    (x, _), (z, _) = ((x[rank::ranks], t) for x, t in batches(2, 8))
    loss = ddp(x).square().sum() + ddp(z).pow(3).sum()
    if backward:
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], full(ddp)


@row(PROCESSES, "DistributedDataParallel with BatchNorm, two forwards before one backward", TRAINING)
@pytest.mark.parametrize("broadcast", [True, False], ids=["broadcast", "own buffers"])
def test_two_forwards_before_one_backward(pool: Pool, broadcast: bool) -> None:
    """Gradients do not depend on the buffers, even if DDP overwrites them; the buffers match those of torch's layers.

    torch's layers cannot always do this (2.11 raises), so their gradients without broadcast are the reference.
    """
    found = pool.run(two_forwards, broadcast, True, True)
    grads = pool.run(two_forwards, False, False, True)
    states = pool.run(two_forwards, broadcast, False, False)
    for rank in range(pool.size):
        torch.testing.assert_close(found[rank], (grads[rank][0], states[rank][1]), rtol=1e-9, atol=1e-9)
        # The last forward updates each rank's own buffers, after the last broadcast.
        assert rank == 0 or not same_bits(found[rank][1]["1.running_mean"], found[0][1]["1.running_mean"])


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.modules():
        if isinstance(layer, Block):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(next(model.parameters()), DTensor)
    return model


def train_sharded(kind: str) -> tuple[list[float], dict[str, Tensor]]:
    model = small().double()
    if kind == "ours":
        bnk.convert(model)
    elif kind == "synchronised":
        model = bnk.SyncBatchNorm.convert_sync_batchnorm(model)
    sharded(model)
    return of_this_rank(model, batches(3, 8)), full(model)


@row(PROCESSES, "FSDP2 (fully_shard), with BatchNorm and with SyncBatchNorm", TRAINING)
def test_fsdp(pool: Pool) -> None:
    """BatchNorm matches torch's under fully_shard; SyncBatchNorm matches one process on the whole batch."""
    ours, torch_runs, synchronised = (pool.run(train_sharded, kind) for kind in ("ours", "torch", "synchronised"))
    for found, expected in zip(ours, torch_runs):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    torch.manual_seed(0)
    model = small().double()
    expected_losses = train(model, batches(3, 8))
    for _, state in synchronised:
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-7, atol=1e-9)
    mean = [sum(losses) / len(losses) for losses in zip(*(losses for losses, _ in synchronised))]
    torch.testing.assert_close(mean, expected_losses, rtol=1e-8, atol=0)


# Fused models


def train_fused(which: str, norm: str, broadcast: bool) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses, state, and the number of fused layers. `which`: fuse the model, the DDP module around it, or neither."""
    torch.compiler.reset()
    model = small().double()
    if norm == "synchronised":
        model = bnk.SyncBatchNorm.convert_sync_batchnorm(model)
    elif norm == "converted":
        bnk.convert(model)
    report = bnk.FusionReport()
    if which == "model":
        bnk.fuse(model, report=report)
    ddp = bnk.DistributedDataParallel(model, broadcast_buffers=broadcast)
    if which == "ddp":
        bnk.fuse(ddp, report=report)
    losses = of_this_rank(ddp, batches(3, 8))
    return losses, full(ddp), len({each.name for each in report.fused})


@row(PROCESSES, "DistributedDataParallel of a fused model, and fused itself", TRAINING)
@pytest.mark.parametrize("norm", ["torch", "converted", "synchronised"])
def test_fused_models(pair: Pool, norm: str) -> None:
    """fuse(), called on the model or on the DDP module, changes neither losses nor state."""
    for which, broadcast in (("model", True), ("ddp", False)):
        plain = pair.run(train_fused, "none", norm, broadcast)
        for found, expected in zip(pair.run(train_fused, which, norm, broadcast), plain):
            torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=0)
            torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-9)
            assert found[2] == (0 if norm == "synchronised" else 2), which


# Checkpoints


def save(path: str) -> dict[str, Tensor]:
    model = sharded(bnk.SyncBatchNorm.convert_sync_batchnorm(small().double()))
    of_this_rank(model, batches(2, 8))
    checkpoint.save(get_model_state_dict(model), checkpoint_id=path)
    return full(model)


def load(path: str) -> tuple[dict[str, Tensor], list[float]]:
    """Loads into DDP with torch's layers, by DDP's names, and trains two more steps."""
    torch.manual_seed(5)
    model = small().double()
    state: dict[str, Any] = get_model_state_dict(model)
    checkpoint.load(state, checkpoint_id=path)
    set_model_state_dict(model, state)
    loaded = copy.deepcopy(full(model))
    ddp = bnk.DistributedDataParallel(bnk.SyncBatchNorm.convert_sync_batchnorm(model))
    return loaded, of_this_rank(ddp, batches(4, 8)[2:])


@row(PROCESSES, "torch.distributed.checkpoint, from FSDP2 to DDP", TRAINING)
def test_checkpoint(pool: Pool, tmp_path: Path) -> None:
    """Saved from FSDP2 and loaded whole: parameters, buffers and counter are bitwise equal."""
    saved = pool.run(save, str(tmp_path))
    for (loaded, losses), expected in zip(pool.run(load, str(tmp_path)), saved):
        assert list(loaded) == list(expected)
        assert all(same_bits(loaded[name], expected[name]) for name in expected)
        assert loaded["1.num_batches_tracked"] == 2 and len(losses) == 2
