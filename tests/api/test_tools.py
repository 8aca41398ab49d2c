"""torch's tools treat a converted model like torch's: tracing, modification, serialization, hooks and profilers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import Cell, cells, row
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn.utils import fusion, parametrize, prune
from torch.optim import swa_utils
from torch.profiler import ProfilerActivity, profile
from torch.utils import mkldnn
from torch.utils.flop_counter import FlopCounterMode

import bnkernels as bnk
from bnkernels import testing

TRACE, CHANGE, SERIALIZE, OBSERVE = "Tracing", "Tools that change a model", "Storing", "Watching"
EAGER = cells(compiled=(False,))


def pair(device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """A converted model and the torch model it was copied from, with nontrivial statistics."""
    conv, first, second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)
    torch_model = nn.Sequential(conv, first, nn.ReLU(), second).to(device)
    torch_model(torch.rand(4, 3, 6, 6, device=device))
    return bnk.convert(copy.deepcopy(torch_model)), torch_model


def x_for(cell: Cell) -> Tensor:
    return cell.laid_out(torch.randn(4, 3, 6, 5))


def assert_matches_torch(cell: Cell, ours: nn.Module, torch_model: nn.Module) -> None:
    """Outputs, gradients and buffers match over two steps. `ours` is compiled if the cell is."""
    call, torch_call = cell.prepared(ours), cell.eager.prepared(torch_model)
    for _ in range(2):
        x = x_for(cell)
        results = []
        for model, module in ((call, ours), (torch_call, torch_model)):
            module.zero_grad()
            y = model(x)
            y.square().mean().backward()
            grads = {name: parameter.grad for name, parameter in module.named_parameters()}
            results.append({"y": y.detach(), **grads, **dict(module.named_buffers())})
        torch.testing.assert_close(*results)


# Tracing


@row(
    TRACE,
    "torch.fx.symbolic_trace",
    cells(),
    "a layer is one call_module, as torch's; one with hooks is entered, as every module is that is not torch's own.",
)
def test_fx(cell: Cell) -> None:
    """The graph calls the layers themselves, so that train() and eval() after tracing take effect."""
    ours, torch_model = pair()
    graph = torch.fx.symbolic_trace(ours.train(not cell.training))
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2", "3"]
    assert_matches_torch(cell, graph, torch_model)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fx_runs_hooks_once(training: bool) -> None:
    """A traced hook must not run again inside the module's call."""
    ours, torch_model = pair()
    for model in (ours, torch_model):
        model[1].register_forward_hook(lambda module, inputs, y: 2 * y)  # type: ignore[index]
        model[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))  # type: ignore[index]
        model.train(training)
    x = torch.randn(4, 3, 6, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), torch_model(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(torch_model.named_buffers()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fx_root_layer(training: bool) -> None:
    """A layer that is the root of a trace has no name for a call_module."""
    layer = bnk.BatchNorm2d(3).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 3, 2, 2)
    assert testing.same_bits(torch.fx.symbolic_trace(layer)(x), other(x))
    assert testing.same_bits(layer.running_mean, other.running_mean)


@row(TRACE, "torchvision's create_feature_extractor", EAGER)
def test_feature_extractor(cell: Cell) -> None:
    """Nodes are named by layers, BatchNorm included; train() and eval() select one of two graphs."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    ours, torch_model = pair()
    extracted = [
        extraction.create_feature_extractor(model, {"1": "norm", "3": "last"}) for model in (ours, torch_model)
    ]
    x = x_for(cell)
    got, expected = (cell.prepared(model)(x) for model in extracted)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(dict(extracted[0].named_buffers()), dict(extracted[1].named_buffers()))


@row(TRACE, "torch.jit.trace", EAGER, "records torch's operator: the program needs no bnkernels.")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(cell: Cell) -> None:
    ours, torch_model = (bnk.BatchNorm2d(3), nn.BatchNorm2d(3))
    x = cell.laid_out(torch.randn(4, 3, 2, 2))
    traced = torch.jit.trace(nn.Sequential(ours).train(cell.training), x, check_trace=False)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    ours.load_state_dict(torch_model.state_dict())
    torch.testing.assert_close(traced(x), torch_model.train(cell.training)(x))
    torch.testing.assert_close(dict(ours.state_dict()), dict(torch_model.state_dict()))


# Tools that change a model


@row(
    CHANGE,
    "fx.experimental.optimization.fuse",
    cells(training=(False,), compiled=(False,)),
    "computes the same; convolutions are folded only in a reverted model.",
)
@pytest.mark.parametrize(
    "make", [nn.BatchNorm2d, bnk.BatchNorm2d, bnk.BatchNormAct2d], ids=lambda make: make.__module__
)
def test_fx_fuse(cell: Cell, make: Callable[[int], nn.Module]) -> None:
    """It matches exact classes and silently leaves any other layer."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), make(4))
    model(torch.rand(4, 3, 6, 6))
    cell.prepared(model)
    x = x_for(cell)
    for each, remains in ((model, make is not nn.BatchNorm2d), (bnk.revert(copy.deepcopy(model)), False)):
        fused = optimization.fuse(each)
        assert any(isinstance(module, nn.BatchNorm2d) for module in fused.modules()) == remains
        torch.testing.assert_close(fused(x), model(x))


@row(CHANGE, "utils.mkldnn.to_mkldnn", cells(training=(False,), compiled=(False,)))
@pytest.mark.parametrize("act", [False, True], ids=["", "BatchNormAct2d"])
def test_to_mkldnn(cell: Cell, act: bool) -> None:
    """torch's MkldnnBatchNorm replaces the layer."""
    ours, torch_model = pair()
    if act:
        made = bnk.BatchNormAct2d(4)
        made.load_state_dict(torch_model[1].state_dict())  # type: ignore[index]
        ours, torch_model = nn.Sequential(ours[0], made), torch_model[:3]  # type: ignore[index]
    x = x_for(cell)
    results = []
    for model in (ours, torch_model):
        converted = mkldnn.to_mkldnn(copy.deepcopy(cell.prepared(model)))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
        results.append(converted(x.to_mkldnn()).to_dense())
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(results[0], torch_model(x))


@row(CHANGE, "optim.swa_utils.update_bn", cells(training=(True,)))
def test_update_bn(cell: Cell) -> None:
    """The averages over all batches replace the statistics."""
    ours, torch_model = pair()
    batches = [x_for(cell) for _ in range(4)]
    for model, way in ((ours, cell.prepared(ours)), (torch_model, cell.eager.prepared(torch_model))):
        model[1].momentum = 0.3  # type: ignore[index]
        swa_utils.update_bn(batches, way)
        assert model[1].momentum == 0.3 and model[1].num_batches_tracked == 4  # type: ignore[index]
    torch.testing.assert_close(dict(ours.state_dict()), dict(torch_model.state_dict()))


@row(CHANGE, "optim.swa_utils.AveragedModel with its buffers", cells(training=(True,), compiled=(False,)))
def test_averaged_model(cell: Cell) -> None:
    ours, torch_model = pair()
    averages = [swa_utils.AveragedModel(model, use_buffers=True) for model in (ours, torch_model)]
    for _ in range(3):
        x = x_for(cell)
        for model, average in zip((ours, torch_model), averages):
            cell.prepared(model)(x)
            average.update_parameters(model)
    torch.testing.assert_close(dict(averages[0].state_dict()), dict(averages[1].state_dict()))


@row(CHANGE, "nn.utils.fusion.fuse_conv_bn_eval", cells(training=(False,)))
def test_fuse_conv_bn(cell: Cell) -> None:
    ours, torch_model = (model.eval() for model in pair())
    fused, expected = (fusion.fuse_conv_bn_eval(model[0], model[1]) for model in (ours, torch_model))  # type: ignore[index]
    torch.testing.assert_close(dict(fused.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    x = x_for(cell)
    torch.testing.assert_close(cell.prepared(fused)(x), ours[:2](x))  # type: ignore[index]


@row(CHANGE, "func.replace_all_batch_norm_modules_", cells())
def test_replace_all_batch_norms(cell: Cell) -> None:
    """Removes the running statistics, as torch.func needs."""
    ours, torch_model = pair()
    for model in (ours, torch_model):
        torch.func.replace_all_batch_norm_modules_(model)
        assert model[1].running_mean is None and not model[1].track_running_stats  # type: ignore[index]
    assert_matches_torch(cell, ours, torch_model)


@row(CHANGE, "nn.SyncBatchNorm.convert_sync_batchnorm", cells(compiled=(False,)))
def test_convert_sync_batchnorm(cell: Cell) -> None:
    """torch's SyncBatchNorm with our parameters and buffers; without a process group it computes BatchNorm."""
    ours, torch_model = pair()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert [type(synchronised[i]) for i in (1, 3)] == [nn.SyncBatchNorm] * 2  # type: ignore[index]
    if not cell.training:  # torch's SyncBatchNorm accepts CPU tensors only in inference
        assert_matches_torch(cell, synchronised, torch_model)
    torch.testing.assert_close(dict(synchronised.state_dict()), dict(torch_model.state_dict()), rtol=0, atol=0)


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.softplus(weight)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Positive()),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=2),
    "prune.remove": lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", amount=2), "weight"),
}


