"""SyncBatchNorm in four gloo processes equals BatchNorm in one process on the whole batch; and its failures.

Its ops are tested in test_sync_ops.py, higher derivatives in test_sync_derivatives.py, training in
test_distributed.py.

"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compatibility import cells, row
from processes import Broken, Collectives, Pool
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import bnkernels as bnk
from bnkernels.testing import Case, Inputs, Outputs, assert_within, judge_call, same_bits

RANKS = 4
PROCESSES = "Several processes"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(RANKS, "gloo")
    yield made
    made.close()


def part_of(t: Tensor, bounds: tuple[int, ...]) -> Tensor:
    rank = dist.get_rank()
    return t[bounds[rank] : bounds[rank + 1]]


def layer_of(inputs: Inputs, group: Any = None) -> bnk.SyncBatchNorm:
    """A layer with the parameters and buffers of a case."""
    layer = bnk.SyncBatchNorm(
        inputs.x.shape[1],
        inputs.eps,
        inputs.momentum,
        affine=False,
        track_running_stats=False,
        process_group=group,
    )
    for name in ("weight", "bias"):
        vector = getattr(inputs, name)
        setattr(layer, name, None if vector is None else nn.Parameter(vector.clone()))
    layer.track_running_stats = inputs.running_mean is not None
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        buffer = getattr(inputs, name)
        setattr(layer, name, None if buffer is None else buffer.clone())
    return layer


def grad_of(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.grad


def to(values: Any, device: str) -> Any:
    """Inputs or Outputs on another device."""
    return replace(values, **{name: t.to(device) for name, t in vars(values).items() if isinstance(t, Tensor)})


def call(inputs: Inputs, bounds: tuple[int, ...], device: str = "cpu") -> Outputs:
    """Forward and backward of this rank's part."""
    inputs = to(inputs, device)
    layer = layer_of(inputs)
    x = part_of(inputs.x, bounds).detach().requires_grad_()
    with Collectives() as forward:
        y = layer(x)
    assert len(forward.names) == 1, forward.names
    with Collectives() as backward:
        y.backward(part_of(inputs.grad, bounds))
    assert len(backward.names) == 1, backward.names
    assert x.grad is not None and (x.numel() == 0 or y.stride() == x.grad.stride() == x.stride())
    outputs: Outputs = to(
        Outputs(
            y=y.detach(),
            running_mean=layer.running_mean,
            running_var=layer.running_var,
            num_batches_tracked=layer.num_batches_tracked,
            dx=x.grad,
            dweight=grad_of(layer.weight),
            dbias=grad_of(layer.bias),
        ),
        "cpu",
    )
    return outputs


def combined(parts: list[Outputs]) -> Outputs:
    """The ranks' outputs as those of one process: y and dx concatenated, parameter gradients summed."""

    def total(name: str) -> Tensor | None:
        vectors = [getattr(part, name) for part in parts]
        return None if vectors[0] is None else torch.stack(vectors).sum(0)

    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for other in parts[1:]:
            assert same_bits(getattr(parts[0], name), getattr(other, name)), f"{name} differs between ranks"
    return replace(
        parts[0],
        y=torch.cat([part.y for part in parts if part.y is not None]),
        dx=torch.cat([part.dx for part in parts if part.dx is not None]),
        dweight=total("dweight"),
        dbias=total("dbias"),
    )


EVEN, UNEVEN, ONE_EMPTY, ONE_ALONE = (0, 3, 6, 9, 12), (0, 1, 8, 10, 12), (0, 5, 5, 9, 12), (0, 0, 12, 12, 12)
SPLITS = {"even": EVEN, "uneven": UNEVEN, "one empty": ONE_EMPTY, "one alone": ONE_ALONE}
PAIRS = ("float32", "float64", "bfloat16+float32", "float16+float32")
LAYOUTS = {"2-D": ("12x5", "contiguous"), "4-D": ("12x5x3x7", "contiguous"), "nhwc": ("12x16x4x4", "channels_last")}


