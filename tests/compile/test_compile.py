"""torch.compile: one graph, with the outputs, gradients and running statistics of eager mode.

Where both run the same kernels on the same layouts, the bits must be equal. A compiler that changes layouts inside a
model changes the order of sums; there the tolerances of torch.testing apply.

"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compatibility import Cell, cells, row
from hardware import INDUCTOR
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code, run_fw_bw_and_get_code

import bnkernels as bnk
from bnkernels import testing

SECTION = "torch.compile"
COMPILED = cells(compiled=(True,))
CONTIGUOUS = cells(compiled=(True,), channels_last=(False,))
STEPS = 10


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def norms(device: str = "cpu") -> nn.Sequential:
    """BatchNorms with both kinds of averages, and no layer whose order of computation a compiler may change."""
    return nn.Sequential(bnk.BatchNorm2d(3), nn.ReLU(), bnk.BatchNorm2d(3, momentum=None)).to(device)


def convolutions(device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), bnk.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), bnk.BatchNorm2d(8, momentum=None)
    ).to(device)


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """y and the gradient of x, for a fixed gradient of y."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y))
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and gradients."""
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**model.state_dict(), **grads}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].stride() == tensor.stride(), name
        assert testing.same_bits(got[name], tensor), name


# Against eager


@row(SECTION, "forward, gradients and statistics over 10 steps, any batch and image size (inductor)", COMPILED)
@INDUCTOR
def test_steps(cell: Cell, device: str) -> None:
    """Bits of y, dx, parameter gradients and buffers equal eager's at every step, and buffers are updated in place."""
    eager, other = norms(device), norms(device)
    reference, compiled = cell.eager.prepared(eager), cell.prepared(other, "inductor")
    before = {name: (buffer, buffer.data_ptr()) for name, buffer in other.named_buffers()}
    for size in range(STEPS):
        x = cell.laid_out(torch.randn(2 + size, 3, 4 + size % 3, 5 + size, device=device))
        assert_same(step(compiled, x), step(reference, x))
        assert_same(state(other), state(eager))
    assert other[0].num_batches_tracked == (STEPS if cell.training else 0)
    for name, buffer in other.named_buffers():
        assert buffer is before[name][0] and buffer.data_ptr() == before[name][1], name


@row(SECTION, "a model with convolutions (inductor)", COMPILED)
@INDUCTOR
def test_convolutions(cell: Cell, device: str) -> None:
    """The compiler may choose layouts inside the model; outputs have eager's strides.

    In float64: the gradient of a convolution before a norm is the remainder of sums that cancel, as the norm removes
    its scale.

    """
    eager = convolutions(device).double()
    other = copy.deepcopy(eager)
    reference, compiled = cell.eager.prepared(eager), cell.prepared(other, "inductor")
    for _ in range(3):
        x = cell.laid_out(torch.randn(4, 3, 8, 8, device=device, dtype=torch.float64))
        got, expected = step(compiled, x), step(reference, x)
        torch.testing.assert_close(got, expected)
        assert got["y"].stride() == expected["y"].stride()
        torch.testing.assert_close(state(other), state(eager))


@row(SECTION, 'mode="reduce-overhead" (inductor; a CUDA graph on a GPU)', CONTIGUOUS)
@INDUCTOR
def test_reduce_overhead(cell: Cell, device: str) -> None:
    """On a GPU the step is a CUDA graph that must write to the model's buffers; on a CPU it is inductor's code."""
    eager, other = norms(device), norms(device)
    reference, options = cell.eager.prepared(eager), {"mode": "reduce-overhead", "fullgraph": True}
    compiled = torch.compile(cell.eager.prepared(other), **options)
    for _ in range(5):  # the first calls warm up and record
        x = cell.laid_out(torch.randn(4, 3, 6, 7, device=device))
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(step(compiled, x), step(reference, x))
        assert_same(state(other), state(eager))


@pytest.mark.cuda
@INDUCTOR
def test_reduce_overhead_is_a_cuda_graph() -> None:
    """Mutated buffers can make the compiler skip CUDA graphs: it must not skip here."""
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = torch.compile(norms("cuda"), mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        step(compiled, torch.randn(4, 3, 6, 7, device="cuda"))
    assert counters["inductor"]["cudagraph_skips"] == 0


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: bnk.BatchNorm1d(3), (6, 3)),
    "1d of 3-D": (lambda: bnk.BatchNorm1d(3), (6, 3, 5)),
    "3d": (lambda: bnk.BatchNorm3d(3), (2, 3, 4, 3, 2)),
    "not affine": (lambda: bnk.BatchNorm2d(3, affine=False), (4, 3, 5, 2)),
    "not tracking": (lambda: bnk.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 2)),
    "no batch": (lambda: bnk.BatchNorm2d(3), (0, 3, 5, 2)),
}


@row(SECTION, "1d and 3d, not affine, without statistics, an empty batch", CONTIGUOUS)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_layers(cell: Cell, make: Callable[[], nn.Module], shape: tuple[int, ...], device: str) -> None:
    eager, other = make().to(device), make().to(device)
    reference, compiled = cell.eager.prepared(eager), cell.prepared(other)
    for _ in range(2):
        x = torch.randn(shape, device=device)
        assert_same(step(compiled, x), step(reference, x))
        assert_same(state(other), state(eager))


