"""SyncBatchNorm on GPUs: over NCCL, or over gloo with one GPU. The cases are those of test_sync.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from compatibility import row
from distributed_training import batches, of_this_rank, small, train
from launches import launches
from processes import Pool
from test_distributed import TRAINING, full
from test_sync import LAYOUTS, PAIRS, RANKS, call, combined, to
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import bnkernels as bnk
from bnkernels.autograd import sync_batch_norm
from bnkernels.ranks import Ranks
from bnkernels.testing import Case, Inputs, Outputs, assert_within, judge_call, same_bits

pytestmark = pytest.mark.cuda


def judge(pool: Pool, split: tuple[int, ...], pair: str, layout: str) -> None:
    shape, memory = LAYOUTS[layout]
    inputs = Case.parse(f"offset_1e2/{shape}/{pair}/{memory}/normal/normal/train").inputs()
    try:
        assert_within(judge_call(inputs, combined(pool.run(call, inputs, split, "cuda"))), f"{split} {pair} {layout}")
    finally:
        pool.close()


@pytest.mark.parametrize("pair", PAIRS)
def test_gloo_on_one_gpu(pair: str) -> None:
    """Two processes on one GPU: gloo supports CUDA tensors."""
    judge(Pool(2, "gloo"), (0, 5, 12), pair, "4-D")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nccl(layout: str) -> None:
    ranks = min(RANKS, torch.cuda.device_count())
    if ranks < 2:
        pytest.skip("needs two CUDA GPUs: NCCL has one rank on each")
    judge(Pool(ranks, "nccl"), (0, 1, *range(14 - ranks, 13)), "bfloat16+float32", layout)


def alone(inputs: Inputs) -> Outputs:
    """The multi-rank code path in a group of one. Any host-device synchronization is an error."""
    inputs = to(inputs, "cuda")
    x = inputs.x.detach().requires_grad_()
    buffers = (inputs.running_mean, inputs.running_var, inputs.num_batches_tracked)
    assert dist.group.WORLD is not None
    ranks = Ranks(dist.group.WORLD, 1, "test")
    ranks.gather(torch.zeros(1, device="cuda"), x, "the start of NCCL")
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = sync_batch_norm(x, inputs.weight, inputs.bias, *buffers, inputs.momentum, inputs.eps, ranks)
        y.backward(inputs.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    outputs: Outputs = to(Outputs(y.detach(), None, None, *buffers, x.grad), "cpu")
    return outputs


def test_nccl_on_one_gpu() -> None:
    """With momentum=None: the batch count, like the number of values, is read on the device only."""
    inputs = Case.parse("offset_1e2/12x5x3x7/bfloat16+float32/contiguous/normal/normal/train").inputs()
    inputs = replace(inputs, momentum=None)
    pool = Pool(1, "nccl")
    try:
        assert_within(judge_call(inputs, pool.run(alone, inputs)[0]), "NCCL")
    finally:
        pool.close()


def curve_on_gpus(before: bool) -> tuple[list[float], dict[str, Tensor]]:
    """torch's DistributedDataParallel over NCCL, one GPU per rank; converted before or after wrapping."""
    model = small().double().cuda()
    if before:
        model = bnk.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = DistributedDataParallel(model, device_ids=[dist.get_rank()])
    bnk.SyncBatchNorm.convert_sync_batchnorm(ddp.module)
    data = [(x.cuda(), target.cuda()) for x, target in batches(4, 8)]
    return of_this_rank(ddp, data), {name: t.cpu() for name, t in full(ddp).items()}


@row("Several processes", "DistributedDataParallel with SyncBatchNorm, over NCCL", TRAINING)
@pytest.mark.parametrize("before", [True, False], ids=["converted before", "converted after"])
def test_loss_curve_of_one_process(before: bool) -> None:
    """As in test_distributed.py: mean losses and state equal those of one process on the whole batch."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs: NCCL has one rank on each")
    torch.manual_seed(0)  # as each process does
    model = small().double()
    expected = train(model, batches(4, 8))
    pool = Pool(2, "nccl")
    try:
        (one, state), (two, other) = pool.run(curve_on_gpus, before)
    finally:
        pool.close()
    assert all(same_bits(state[key], other[key]) for key in state)
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(one, two)], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-7, atol=1e-9)
    assert expected[-1] != expected[0] and one != two


def launches_of_a_step(inputs: Inputs) -> tuple[list[str], list[str]]:
    """The launches of forward and backward, after a warm-up step."""
    layer = bnk.SyncBatchNorm(inputs.x.shape[1]).cuda()
    x, grad = inputs.x.cuda().requires_grad_(), inputs.grad.cuda()
    torch.autograd.grad(layer(x), x, grad)
    made: list[Tensor] = []
    forward = launches(lambda: made.append(layer(x)))
    return forward, launches(torch.autograd.grad, made[0], [x, *layer.parameters()], grad)


@pytest.mark.fake_cuda
def test_one_collective_per_direction() -> None:
    """Only kernels besides the collective: no copies. torch itself increments the counter."""
    inputs = Case.parse("offset_1e2/12x5x3x7/bfloat16+float32/contiguous/normal/normal/train").inputs()
    pool = Pool(2, "nccl")
    try:
        for forward, backward in pool.run(launches_of_a_step, inputs):
            statistics = ["statistics_kernel", "finalize_welford", "ncclAllGather"]
            assert forward == [*statistics, "aten::add_.Tensor", "combine_statistics", "normalize_kernel"]
            sums = ["grad_sums_kernel", "finalize_grad_sums", "ncclAllGather"]
            assert backward == [*sums, "combine_grad_sums", "grad_input_kernel"]
    finally:
        pool.close()