@row(CHANGE, "nn.utils.parametrize, nn.utils.prune of a layer's weight", cells())
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights(cell: Cell, change: Callable[[nn.Module], object]) -> None:
    """`weight` is then computed, and its gradient reaches the parameters it is computed from."""
    ours, torch_model = pair()
    for model in (ours, torch_model):
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([1.0, -0.1, 0.2, 2.0]))  # type: ignore[index]
        change(model[1])  # type: ignore[index]
    assert_matches_torch(cell, ours, torch_model)


# Storing


def save_and_load(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def reload_model(model: nn.Module) -> nn.Module:
    loaded: nn.Module = save_and_load(model, weights_only=False)
    return loaded


def reload_state_dict(model: nn.Module) -> nn.Module:
    other = pair()[0]
    other.load_state_dict(save_and_load(model.state_dict(), weights_only=True))
    return other


DUPLICATES = {"deepcopy": copy.deepcopy, "reload_model model": reload_model, "state_dict": reload_state_dict}


@row(SERIALIZE, "copy.deepcopy, torch.save of a model and of its state_dict", cells())
@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_duplicates(cell: Cell, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """The copy has this package's class, computes the same, and shares no memory."""
    ours, torch_model = pair()
    other = duplicate(ours)
    assert type(other[1]) is bnk.BatchNorm2d  # type: ignore[index]
    before = copy.deepcopy(ours.state_dict())
    assert_matches_torch(cell, other, torch_model)
    torch.testing.assert_close(dict(ours.state_dict()), dict(before), rtol=0, atol=0)


# Watching


@row(OBSERVE, "forward hooks and pre-hooks; eager, full backward hooks and pre-hooks too", cells())
def test_hooks(cell: Cell) -> None:
    """Hooks run in torch's order with torch's values, and their return values are used."""
    ours, torch_model = pair()
    calls: list[list[tuple[str, Tensor]]] = []
    for model in (ours, torch_model):
        seen: list[tuple[str, Tensor]] = []
        layer: nn.Module = model[1]  # type: ignore[index]
        layer.register_forward_pre_hook(lambda m, inputs, seen=seen: seen.append(("before", inputs[0].detach())))
        layer.register_forward_hook(lambda m, inputs, y, seen=seen: seen.append(("after", y.detach())))
        layer.register_forward_hook(lambda m, inputs, y: 2 * y)
        if not cell.compiled:
            layer.register_full_backward_pre_hook(lambda m, grads, seen=seen: seen.append(("backward", grads[0])))
            layer.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append(("done", gi[0])))
        calls.append(seen)
    assert_matches_torch(cell, ours, torch_model)
    got, expected = calls
    if cell.compiled and torch.__version__.startswith("2.11."):
        return  # torch 2.11 loses what hooks append to a list, also for torch's layers
        assert [name for name, _ in got] == [name for name, _ in expected] != []
        torch.testing.assert_close([value for _, value in got], [value for _, value in expected])


@row(OBSERVE, "torch.profiler: the ops by name", cells())
def test_profiler(cell: Cell) -> None:
    ours, _ = pair()
    model = cell.prepared(ours)
    model(x_for(cell))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(x_for(cell)).sum().backward()
    counts = {event.key: event.count for event in profiled.key_averages()}
    forward = "batch_norm_train" if cell.training else "batch_norm_eval"
    forward += "_functional" if cell.compiled and cell.training else ""
    assert counts[f"bnkernels::{forward}"] == counts["bnkernels::batch_norm_backward"] == 2


@pytest.mark.parametrize("held", [False, True], ids=["freed", "held"])
def test_memory_profiler(held: bool) -> None:
    """It records a free when a result is released and not before, although the memory is cached for later results."""
    x = torch.randn(13, 64, 31, 29)  # a size that no other tensor has
    for layer in (bnk.BatchNorm2d(64).eval(), nn.BatchNorm2d(64).eval()):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.no_grad():
            y = layer(x)
            if not held:
                del y
        freed = {-event.cpu_memory_usage for event in profiled.events() if event.name == "[memory]"}
        assert (x.nbytes in freed) != held, type(layer)
        y = None


@row(OBSERVE, "torch.utils.flop_counter", cells(compiled=(False,)), "a BatchNorm counts 0, in torch as here.")
def test_flop_counter(cell: Cell) -> None:
    """Equal totals per module."""
    totals = []
    for model in pair():
        with FlopCounterMode(display=False) as counter:
            cell.prepared(model)(x_for(cell)).sum().backward()
        totals.append({name: dict(counts) for name, counts in counter.get_flop_counts().items()})
    assert totals[0] == totals[1] and sum(totals[0]["Global"].values()) > 0