@row(SECTION, "one layer called twice before the backward", COMPILED)
def test_called_twice(cell: Cell, device: str) -> None:
    """The second call starts from the first call's statistics, and each backward uses its own."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bnk.BatchNorm2d(3, momentum=None, device=device)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * self.norm(x.square())

    eager, other = Siamese(), Siamese()
    reference, compiled = cell.eager.prepared(eager), cell.prepared(other)
    for _ in range(2):
        x = cell.laid_out(torch.randn(4, 3, 5, 2, device=device))
        assert_same(step(compiled, x), step(reference, x))
        assert_same(state(other), state(eager))


@row(SECTION, "frozen parameters; inference_mode", CONTIGUOUS)
def test_without_gradients(cell: Cell, device: str) -> None:
    """Frozen parameters get no gradient, and a graph without autograd still updates the buffers."""
    eager, other = norms(device), norms(device)
    for model in (eager, other):
        model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
        model[2].bias.requires_grad_(False)  # type: ignore[union-attr]
    reference, compiled = cell.eager.prepared(eager), cell.prepared(other)
    x = torch.randn(4, 3, 5, 2, device=device)
    assert_same(step(compiled, x), step(reference, x))
    assert_same(state(other), state(eager))
    assert other[0].weight.grad is None and other[2].bias.grad is None
    with torch.inference_mode():
        assert testing.same_bits(compiled(x), reference(x))
    assert_same(state(other), state(eager))


@row(SECTION, "bnkernels.batch_norm, the function", COMPILED)
def test_function(cell: Cell, device: str) -> None:
    def run(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> Tensor:
        return bnk.batch_norm(x, mean, var, weight, None, cell.training, momentum=0.3)

    x, weight = cell.laid_out(torch.randn(4, 3, 5, 2, device=device)), torch.rand(3, device=device)
    buffers = [[torch.zeros(3, device=device), torch.ones(3, device=device)] for _ in range(2)]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = [step(partial(f, mean=b[0], var=b[1], weight=weight), x) for f, b in zip((compiled, run), buffers)]
    assert_same(*results)
    assert testing.same_bits(torch.stack(buffers[0]), torch.stack(buffers[1]))


@row(SECTION, "torch.func.grad and vmap of it", CONTIGUOUS)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transform(cell: Cell, transform: str, device: str) -> None:
    """A compiler that traces torch.func must see plain formulas: it would drop the backward of custom functions."""
    x = torch.randn(2, 4, 3, 5, device=device)
    mean, var = torch.rand(3, device=device), torch.rand(3, device=device) + 0.5
    statistics = (None, None) if cell.training else (mean, var)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return bnk.batch_norm(x, *statistics, weight, None, cell.training).pow(3).sum()

    def call(x: Tensor, weight: Tensor) -> Any:
        gradient = torch.func.grad(loss, (0, 1))
        return gradient(x[0], weight) if transform == "grad" else torch.func.vmap(gradient, (0, None))(x, weight)

    weight = torch.rand(3, device=device) + 0.5
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), call(x, weight))


# Graphs and layouts


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_graph_for_all_sizes(training: bool) -> None:
    """No code depends on values of sizes, so a dynamic-shape graph is compiled once."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norms().train(training), backend=counter, fullgraph=True, dynamic=True)
    compiled(torch.randn(2, 3, 4, 5))
    before = counter.frame_count
    for n, h, w in ((3, 4, 6), (7, 9, 5), (64, 2, 3)):
        compiled(torch.randn(n, 3, h, w))
    assert counter.frame_count == before


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_channels_last_is_preserved(training: bool) -> None:
    """A compiler that runs convolutions in channels_last keeps the norms between them in channels_last.

    By default it restores the strides that an op was traced with, which would copy the input before each norm and its
    output after it. Such copies are named after the op.
    """
    model = nn.Sequential(convolutions(), nn.ReLU()).train(training)  # the model's output has eager's layout
    x = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True)
    with torch._inductor.config.patch(force_layout_optimization=True, force_disable_caches=True):
        if training:
            _, sources = run_fw_bw_and_get_code(lambda: compiled(x))
        else:
            with torch.no_grad():
                _, sources = run_and_get_code(compiled, x)
    source = "\n".join(sources)
    assert "torch.ops.bnkernels.batch_norm" in source
    assert set(re.findall(r"cpp_fused_\w*batch_norm\w*", source)) == set()


def test_ops_are_tagged_flexible_layout() -> None:
    """Precondition of the test above: all registered ops have the tag, those of SyncBatchNorm included."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bnkernels::")]
    assert {"bnkernels::batch_norm_train", "bnkernels::sync_batch_norm_normalize"} <= set(names)
    for name in names:
        op = getattr(torch.ops.bnkernels, name.partition("::")[2]).default
        assert torch.Tag.flexible_layout in op.tags, name


def test_errors_match_eager() -> None:
    """A compiled call raises eager's error and leaves the buffers unchanged."""
    norm = bnk.BatchNorm2d(3)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 3, 1, 1))
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        compiled(torch.randn(1, 3, 1, 1))
    assert_same(dict(norm.state_dict()), dict(before))
