"""torch.export, AOTInductor and ONNX: results equal eager's, and in training the statistics do too."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility import Cell, cells, row
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import bnkernels as bnk
from bnkernels import testing

SECTION = "torch.export, AOTInductor, ONNX"
DYNAMIC = ({0: Dim("batch", min=2, max=64), 2: Dim("height", min=2, max=64)},)
SIZES = ((4, 6), (2, 9), (7, 3))


def model() -> nn.Sequential:
    """The same parameters and nontrivial statistics at each call."""
    torch.manual_seed(0)
    norms = nn.Sequential(bnk.BatchNorm2d(3), nn.ReLU(), bnk.BatchNorm2d(3, momentum=None))
    norms(torch.rand(8, 3, 4, 4) + 1)
    return norms


def inputs(cell: Cell) -> list[Tensor]:
    return [cell.laid_out(torch.randn(n, 3, height, 5)) for n, height in SIZES]


def exported(cell: Cell, **options: Any) -> ExportedProgram:
    return torch.export.export(cell.eager.prepared(model()), (inputs(cell)[0],), dynamic_shapes=DYNAMIC, **options)


def assert_same_as_eager(
    cell: Cell, program: Callable[[Tensor], Tensor], buffers: Callable[[], dict[str, Tensor]]
) -> None:
    """Outputs and statistics equal eager's bit for bit, over several sizes."""
    eager = model()
    reference = cell.eager.prepared(eager)
    for x in inputs(cell):
        y, expected = program(x), reference(x)
        assert y.stride() == expected.stride() and testing.same_bits(y, expected)
    held, own = buffers(), dict(eager.named_buffers())
    for name, buffer in held.items():
        assert testing.same_bits(buffer, own[name]), name
    if cell.training:
        assert set(held) == set(own)


EXPORTED = cells(compiled=(False,))
PROGRAMS: dict[str, tuple[dict[str, Any], Callable[[ExportedProgram], ExportedProgram]]] = {
    "training IR": ({}, lambda program: program),
    "training IR, strict": ({"strict": True}, lambda program: program),
    "decomposed": ({}, lambda program: program.run_decompositions()),
    "saved and loaded": ({}, lambda program: loaded(saved(program))),
}


def saved(program: ExportedProgram) -> io.BytesIO:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return file


def loaded(file: io.BytesIO) -> ExportedProgram:
    return torch.export.load(file)


@row(SECTION, "torch.export, dynamic batch and height: plain, strict, decomposed, saved and loaded", EXPORTED)
@pytest.mark.parametrize(("options", "change"), PROGRAMS.values(), ids=PROGRAMS)
def test_export(cell: Cell, options: dict[str, Any], change: Callable[[ExportedProgram], ExportedProgram]) -> None:
    module = change(exported(cell, **options)).module()
    assert_same_as_eager(cell, module, lambda: dict(module.named_buffers()))


def test_decomposed_graphs_are_functional() -> None:
    """A decomposed program returns the statistics as outputs that are copied to the buffers: no op in it mutates."""
    for training, mutated in ((True, 6), (False, 0)):
        program = exported(Cell(training, False, False)).run_decompositions()
        assert len(program.graph_signature.buffers_to_mutate) == mutated
        ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert not any(op._schema.is_mutable for op in ops if isinstance(op, torch._ops.OpOverload))


def test_reverted_model_exports_without_package_ops() -> None:
    """Such a program runs in a process that cannot import bnkernels."""
    program = torch.export.export(bnk.revert(model()).eval(), (torch.randn(4, 3, 6, 5),))
    assert "bnkernels" not in str(program.graph)


@row(
    SECTION,
    "AOTInductor: aoti_compile_and_package, aoti_load_package (CPU)",
    cells(compiled=(True,), channels_last=(False,)),
    "a package calls this package's ops, so the process that loads it imports bnkernels first; "
    "for a process without Python, package a reverted model.",
)
@pytest.mark.slow
def test_aot_inductor(cell: Cell, tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(exported(cell), package_path=str(tmp_path / "model.pt2"))
    program = torch._inductor.aoti_load_package(package)
    # The package's own constants cannot be read; these tensors replace them, and the program writes to them.
    constants = {name: buffer for name, buffer in model().named_buffers() if name in program.get_constant_fqns()}
    program.load_constants(constants, check_full_update=False, user_managed=True)
    assert_same_as_eager(cell, program, lambda: constants)


# ONNX


def onnx_bytes(cell: Cell, dynamo: bool) -> bytes:
    file = io.BytesIO()
    module, (x, *_) = cell.eager.prepared(model()), inputs(cell)
    if dynamo:
        program = torch.onnx.export(module, (x,), dynamo=True, verbose=False, dynamic_shapes=DYNAMIC)
        assert program is not None
        program.save(file)
    else:
        axes = {"x": {0: "batch", 2: "height"}}
        torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return file.getvalue()


@row(
    SECTION,
    "ONNX, either exporter: a BatchNormalization node, run by onnxruntime",
    cells(training=(False,), compiled=(False,)),
    "in training the newer exporter gives plain operators, which normalize by the batch. An ExportedProgram has this "
    "package's ops, which ONNX does not support: pass the model to torch.onnx.export.",
)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx(cell: Cell, dynamo: bool) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    data = onnx_bytes(cell, dynamo)
    ops = [node.op_type for node in onnx.load_from_string(data).graph.node]
    # Identity: the older exporter stores parameters of equal values once.
    assert [op for op in ops if op != "Identity"] == ["BatchNormalization", "Relu", "BatchNormalization"]
    session = runtime.InferenceSession(data)
    reference = cell.prepared(model())
    for x in inputs(cell):
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), reference(x).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_in_training() -> None:
    """Normalizes by the batch: an exporter that folds away a layer in training mode would be silently wrong."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    cell = Cell(training=True, compiled=False, channels_last=False)
    session, reference = runtime.InferenceSession(onnx_bytes(cell, dynamo=True)), cell.prepared(model())
    for x in inputs(cell):
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), reference(x).detach())
