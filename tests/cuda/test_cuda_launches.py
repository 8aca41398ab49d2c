"""The launchers on devices that offer less than their attributes claim, and the memory that outlives a launch.

Runs on fake CUDA devices (tests/support/fake_cuda), each in its own process, because refusals are queried once per
process.
"""

from __future__ import annotations

import fake_cuda
import pytest
from interpreter import in_subprocess

ONE_LAUNCH = ["persistent_forward_kernel"]
SEVERAL = ["statistics_kernel", "finalize_statistics", "normalize_kernel"]

PRELUDE = """
import warnings
import fake_cuda
fake_cuda.attach()
import torch
import bnkernels as bnk
from bnkernels import _ops as ops
from launches import KERNELS, launches

def forward(layer, x):
    # The launches and the number of warnings of a call; checks its result against nn.BatchNorm.
    made = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernels = [name for name in launches(lambda: made.append(layer(x))) if name in KERNELS]
    torch.testing.assert_close(made[0], torch.nn.functional.batch_norm(x, None, None, training=True))
    return kernels, ["refused" in str(warning.message) for warning in caught].count(True)

def layer_and_input(*shape):
    return (bnk.BatchNorm1d if len(shape) == 2 else bnk.BatchNorm2d)(shape[1]).cuda(), torch.randn(shape).cuda()

grid = layer_and_input(4096, 16)
cluster = layer_and_input(16, 3, 14, 14)
alone = layer_and_input(2, 16, 4, 4)
"""


def run(code: str, **environment: str) -> None:
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    done = in_subprocess(PRELUDE + code, **fake_cuda.environment(), **environment)
    assert done.returncode == 0, done.stderr


def test_a_whole_device() -> None:
    """The baseline of the other tests: one launch for each kind of group, and no warning."""
    run(
        f"""
for pair in (grid, cluster, alone):
    assert forward(*pair) == ({ONE_LAUNCH}, 0), forward(*pair)
assert ops.device_limits(0)["max_cluster"] == 8
"""
    )


def test_ptx_older_than_the_device() -> None:
    """Kernels compiled for sm_80 and run from their PTX on a device with clusters have no cluster code, so no clusters
    are planned. (The fake CUDA device fails a cluster launch of such a kernel. A GPU would run it, and each block
    would take its own statistics for those of the whole cluster.)"""
    run(
        f"""
assert ops.device_limits(0)["max_cluster"] == 0
for pair in (grid, cluster, alone):
    assert forward(*pair) == ({ONE_LAUNCH}, 0), forward(*pair)
""",
        FAKE_CUDA_PTX="80",
    )


@pytest.mark.parametrize("refused", ["cooperative", "resources"])
def test_a_refused_launch(refused: str) -> None:
    """The error is cleared, the call falls back to several launches, the caller is warned once, and later calls of the
    same kind do not retry. Covers the backward as well."""
    run(
        f"""
layer, x = grid
for warned in (1, 0):
    kernels, count = forward(layer, x)
    assert kernels == {SEVERAL} and count == warned, (kernels, count)
x = x.clone().requires_grad_()
y = layer(x)
(grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-5, rtol=0)
torch.cuda.synchronize()
assert layer.num_batches_tracked.item() == 3
if "{refused}" == "cooperative":
    assert forward(*cluster) == ({ONE_LAUNCH}, 0)
""",
        FAKE_CUDA_REFUSES=refused,
    )


def test_refused_in_a_capture() -> None:
    """A capture continues with the several launches: a refused launch does not invalidate it."""
    run(
        """
layer, x = grid
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = layer(x)
graph.replay()
torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
""",
        FAKE_CUDA_REFUSES="cooperative",
    )


def test_no_cluster_fits() -> None:
    """cudaErrorInvalidClusterSize from the query of the number of co-resident clusters."""
    run(
        f"""
kernels, _ = forward(*cluster)
assert kernels == {SEVERAL}, kernels
for pair in (grid, alone):
    assert forward(*pair) == ({ONE_LAUNCH}, 0)
torch.cuda.synchronize()
""",
        FAKE_CUDA_REFUSES="clusters",
    )


@pytest.mark.slow
def test_capturing_each_step_takes_no_more_memory() -> None:
    """A destroyed graph releases its barrier workspace. Live graphs hold theirs."""
    run(
        """
layer, x = grid
def capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    return graph, y
live = [capture() for _ in range(3)]
def workspaces():
    return sum(len(words) for words in ops.barrier_workspace(0))
before = workspaces()
for step in range(2 * before):
    graph, y = capture()
    graph.replay()
    del graph, y
assert workspaces() == before, (before, workspaces())
# Live graphs add workspaces.
more = [capture() for _ in range(before)]
assert workspaces() > before
for graph, y in live + more:
    graph.replay()
torch.cuda.synchronize()
torch.testing.assert_close(live[0][1], torch.nn.functional.batch_norm(x, None, None, training=True))
assert layer.num_batches_tracked.item() == 2 * before + len(live + more)
"""
    )


def test_a_graph_destroyed_before_its_replay_is_over() -> None:
    """No other launch gets the graph's workspace until the replay has finished."""
    run(
        """
layer, x = grid
side = torch.cuda.Stream()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = layer(x)
with torch.cuda.stream(side):
    graph.replay()
del graph
other = torch.cuda.CUDAGraph()
with torch.cuda.stream(torch.cuda.Stream()):  # because torch.cuda.graph() would wait for the replay
    other.capture_begin()
    z = layer(x)
    other.capture_end()
    other.replay()
torch.cuda.synchronize()
assert layer.num_batches_tracked.item() == 2
for words in ops.barrier_workspace(0):
    assert not (words.cpu() & 0x7FFFFFFF).any()
# Two graphs, two workspaces: each has passed one barrier, which sets the top bit.
assert sum(int((words.cpu() != 0).any(1).sum()) for words in ops.barrier_workspace(0)) == 2
"""
    )


def test_memory_that_torch_caches() -> None:
    """A barrier workspace can be allocated while torch's caching allocator holds all of the device's memory."""
    run(
        """
layer, x = grid
large = torch.empty(62 << 20, dtype=torch.uint8, device="cuda")
del large
assert torch.cuda.mem_get_info()[0] < 1 << 20
y = layer(x)
torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
""",
        FAKE_CUDA_MEMORY_MB="64",
    )


@pytest.mark.parametrize("how", ["use_mem_pool", "thread"])
def test_a_users_pool_is_left_alone(how: str) -> None:
    """The first call of a process allocates the barrier words while the thread allocates to a pool of its own, as
    torch's cudagraphs backend does during warm-up. The barrier words must not come from that pool."""
    inside = {
        "use_mem_pool": "with torch.cuda.use_mem_pool(pool): first()",
        "thread": """
torch._C._cuda_beginAllocateCurrentThreadToPool(0, pool.id)
first()
torch._C._cuda_endAllocateToPool(0, pool.id)""",
    }[how]
    run(
        f"""
layer, x = grid
torch.cuda.synchronize()
pool = torch.cuda.MemPool()
def first():
    layer(x).sum()
{inside}
torch.cuda.synchronize()
blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
assert blocks, "nothing was allocated to the pool"
assert not any(block["state"] == "active_allocated" for block in blocks), blocks
"""
    )