@row(
    PROCESSES,
    "SyncBatchNorm, four processes: even, uneven and empty batches",
    cells(training=(True,), compiled=(False,)),
    "inference is BatchNorm's.",
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("split", SPLITS)
def test_matches_one_process(pool: Pool, split: str, pair: str, layout: str) -> None:
    """Outputs, gradients and buffers are within tolerance, with one collective per direction and the same buffers on
    all ranks. The mean is far from zero, so that a statistic rounded for the exchange would show."""
    shape, memory = LAYOUTS[layout]
    inputs = Case.parse(f"offset_1e2/{shape}/{pair}/{memory}/normal/normal/train").inputs()
    assert_within(judge_call(inputs, combined(pool.run(call, inputs, SPLITS[split]))), f"{split} {pair} {layout}")


# Options


VARIANTS = {
    "cumulative": {"momentum": None},
    "untracked": {"running_mean": None, "running_var": None, "num_batches_tracked": None},
    "no weight": {"weight": None},
    "not affine": {"weight": None, "bias": None},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants(pool: Pool, changes: dict[str, Any]) -> None:
    inputs = replace(Case.parse("offset_1e2/12x5x3/float32/contiguous/normal/normal/train").inputs(), **changes)
    assert_within(judge_call(inputs, combined(pool.run(call, inputs, UNEVEN))), str(changes))


def stops_tracking(inputs: Inputs) -> tuple[Tensor, list[bool]]:
    """y, and whether each buffer is unchanged."""
    layer = layer_of(inputs)
    layer.track_running_stats = False
    before = [buffer.clone() for buffer in layer.buffers()]
    y = layer(part_of(inputs.x, UNEVEN))
    return y.detach(), [same_bits(*buffers) for buffers in zip(layer.buffers(), before)]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_track_running_stats_turned_off(pool: Pool, momentum: float | None) -> None:
    """track_running_stats decides, as in torch: existing buffers are not updated, and the batch is normalized."""
    inputs = Case.parse("offset_1e2/12x5x3/float32/contiguous/normal/normal/train").inputs()
    parts = pool.run(stops_tracking, replace(inputs, momentum=momentum))
    assert all(stayed == [True] * 3 for _, stayed in parts)
    assert_within(judge_call(inputs, Outputs(y=torch.cat([y for y, _ in parts]))), str(momentum))


def gradients_for(inputs: Inputs, needs: tuple[bool, bool, bool]) -> tuple[int, list[Tensor | None]]:
    """The number of collectives of a backward, and the gradients of x, weight and bias."""
    layer = layer_of(inputs)
    tensors = [part_of(inputs.x, UNEVEN).detach(), layer.weight, layer.bias]
    for tensor, need in zip(tensors, needs):
        tensor.requires_grad_(need)
    y = layer(tensors[0])
    if not any(needs):
        assert not y.requires_grad
        return 0, [None] * 3
    with Collectives() as backward:
        y.backward(part_of(inputs.grad, UNEVEN))
    return len(backward.names), [t.grad for t in tensors]


@pytest.mark.parametrize("needs", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
def test_unneeded_gradients(pool: Pool, needs: tuple[bool, bool, bool]) -> None:
    """Each subset of gradients has the same bits as all; ranks communicate only if x's is gradients_for."""
    inputs = Case.parse("normal/12x5x3/float32/contiguous/normal/normal/train").inputs()
    whole = pool.run(gradients_for, inputs, (True, True, True))
    for (_, grads), (collectives, some) in zip(whole, pool.run(gradients_for, inputs, needs)):
        assert collectives == needs[0]
        assert [grad is not None for grad in some] == list(needs)
        assert all(other is None or same_bits(grad, other) for grad, other in zip(grads, some))


def one_value(values: int) -> tuple[Tensor, ...]:
    """Rank 1 has `values` of the batch, the others have none."""
    layer = bnk.SyncBatchNorm(3)
    layer.running_mean.fill_(7.0)
    layer.running_var.fill_(8.0)
    x = torch.randn(values if dist.get_rank() == 1 else 0, 3, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var, layer.num_batches_tracked


@pytest.mark.parametrize("values", [0, 1])
def test_too_little_data(pool: Pool, values: int) -> None:
    """No rank knows in advance that there are fewer than two values in total: the batch is counted, and no statistic
    is updated."""
    for y, dx, dweight, mean, var, count in pool.run(one_value, values):
        assert torch.equal(y, torch.zeros_like(y)) and torch.equal(dx, torch.zeros_like(dx))
        assert torch.equal(dweight, torch.zeros(3))
        assert (mean == 7).all() and (var == 8).all() and count == 1


MANY = ((1 << 24) + 1, (1 << 24) + 1, 1, 1)
"""Values per channel on each rank: neither the counts nor their sum is representable in float32."""


def many_values() -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    x = torch.full((MANY[rank], 1), float(rank == 2), dtype=torch.bfloat16)
    layer = bnk.SyncBatchNorm(1, momentum=1.0).requires_grad_(False)
    layer(x)
    return layer.running_mean, layer.running_var


def test_large_counts(pool: Pool) -> None:
    for mean, var in pool.run(many_values):
        # One value of 1 among zeros: the mean and the unbiased variance are both 1/n.
        assert mean.item() == var.item() == torch.tensor(1 / sum(MANY)).item()


# Groups


def alone(training: bool) -> tuple[int, bool, bool]:
    """The number of collectives in eval mode or in a group of one, and whether results equal BatchNorm's."""
    rank = dist.get_rank()
    groups = [dist.new_group([other]) for other in range(dist.get_world_size())]
    layer, plain = bnk.SyncBatchNorm(3, process_group=groups[rank]), bnk.BatchNorm2d(3)
    if not training:
        layer.process_group = None
    x = torch.randn(4, 3, 5, 2)
    with Collectives() as comm:
        results = [module.train(training)(x) for module in (layer, plain)]
    buffers = zip(layer.buffers(), plain.buffers())
    return len(comm.names), same_bits(*results), all(same_bits(a, b) for a, b in buffers)


@pytest.mark.parametrize("training", [True, False], ids=["group of one", "eval"])
def test_alone(pool: Pool, training: bool) -> None:
    assert pool.run(alone, training) == [(0, True, True)] * RANKS


def in_pairs(inputs: Inputs) -> Outputs:
    """Ranks 0 and 1 share a batch; 2 and 3 share its negative."""
    rank = dist.get_rank()
    groups = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    layer = layer_of(inputs, groups[rank // 2])
    x = inputs.x[: 1 + 4 * (rank % 2)] if rank % 2 == 0 else inputs.x[1:]
    y = layer(x if rank < 2 else -x)
    return Outputs(y=y.detach(), running_mean=layer.running_mean, running_var=layer.running_var)


def test_groups(pool: Pool) -> None:
    inputs = Case.parse("offset_1e2/12x5x3/float32/contiguous/normal/normal/train").inputs()
    parts = pool.run(in_pairs, inputs)
    for pair, of_pair in ((parts[:2], inputs), (parts[2:], replace(inputs, x=-inputs.x))):
        y = torch.cat([part.y for part in pair])
        assert_within(judge_call(of_pair, replace(pair[0], y=y)), "pair")
        assert same_bits(pair[0].running_var, pair[1].running_var)


# A rank that does not take part


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem(x)
        return y


def skip_on_last_rank(when: str) -> tuple[str, str]:
    """The error on the other ranks if the last rank skips the forward or the backward."""
    group = dist.new_group(timeout=timedelta(seconds=4))
    net = bnk.SyncBatchNorm.convert_sync_batchnorm(Net(), group)
    absent = dist.get_rank() == RANKS - 1
    if absent and when == "forward":
        return "", ""
    try:
        y = net(torch.randn(2, 3, 4, 4, requires_grad=True))
        if not absent:
            y.sum().backward()
    except RuntimeError as error:
        return str(error), str(error.__cause__)
    return "", ""


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_missing_rank_raises(pool: Pool, when: str) -> None:
    """The backend's timeout, in a message with the layer, the input, the rank, and what to do."""
    *heard, _ = pool.run(skip_on_last_rank, when, deadline=60)
    for rank, (message, cause) in enumerate(heard):
        assert f"SyncBatchNorm(3) 'stem.1': the collective of the {when} failed or timed out" in message
        assert "for an input of shape (2, 3, 4, 4)" in message
        assert f"rank {rank} of {RANKS}" in message and "passes an empty batch" in message
        assert cause and cause in message


def fail() -> None:
    if dist.get_rank() == 1:
        raise ValueError("on purpose")


def hang() -> None:
    if dist.get_rank() == 1:
        dist.barrier()


@pytest.mark.parametrize(("function", "message"), [(fail, "rank 1: .*on purpose"), (hang, "rank 1: no answer in 3 s")])
def test_pool_reports_failures_and_recovers(function: Any, message: str) -> None:
    """A process that raises or hangs fails its own test only."""
    pool = Pool(2, "gloo")
    try:
        pool.run(dist.get_rank)  # starting takes longer than the deadline below
        with pytest.raises(Broken, match=f"(?s){message}"):
            pool.run(function, deadline=3)
        assert pool.run(dist.get_rank) == [0, 1]
    finally:
        pool.close()


# Interface


def test_interface_matches_torch() -> None:
    """Constructor, repr and state are torch.nn.SyncBatchNorm's."""
    for arguments in ((4,), (4, 1e-3, None, False, False), (4, 1e-5, 0.2, True, False)):
        ours, torch_layer = bnk.SyncBatchNorm(*arguments), nn.SyncBatchNorm(*arguments)
        assert isinstance(ours, nn.SyncBatchNorm) and repr(ours) == repr(torch_layer)
        assert list(ours.state_dict()) == list(torch_layer.state_dict())
        assert ours.state_dict()._metadata == torch_layer.state_dict()._metadata
        torch_layer.load_state_dict(ours.state_dict())
        assert ours.process_group is None
    marker = object()
    assert bnk.SyncBatchNorm(4, process_group=marker).process_group is marker
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        bnk.SyncBatchNorm(4)(torch.randn(4))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        bnk.SyncBatchNorm(0)(torch.randn(4, 0))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        bnk.SyncBatchNorm(4)(torch.randn(1, 4))


def test_without_processes() -> None:
    """Without an initialized process group it is BatchNorm."""
    x = torch.randn(4, 3, 5, 2)
    assert same_bits(bnk.SyncBatchNorm(3)(x), bnk.BatchNorm2d(3)(x))


def test_fx_records_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a process group of several ranks: a program traced once runs on each of them."""
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)
    graph = torch.fx.symbolic_trace(nn.Sequential(bnk.SyncBatchNorm(3, process_group=object())))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]


def test_convert() -> None:
    """Every class, with parameters, buffers and flags; each layer stores its qualified name."""
    group = object()
    model = nn.ModuleDict(
        {
            "torch": nn.BatchNorm1d(2, momentum=None),
            "ours": bnk.BatchNorm2d(2, affine=False),
            "synchronised": nn.SyncBatchNorm(2, track_running_stats=False),
            "already": bnk.SyncBatchNorm(2, eps=0.5),
            "inner": nn.Sequential(nn.ReLU(), nn.BatchNorm3d(2).eval()),
        }
    )
    model["torch"].bias.requires_grad_(False)
    before = dict(model.named_modules())
    tensors = [*model.parameters(), *model.buffers()]
    assert bnk.SyncBatchNorm.convert_sync_batchnorm(model, group) is model
    for name in ("torch", "ours", "synchronised", "already", "inner.1"):
        layer = model.get_submodule(name)
        assert type(layer) is bnk.SyncBatchNorm and layer.process_group is group
        assert layer.qualified_name == name and layer is not before[name]
        for attribute in ("eps", "momentum", "affine", "track_running_stats", "training"):
            assert getattr(layer, attribute) == getattr(before[name], attribute), attribute
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors))
    assert not model["torch"].bias.requires_grad
    assert type(model["inner"][0]) is nn.ReLU
    alone = nn.BatchNorm2d(2)
    assert type(bnk.SyncBatchNorm.convert_sync_batchnorm(alone)) is bnk.SyncBatchNorm and type(alone) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="LazyBatchNorm2d has no parameters yet"):
        bnk.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))


# Compiled


def compiled(inputs: Inputs) -> tuple[Outputs, list[Outputs], int]:
    """On ranks 0 and 1: eager's outputs, those of two compiled steps, and the number of gathers in the second."""
    group = dist.new_group([0, 1])
    rank = dist.get_rank()
    if rank > 1:
        return Outputs(), [], 0
    bounds = (0, 7, 12)
    x = inputs.x[bounds[rank] : bounds[rank + 1]]
    grad = inputs.grad[bounds[rank] : bounds[rank + 1]]
    eager, layer = layer_of(inputs, group), layer_of(inputs, group)
    step = torch.compile(layer, fullgraph=True)

    def outputs(of: nn.Module, module: Any) -> Outputs:
        module.zero_grad()
        leaf = x.detach().requires_grad_()
        y = of(leaf)
        y.backward(grad)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return Outputs(
            y=y.detach(), dx=leaf.grad, dweight=grad_of(module.weight), dbias=grad_of(module.bias), **buffers
        )

    found = [outputs(step, layer)]
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        found.append(outputs(step, layer))
    gathers = sum("c10d_functional::all_gather" in event.name for event in trace.events())
    return outputs(eager, eager), found, gathers


@row(
    PROCESSES, "SyncBatchNorm, torch.compile(fullgraph=True)", cells((True,), compiled=(True,), channels_last=(False,))
)
def test_compiled(pool: Pool) -> None:
    """One graph; outputs, gradients and buffers equal eager's bit for bit; two gathers."""
    inputs = Case.parse("offset_1e2/12x5x3/float32/contiguous/normal/normal/train").inputs()
    for eager, found, gathers in pool.run(compiled, inputs, deadline=180)[:2]:
        assert gathers == 2
        for name in vars(eager):
            assert same_bits(getattr(eager, name), getattr(found[0], name)), name
        assert found[1].num_batches_tracked == inputs.num_batches_tracked + 2
        assert not same_bits(found[1].running_mean, found[0].running_mean)
