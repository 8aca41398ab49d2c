"""CUDA graphs: replays match eager steps, to the bit where the same kernels run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compatibility import Cell, cells, row
from cuda_steps import Step, captured
from hardware import LARGE
from plan_kinds import KINDS, kind
from plan_model import TRAINING
from torch import Tensor, nn

import bnkernels as bnk
from bnkernels import _ops as ops
from bnkernels.explain.devices import Limits
from bnkernels.testing import Case, same_bits

pytestmark = pytest.mark.cuda

SECTION = "CUDA graphs"

# On the few multiprocessors of the fake CUDA device these cover every kind but a two-shot exchange; on a large GPU,
# CTAs and clusters.
SMALL = [
    Case("offset_1e2", (2, 3, 7, 7), "float64", "float64"),
    Case("offset_1e2", (16, 3, 14, 14)),
    Case("offset_1e2", (2, 4, 7, 7)),
    Case("offset_1e2", (16, 8, 7, 7), "float16", "float16"),
    Case("offset_1e2", (256, 8, 7, 7), "bfloat16", "float32"),
    Case("offset_1e2", (3, 5)),
    Case("offset_1e2", (2, 3, 14, 14), layout="channels_last"),
    Case("offset_1e2", (4096, 16)),
]
CASES = [*SMALL, *(pytest.param(case, marks=LARGE) for case in KINDS)]


@pytest.mark.fake_cuda
def test_small_cases_are_of_all_kinds() -> None:
    limits = Limits(**ops.device_limits(0))
    seen = {kind(case, pass_, limits) for case in SMALL for pass_ in TRAINING}
    groups = {" ".join(words.split()[:2]) for words in seen}
    wanted = {f"{layout} {group}" for layout in ("channels_last", "packed") for group in ("cta", "cluster", "grid")}
    assert groups == wanted | {"channels_first cta", "channels_first cluster"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_eager(case: Case) -> None:
    """Replays, and replays after a launch outside the graph, give eager's bits."""
    step = Step(case.inputs("cuda"))
    expected = [tensor.detach().clone() for tensor in step()]
    graph, results = captured(step)
    for _ in range(2):
        step.reset()
        graph.replay()
        torch.cuda.synchronize()
        for number, (one, other) in enumerate(zip(expected, results)):
            assert same_bits(one, other.detach()), number
        step()


def test_capture_runs_nothing() -> None:
    """The running statistics and the counter change at the replay, not at the capture."""
    layer = bnk.BatchNorm2d(4, device="cuda")
    x = torch.randn(8, 4, 7, 7, device="cuda")
    graph, _ = captured(lambda: layer(x), warm_up=2)
    assert layer.num_batches_tracked is not None and layer.num_batches_tracked.item() == 2
    for _ in range(3):
        graph.replay()
    assert layer.num_batches_tracked.item() == 5


class Block(nn.Module):
    """A residual block whose additions and ReLUs run in BatchNorm's kernels; one layer uses the cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.inner = bnk.BatchNormAct2d(8, momentum=None)
        self.outer = bnk.BatchNormAct2d(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(self.second(self.inner(self.first(x))), residual=x)
        return self.head(y.mean((2, 3)))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


@row(SECTION, "a whole training step, captured and replayed on new batches", cells((True,), (False,)))
def test_training_step(cell: Cell) -> None:
    """Forward, loss, backward and optimizer in one graph, on batches that are copied in: the losses, parameters,
    running statistics and counters match the eager model's."""
    eager = Block().cuda()
    cell.prepared(eager)
    model = copy.deepcopy(eager)
    batches = [
        (cell.laid_out(torch.randn(6, 3, 9, 9, device="cuda")), torch.arange(6, device="cuda") % 5) for _ in range(6)
    ]
    rates = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (eager, model)]
    x, target = (tensor.clone() for tensor in batches[0])
    graph, loss = captured(lambda: trained(model, rates[1], x, target), warm_up=2)
    for _ in range(2):
        trained(eager, rates[0], *batches[0])
    for batch in batches:
        for tensor, new in zip((x, target), batch):
            tensor.copy_(new)
        graph.replay()
        torch.testing.assert_close(loss, trained(eager, rates[0], *batch))
    torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()))


