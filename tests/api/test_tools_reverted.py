"""Tools that support only torch.nn's layers take a reverted model; no unsupported use is silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import Cell, cells, row
from torch import Tensor, nn

import bnkernels as bnk

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

SECTION = "Tools that take a reverted model"
EAGER = cells(compiled=(False,))
SHAPE = (4, 3, 6, 6)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))  # type: ignore[no-any-return]


class WithAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), bnk.BatchNormAct2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


def plain() -> Plain:
    """A model with nontrivial statistics."""
    torch.manual_seed(0)
    model = Plain()
    model(torch.rand(SHAPE))
    return model


def with_act() -> WithAct:
    model = WithAct()
    model.load_state_dict(plain().state_dict())
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"converted": lambda: bnk.convert(plain()), "BatchNormAct2d": with_act}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def parts(model: nn.Module) -> list[str]:
    """Names of the convolution, the BatchNorm and the ReLU."""
    return ["conv", "norm.bn", "norm.act"] if isinstance(model.norm, bnk.BatchNormAct2d) else ["conv", "norm", "act"]


def assert_matches_torch(
    cell: Cell, make: Callable[[], nn.Module], tool: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
) -> None:
    """The tool's result on the reverted model equals its result on torch's, bit for bit, over two steps."""
    results: list[list[Tensor]] = []
    for model in (bnk.revert(make()), plain()):
        cell.prepared(model)
        torch.manual_seed(1)
        made = tool(model, cell.laid_out(torch.randn(SHAPE)))
        results.append([made(cell.laid_out(torch.randn(SHAPE))).detach() for _ in range(2)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def script(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.script(model)


@row(SECTION, "torch.jit.script", EAGER, "raises an error that asks for revert() if the model is not reverted.")
@each_model
def test_script(cell: Cell, make: Callable[[], nn.Module]) -> None:
    """The error is raised before anything is compiled or changed."""
    assert_matches_torch(cell, make, script)
    model = make()
    before = [type(module) for module in model.modules()]
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"compile bnkernels\.BatchNorm2d: call bnkernels\.revert\(model\) first"
        ):
            torch.jit.script(model)
    assert [type(module) for module in model.modules()] == before


def fuse_modules(model: nn.Module, x: Tensor) -> Any:
    quantization = torch.ao.quantization
    fuse = quantization.fuse_modules_qat if model.training else quantization.fuse_modules
    return fuse(model, [parts(model)])


@row(
    SECTION,
    "torch.ao.quantization.fuse_modules, fuse_modules_qat",
    EAGER,
    "torch rejects a model that is not reverted.",
)
@each_model
def test_fuse_modules(cell: Cell, make: Callable[[], nn.Module]) -> None:
    """The convolution, the BatchNorm and the ReLU become one module."""
    assert_matches_torch(cell, make, fuse_modules)
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*bnkernels\.modules\.BatchNorm2d"):
        fuse_modules(make().train(cell.training), torch.randn(SHAPE))


def eager_mode(model: nn.Module, x: Tensor, fused: bool = True) -> Any:
    """Post-training quantization, or quantization-aware training."""
    quantization = torch.ao.quantization
    if fused:
        model = fuse_modules(model, x)
    wrapped = quantization.QuantWrapper(model).train(model.training)
    config = quantization.get_default_qat_qconfig if model.training else quantization.get_default_qconfig
    wrapped.qconfig = config(torch.backends.quantized.engine)
    prepared = (quantization.prepare_qat if model.training else quantization.prepare)(wrapped)
    prepared(x)
    return quantization.convert(prepared.eval())


@row(
    SECTION,
    "torch.ao.quantization.prepare, prepare_qat and convert",
    EAGER,
    "a layer that was not folded raises an error that asks for revert() when it gets a quantized tensor.",
)
@each_model
def test_eager_mode(cell: Cell, make: Callable[[], nn.Module]) -> None:
    assert_matches_torch(cell, make, eager_mode)
    quantized = eager_mode(make().train(cell.training), torch.randn(SHAPE), fused=False)
    with pytest.raises(NotImplementedError, match=r"call bnkernels\.revert\(model\) first"):
        quantized(torch.randn(SHAPE))


def graph_mode(model: nn.Module, x: Tensor) -> Any:
    quantization = torch.ao.quantization
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = (
        quantization.get_default_qat_qconfig_mapping if model.training else quantization.get_default_qconfig_mapping
    )
    prepare = fx.prepare_qat_fx if model.training else fx.prepare_fx
    prepared = prepare(model, mapping(torch.backends.quantized.engine), (x,))
    prepared(x)
    return fx.convert_fx(prepared.eval())


@row(
    SECTION,
    "torch.ao.quantization.quantize_fx: prepare_fx, prepare_qat_fx and convert_fx",
    EAGER,
    "raises an error that asks for revert() if the model is not reverted.",
)
@each_model
def test_graph_mode(cell: Cell, make: Callable[[], nn.Module]) -> None:
    assert_matches_torch(cell, make, graph_mode)
    with pytest.raises(RuntimeError, match=r"call bnkernels\.revert\(model\) first"):
        graph_mode(make().train(cell.training), torch.randn(SHAPE))


def exported_mode(model: nn.Module, x: Tensor) -> Any:
    """torchao's pt2e."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", exc_type=ImportError)
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", exc_type=ImportError)
    qat = model.training
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=qat))
    exported = torch.export.export(model, (x,)).module()
    prepared = (pt2e.prepare_qat_pt2e if qat else pt2e.prepare_pt2e)(exported, quantizer)
    prepared(x)
    return pt2e.convert_pt2e(prepared)


@row(
    SECTION,
    "torchao's pt2e: torch.export, then prepare_pt2e or prepare_qat_pt2e, and convert_pt2e",
    cells(compiled=(False,), channels_last=(False,)),
    "torchao folds only torch's operator. In a model that is not reverted it silently leaves this package's operators "
    "as they were exported: in floating point, and in training mode if the model was.",
)
@pytest.mark.slow
@each_model
def test_exported_mode(cell: Cell, make: Callable[[], nn.Module]) -> None:
    """A program exported without revert() has this package's ops, which torchao's quantizers do not match."""
    assert_matches_torch(cell, make, exported_mode)
    exported = torch.export.export(make().train(cell.training), (torch.randn(SHAPE),))
    assert any("bnkernels" in str(node.target) for node in exported.graph.nodes)


@each_model
def test_reverting_a_copy_leaves_the_model(make: Callable[[], nn.Module]) -> None:
    """The documented way to use such a tool while training continues."""
    model = make().eval()
    copied = torch.jit.script(bnk.revert(copy.deepcopy(model)))
    assert any(isinstance(module, bnk.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(copied(x := torch.randn(SHAPE)), model(x))
