"""The fake CUDA device (tests/support/fake_cuda): what it records of bnkernels, and that it detects the faults it is
built for.

The first half runs on it. The second half starts faulty programs in processes of their own, because a fault spoils all
later work of its process.
"""

from __future__ import annotations

import subprocess
from typing import Any

import fake_cuda
import pytest
import torch
from cuda_steps import Step
from interpreter import in_subprocess
from launches import KERNELS, launches
from torch import Tensor

import bnkernels as bnk
from bnkernels import _ops as ops
from bnkernels.testing import Case


def on_it(test: Any) -> Any:
    return pytest.mark.cuda(pytest.mark.fake_cuda(test))


@on_it
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16+float32"])
@pytest.mark.parametrize("shape", ["16x3x14x14", "2x4x7x7", "256x8x7x7", "4096x16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_launch_each_way(shape: str, layout: str, dtype: str) -> None:
    """One launch, and no copy, fill or other device work."""
    if layout == "channels_last" and shape.count("x") == 1:
        pytest.skip("2-D tensors have no separate channels_last layout")
    step = Step(Case.parse(f"offset_1e2/{shape}/{dtype}/{layout}/normal/normal/train").inputs("cuda"))
    step()
    made: list[Tensor] = []
    assert launches(lambda: made.append(step.forward())) == ["persistent_forward_kernel"]
    assert launches(torch.autograd.grad, made[0], step.leaves, step.grad) == ["persistent_backward_kernel"]


@on_it
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_one_launch_of_a_module(momentum: float | None, relu: bool, adds: bool) -> None:
    """The launch also updates the counter and the running statistics, and applies an addition and a ReLU. Inference is
    one launch too."""
    x = torch.randn(8, 4, 7, 7, device="cuda")
    args = (x, torch.randn_like(x)) if adds else (x,)
    layer = bnk.BatchNormAct2d(4, momentum=momentum, apply_act=relu).cuda()
    layer(*args)
    assert launches(layer, *args) == ["persistent_forward_kernel"]
    layer.eval()
    assert launches(layer, *args) == ["normalize_kernel"]


@on_it
def test_one_launch_after_a_relu() -> None:
    layer = bnk.BatchNormAct2d(4).cuda()
    x = torch.randn(8, 4, 7, 7, device="cuda", requires_grad=True)
    leaves = [x, *layer.parameters()]
    torch.autograd.grad(layer(x), leaves, torch.ones_like(x))
    y, grad = layer(x), torch.randn_like(x)
    assert launches(torch.autograd.grad, y, leaves, grad) == ["persistent_backward_kernel"]


@on_it
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_launch_of_an_ensemble(training: bool) -> None:
    """K models under vmap are one BatchNorm over K*C channels. torch lays x out before it, and sums gradients
    after it.
    """
    models = [bnk.BatchNorm2d(4, device="cuda").train(training) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 8, 4, 7, 7, device="cuda", requires_grad=True)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    def forward() -> Tensor:
        return torch.vmap(call)(parameters, buffers, x)

    y = forward()
    forwards = [name for name in launches(forward) if name in KERNELS]
    assert forwards == ["persistent_forward_kernel" if training else "normalize_kernel"]
    leaves, grad = [x, *parameters.values()], torch.randn_like(y)
    backwards = [name for name in launches(torch.autograd.grad, y, leaves, grad) if name in KERNELS]
    in_eval = ["grad_sums_kernel", "finalize_grad_sums", "grad_input_kernel"]
    assert backwards == (["persistent_backward_kernel"] if training else in_eval)


@on_it
def test_kernels_of_torch_are_recorded() -> None:
    x = torch.ones(3, device="cuda")
    assert launches(x.add_, 1) == ["aten::add_.Tensor"]
    assert launches(torch.clone, x) == ["a copy"]


@on_it
def test_launches_for_the_parameters_alone() -> None:
    """Without the input's gradient nothing waits for the sums, so the two launches of the two-pass path run."""
    layer = bnk.BatchNorm2d(4).cuda()
    y = layer(torch.randn(8, 4, 7, 7, device="cuda"))
    grad = torch.randn_like(y)
    ran = launches(torch.autograd.grad, y, list(layer.parameters()), grad)
    assert ran == ["grad_sums_kernel", "finalize_grad_sums"]


@on_it
def test_limits_are_the_devices() -> None:
    properties = torch.cuda.get_device_properties(0)
    limits = ops.device_limits(0)
    assert limits["multiprocessors"] == properties.multi_processor_count
    assert limits["max_threads_per_multiprocessor"] == properties.max_threads_per_multi_processor


# Faulty programs


PRELUDE = """
import sys
from types import SimpleNamespace
import fake_cuda
fake_cuda.attach()
import torch
import bnkernels as bnk
layer = bnk.BatchNorm2d(3).cuda()
x = torch.randn(16, 3, 14, 14).cuda()
y = layer(x)
torch.cuda.synchronize()
side = torch.cuda.Stream()
graph = torch.cuda.CUDAGraph()
"""

FAULTS = {
    # Nothing waits for the copy: the kernel reads fresh memory, which is NaN.
    "a result of another stream": (
        """
with torch.cuda.stream(side):
    late = torch.empty_like(x)
    late.copy_(x, non_blocking=True)
y = layer(late)
torch.cuda.current_stream().synchronize()
sys.exit("all NaN" if y.isnan().all() else "as if it had waited")
        """,
        "all NaN",
    ),
    # Only dependencies order a graph's nodes: its replays give more than one result.
    "unordered branches": (
        """
with torch.cuda.graph(graph):
    changed = x.clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        changed.mul_(2)
    layer(changed)
    torch.cuda.current_stream().wait_stream(side)
seen = set()
for _ in range(12):
    layer.reset_running_stats()
    graph.replay()
    seen.add(layer.running_var.sum().item())
sys.exit(f"{len(seen)} results")
        """,
        "2 results",
    ),
    "a synchronization within a capture": (
        "with torch.cuda.graph(graph): torch.cuda.synchronize()",
        "a wait for the device: not while a stream is captured",
    ),
    "a host read within a capture": (
        "with torch.cuda.graph(graph): layer(x)[0, 0, 0, 0].item()",
        "a wait for the stream: not while a stream is captured",
    ),
    "a stream that is not joined": (
        """
with torch.cuda.graph(graph):
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
        """,
        "unjoined work",
    ),
    "a capture that waits for earlier work": (
        """
with torch.cuda.stream(side):
    y = layer(x)
with torch.cuda.graph(graph):
    torch.cuda.current_stream().wait_stream(side)
        """,
        "a wait for an event of before",
    ),
    "an access past an end": (
        """
bytes = 20 << 20
end = torch.cuda.caching_allocator_alloc(bytes) + bytes
array = {"shape": tuple(x.shape), "typestr": "<f4", "data": (end - 64, False), "version": 2}
layer(torch.as_tensor(SimpleNamespace(__cuda_array_interface__=array), device="cuda"))
torch.cuda.synchronize()
        """,
        "which is in no allocation of a device",
    ),
}


def on_fake_cuda(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    return in_subprocess(code, **fake_cuda.environment(), **environment)


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_seen(body: str, message: str) -> None:
    done = on_fake_cuda(PRELUDE + body)
    assert done.returncode != 0 and message in done.stderr, done.stderr


# Correct programs


def test_ends_of_allocations() -> None:
    """The program that compute-sanitizer checks on a GPU (bench/gpu.sh), with one allocation per tensor: no access past
    an end, including scratch memory and the saved statistics."""
    code = (
        "import fake_cuda; fake_cuda.attach(); from bench.tools.sanitize import main; "
        "raise SystemExit(main(['--quick']))"
    )
    done = on_fake_cuda(code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_capture_first() -> None:
    """Captures the first call of the process: its initialization, device queries and allocations must be legal in a
    capture."""
    code = """
import fake_cuda
fake_cuda.attach()
import torch
import bnkernels as bnk
layer = bnk.BatchNorm1d(16).cuda()
x = torch.randn(4096, 16).cuda().requires_grad_()
ones = torch.ones(4096, 16).cuda()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, ones)
graph.replay()
torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
assert layer.num_batches_tracked.item() == 1
"""
    done = on_fake_cuda(code)
    assert done.returncode == 0, done.stderr


def test_a_device_that_holds_less() -> None:
    """The occupancy is lower than the plan's limits predict. The call must use the two-pass path or fewer clusters, and
    never make a launch that the device refuses or that waits for blocks which cannot start."""
    code = """
import fake_cuda
fake_cuda.attach()
import torch
import bnkernels as bnk
from launches import launches
for shape, kernels in (
    ((4096, 16), ["statistics_kernel", "finalize_statistics", "normalize_kernel"]),  # a grid group
    ((64, 16, 32, 32), ["persistent_forward_kernel"]),  # clusters
):
    plan = bnk.explain(shape, device="cuda").passes[0].persistent
    assert plan.group == ("grid" if len(shape) == 2 else "cluster") and plan.groups * plan.group_size > 8
    x = torch.randn(shape).cuda()
    layer = (bnk.BatchNorm1d if len(shape) == 2 else bnk.BatchNorm2d)(shape[1]).cuda()
    native = torch.nn.BatchNorm1d(shape[1]).cuda()
    layer(x), torch.nn.functional.batch_norm(x, native.running_mean, native.running_var, training=True)
    results = []
    assert launches(lambda: results.append(layer(x))) == kernels, launches(layer, x)
    expected = torch.nn.functional.batch_norm(x, native.running_mean, native.running_var, training=True)
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(layer.running_mean, native.running_mean)
    torch.testing.assert_close(layer.running_var, native.running_var)
"""
    done = on_fake_cuda(code, FAKE_CUDA_BLOCKS_PER_MULTIPROCESSOR="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("value", "kernels"),
    [
        ("auto", ["persistent_forward_kernel"]),
        ("two_pass", ["statistics_kernel", "finalize_statistics", "normalize_kernel"]),
    ],
)
def test_plan_setting(value: str, kernels: list[str]) -> None:
    """BNKERNELS_PLAN selects the path, under the names that explain() and the documentation give it."""
    code = f"""
import fake_cuda
fake_cuda.attach()
import torch
import bnkernels as bnk
from launches import launches
layer, x = bnk.BatchNorm2d(8).cuda(), torch.randn(4, 8, 6, 6).cuda()
layer(x)
assert launches(lambda: layer(x)) == {kernels}, launches(lambda: layer(x))
assert bnk.explain(x).passes[0].path == {"persistent" if len(kernels) == 1 else "two_pass"!r}
"""
    done = on_fake_cuda(code, BNKERNELS_PLAN=value)
    assert done.returncode == 0, done.stderr


def test_an_unknown_plan_setting_is_an_error() -> None:
    code = """
import fake_cuda
fake_cuda.attach()
import torch
import bnkernels as bnk
bnk.BatchNorm2d(8).cuda()(torch.randn(4, 8, 6, 6).cuda())
"""
    done = on_fake_cuda(code, BNKERNELS_PLAN="streaming")
    assert done.returncode == 1 and "BNKERNELS_PLAN=streaming: expected auto or two_pass" in done.stderr