def compare_steps(eager: nn.Module, other: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    """Compares the result and gradients of both models for one random gradient. `other` has the parameters of
    `model`.
    """
    weight = torch.randn(len(x), 5, device="cuda")
    results = []
    for call, module in ((eager, eager), (other, model)):
        module.zero_grad(set_to_none=True)
        y = call(x)
        (y * weight).sum().backward()
        results.append([y.detach().clone(), *(parameter.grad.clone() for parameter in module.parameters())])
    torch.testing.assert_close(results[1], results[0])


@row(SECTION, "torch.cuda.make_graphed_callables", cells((True,), (False,), (False,)))
def test_make_graphed_callables() -> None:
    """torch.cuda.make_graphed_callables captures forward and backward as a graph each."""
    eager = Block().cuda()
    model = copy.deepcopy(eager)
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn(6, 3, 9, 9, device="cuda"),), num_warmup_iters=2)
    model.load_state_dict(eager.state_dict())
    for _ in range(3):
        compare_steps(eager, graphed, model, torch.randn(6, 3, 9, 9, device="cuda"))
    torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()))


def test_branches() -> None:
    """Layers on two streams that fork and join within the capture."""
    layers = [bnk.BatchNorm2d(3, device="cuda") for _ in range(2)]
    expected = copy.deepcopy(layers)
    x = torch.randn(16, 3, 14, 14, device="cuda")
    side = torch.cuda.Stream()

    def step() -> list[Tensor]:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            second = layers[1](x)
        first = layers[0](x)
        current.wait_stream(side)
        return [first, second, first + second]

    graph, results = captured(step)
    for layer in expected:
        layer(x)
    for _ in range(4):
        graph.replay()
        first, second = (layer(x) for layer in expected)
        torch.cuda.synchronize()
        for got, wanted in zip(results, (first, second, first + second)):
            assert same_bits(got.detach(), wanted.detach())
    for layer, other in zip(layers, expected):
        torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("case", SMALL[4:], ids=str)
def test_concurrent_graphs(case: Case) -> None:
    """Two graphs and eager work run concurrently on three streams without waiting for one another, so their barriers
    must use separate workspaces. (The fake CUDA device runs them sequentially; only a GPU can interleave them.)"""
    steps = [Step(case.inputs("cuda")) for _ in range(3)]
    expected = [tensor.detach().clone() for tensor in steps[0]()]
    graphs = [captured(step) for step in steps[:2]]
    for step in steps:
        step.reset()
    torch.cuda.synchronize()
    eager: list[Tensor] = []
    runs: list[Callable[[], object]] = [graphs[0][0].replay, graphs[1][0].replay, lambda: eager.extend(steps[2]())]
    for run in runs:
        with torch.cuda.stream(torch.cuda.Stream()):
            run()
    torch.cuda.synchronize()
    for results in (graphs[0][1], graphs[1][1], eager):
        for number, (one, other) in enumerate(zip(expected, results)):
            assert same_bits(one, other.detach()), number


@row(SECTION, 'torch.compile(backend="cudagraphs")', cells(compiled=(True,)))
def test_compiled_into_graphs(cell: Cell) -> None:
    """torch.compile's cudagraphs backend, without inductor: buffers of the model are updated at every call."""
    eager = Block().cuda()
    model = copy.deepcopy(eager)
    cell.eager.prepared(eager)
    compiled = cell.prepared(model, backend="cudagraphs")
    for _ in range(4):  # the first calls warm up and record
        torch.compiler.cudagraph_mark_step_begin()
        compare_steps(eager, compiled, model, cell.laid_out(torch.randn(6, 3, 9, 9, device="cuda")))
        torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()))
