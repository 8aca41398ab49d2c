"""Compares fuse() with the original on models of torchvision, timm, segmentation-models-pytorch, MONAI, transformers,
PyTorch Geometric and ultralytics.

    python tests/support/fuse_models.py [WORD...]          models whose name contains a word (default: all)
    python tests/support/fuse_models.py --tools [WORD...]  tools that replace layers, on both models

Libraries that are not installed are listed as such.

Each model has random weights and is in float64. Outputs, gradients of all parameters and buffers of the original and of
its fused copy are compared in train mode, eval mode, and train mode with another batch size. Deep networks amplify
rounding, so the same difference is measured for the original with its input multiplied by 1 + 1e-15: a fused model may
differ by 1e-9, or by 100 times that rounding difference. Prints the table of docs/fusion.md; exits with 1 if a model
differs or raises.
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from fusing import tensors  # noqa: E402

import bnkernels as bnk  # noqa: E402

ALLOWED = 1e-9
ROUNDINGS = 100  # allowed difference, in multiples of the difference that input rounding makes

Inputs = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Example:
    """A model: its constructor, and its arguments for a batch of n."""

    library: str
    name: str
    make: Callable[[Any], nn.Module]
    inputs: Inputs


def images(*shape: int) -> Inputs:
    def make(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(n, *shape, dtype=torch.float64),), {}

    return make


def detection(size: int) -> Inputs:
    def make(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        boxes = torch.tensor([[4.0, 4.0, size / 2, size / 2]], dtype=torch.float64)
        targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in range(n)]
        return ([*torch.rand(n, 3, size, size, dtype=torch.float64)], targets), {}

    return make


def graph(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    nodes = 40 * n
    edges = torch.randint(nodes, (2, 4 * nodes), generator=torch.Generator().manual_seed(n))
    return (torch.randn(nodes, 8, dtype=torch.float64), edges), {}


SMALL = images(3, 64, 64)


def vision(name: str, inputs: Inputs, **options: Any) -> Example:
    def make(library: Any) -> nn.Module:
        return library.get_model(name, weights=None, **options)  # type: ignore[no-any-return]

    return Example("torchvision.models", name, make, inputs)


def timm(name: str, inputs: Inputs, **options: Any) -> Example:
    label = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
    return Example("timm", label, lambda library: library.create_model(name, num_classes=5, **options), inputs)


def segmentation(name: str, **options: Any) -> Example:
    def make(library: Any) -> nn.Module:
        return getattr(library, name)("resnet18", encoder_weights=None, classes=2, **options)  # type: ignore[no-any-return]

    return Example("segmentation_models_pytorch", name, make, images(3, 64, 64))


def monai(name: str, make: Callable[[Any], nn.Module], size: int = 32) -> Example:
    return Example("monai.networks.nets", name, make, images(1, size, size))


def transformer(name: str, **options: Any) -> Example:
    def make(library: Any) -> nn.Module:
        return getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**options))  # type: ignore[no-any-return]

    return Example("transformers", name, make, images(3, 64, 64))


def yolo(name: str) -> Example:
    def make(library: Any) -> nn.Module:
        return library.DetectionModel(f"{name}.yaml", verbose=False)  # type: ignore[no-any-return]

    return Example("ultralytics.nn.tasks", name, make, SMALL)


class Graph(nn.Module):
    """Two graph convolutions, each followed by PyTorch Geometric's BatchNorm, a ReLU and dropout."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList([library.GCNConv(8, 16), library.SAGEConv(16, 16)])
        self.norms = nn.ModuleList([library.BatchNorm(16), library.BatchNorm(16)])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = nn.functional.dropout(norm(conv(x, edges)).relu(), 0.2, training=self.training)
        return x


EXAMPLES = [
    *(vision(name, SMALL) for name in ("resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "densenet121")),
    *(vision(name, SMALL) for name in ("mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5")),
    *(vision(name, SMALL) for name in ("regnet_y_400mf", "efficientnet_b0")),
    vision("googlenet", SMALL, aux_logits=False, init_weights=False),
    vision("inception_v3", images(3, 96, 96), aux_logits=False, init_weights=False),
    vision("lraspp_mobilenet_v3_large", SMALL, weights_backbone=None, num_classes=3),
    vision("deeplabv3_resnet50", SMALL, weights_backbone=None, num_classes=3),
    vision("ssdlite320_mobilenet_v3_large", detection(160), weights_backbone=None, num_classes=3),
    vision("fasterrcnn_mobilenet_v3_large_320_fpn", detection(64), weights_backbone=None, num_classes=3),
    vision("r3d_18", images(3, 4, 32, 32), num_classes=5),
    *(timm(name, SMALL) for name in ("resnet10t", "seresnet18", "dla34", "res2net50_26w_4s", "repvgg_a0")),
    *(timm(name, SMALL) for name in ("regnetx_002", "ghostnet_050", "mobilenetv3_small_050", "efficientnet_b0")),
    *(timm(name, SMALL) for name in ("hrnet_w18_small", "cspresnet50", "skresnet18")),
    timm("levit_128s", images(3, 224, 224)),
    timm("resnet18", SMALL, drop_path_rate=0.3, drop_rate=0.2),
    *(segmentation(name) for name in ("Unet", "UnetPlusPlus", "FPN", "Linknet", "DeepLabV3Plus")),
    monai("BasicUNet", lambda nets: nets.BasicUNet(2, 1, 2, (8, 8, 16, 16, 32, 8), norm="batch", act="relu")),
    monai("UNet", lambda nets: nets.UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2, act="relu", norm="batch")),
    monai("DynUNet", lambda nets: nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], norm_name="batch")),
    monai("DenseNet121", lambda nets: nets.DenseNet121(2, 1, 2), 64),
    transformer("ResNet", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 64], embedding_size=16),
    transformer("RegNet", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 64], embedding_size=16, groups_width=8),
    transformer("MobileNetV2"),
    Example("torch_geometric.nn", "GCN, SAGE, BatchNorm", Graph, graph),
    Example(
        "torch_geometric.nn",
        "GIN",
        lambda library: library.GIN(8, 16, 3, norm="batch_norm", dropout=0.2),
        graph,
    ),
    yolo("yolov8n"),
    yolo("yolo11n"),
]


def step(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Outputs, parameter gradients and buffers after one call, by name."""
    torch.manual_seed(0)  # dropout and drop path
    model.zero_grad()
    outputs = [each for each in tensors(model(*copy.deepcopy(args), **kwargs)) if each.is_floating_point()]
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    loss = sum(output.square().mean() for output in outputs if output.requires_grad and output.numel())
    if isinstance(loss, Tensor):
        loss.backward()
    found |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def trace(model: nn.Module, batches: list[tuple[Any, Any]]) -> list[dict[str, Tensor]]:
    return [step(model.train(training), *batch) for training, batch in zip((True, False, True), batches)]


def difference(ours: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    """Largest difference, relative to the tensor's largest element, or to 1e-6 of the largest of its kind if larger.

    Kinds are outputs, gradients, and buffers of one name: some gradients and running means are zero up to rounding.
    Infinity if names, shapes, dtypes, or the positions of non-finite elements differ.
    """
    largest = 0.0
    for left, right in zip(ours, expected, strict=True):
        if left.keys() != right.keys():
            return float("inf")
        sizes = {name: float(b.double().nan_to_num(0, 0, 0).abs().max()) for name, b in right.items() if b.numel()}
        floors: dict[str, float] = {}
        for name, size in sizes.items():
            floors[kind_of(name)] = max(floors.get(kind_of(name), 0.0), 1e-6 * size)
        for name, b in right.items():
            a = left[name]
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isfinite(), b.isfinite()):
                return float("inf")
            if b.numel():
                distance = float((a.double().nan_to_num(0, 0, 0) - b.double().nan_to_num(0, 0, 0)).abs().max())
                largest = max(largest, distance / (max(sizes[name], floors[kind_of(name)]) or 1.0))
    return largest


def kind_of(name: str) -> str:
    first, _, _ = name.partition(" ")
    return first if first in ("output", "gradient") else name.rpartition(".")[2]


def scaled(value: Any) -> Any:
    """Images and features times 1 + 1e-15; the boxes of targets unchanged."""
    if isinstance(value, Tensor):
        return value * (1 + 1e-15) if value.is_floating_point() else value
    return type(value)(scaled(each) for each in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Result:
    norms: int
    fused: int
    left: str
    difference: float
    rounding: float

    @property
    def is_right(self) -> bool:
        return self.difference <= max(ALLOWED, ROUNDINGS * self.rounding)


def compare(example: Example) -> Result:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = example.make(import_module(example.library)).double()
    batches = [example.inputs(n) for n in (3, 3, 2)]
    nearly = [(scaled(args), kwargs) for args, kwargs in batches]
    report = bnk.FusionReport()
    result = bnk.fuse(bnk.convert(copy.deepcopy(model)), report=report)
    traces = [trace(result, batches), *(trace(copy.deepcopy(model), each) for each in (batches, nearly))]
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    left = report.summary().partition(" left")[2].removeprefix(": ")
    left = left.replace(", which is neither a ReLU nor an addition of two tensors", "")
    return Result(
        norms,
        len({each.name for each in report.fused}),
        left,
        difference(traces[0], traces[1]),
        difference(traces[2], traces[1]),
    )


def timm_tool(module: str, tool: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: getattr(import_module(module), tool)(model)  # type: ignore[no-any-return]


TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nn.SyncBatchNorm.convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "bnk.SyncBatchNorm.convert_sync_batchnorm": bnk.SyncBatchNorm.convert_sync_batchnorm,
    "timm.layers.convert_sync_batchnorm": timm_tool("timm.layers", "convert_sync_batchnorm"),
    "timm.layers.convert_splitbn_model": timm_tool("timm.layers", "convert_splitbn_model"),
    "timm.utils.freeze_batch_norm_2d": timm_tool("timm.utils.model", "freeze_batch_norm_2d"),
    "torch.fx.experimental.optimization.fuse": optimization.fuse,
    "bnk.convert": bnk.convert,
    "bnk.revert": bnk.revert,
}


def outcome(call: Callable[[], Any]) -> Any:
    """The result of a call, or the name of the error that it raises."""
    try:
        return call()
    except Exception as error:
        return type(error).__name__


def compare_tools(example: Example) -> None:
    """Prints a row per tool: the largest difference of the outputs in eval mode."""
    torch.manual_seed(0)
    model = example.make(import_module(example.library)).double().eval()
    args, kwargs = example.inputs(3)
    for name, tool in TOOLS.items():
        torch.compiler.reset()
        fused, plain = bnk.fuse(copy.deepcopy(model)), copy.deepcopy(model)
        with torch.no_grad():
            fused(*args, **kwargs)
            results = [
                outcome(lambda each=each, tool=tool: tensors(tool(each).eval()(*args, **kwargs)))
                for each in (fused, plain)
            ]
        ours, expected = results
        if isinstance(expected, str):
            print(f"| {example.name} | `{name}` | {expected}, on the original too |", flush=True)
            if ours != expected:
                raise AssertionError(f"{example.name}, {name}: {ours}; on the original: {expected}")
            continue
        largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected, strict=True))
        print(f"| {example.name} | `{name}` | {largest:.1e} |", flush=True)
        if not largest <= ALLOWED:
            raise AssertionError(f"{example.name}, {name}: differs by {largest}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="names, or parts of them (default: all)")
    parser.add_argument("--tools", action="store_true", help="tools that replace layers, instead of steps")
    options = parser.parse_args()
    words = options.words
    if options.tools:
        print("| model | tool | largest difference |\n|---|---|---|")
        for example in EXAMPLES:
            if not words or any(word in f"{example.library.partition('.')[0]} {example.name}" for word in words):
                compare_tools(example)
        return 0
    good = True
    print("| library | model | BatchNorms | fused | largest difference | input times 1 + 1e-15 | left |")
    print("|---|---|---|---|---|---|---|")
    for example in EXAMPLES:
        library = example.library.partition(".")[0]
        if words and not any(word in f"{library} {example.name}" for word in words):
            continue
        try:
            result = compare(example)
            cells = [result.norms, result.fused, f"{result.difference:.1e}", f"{result.rounding:.1e}", result.left]
            wrong = "" if result.is_right else "DIFFERS: "
        except ImportError as error:
            cells, wrong = ["", "", "", "", f"not installed: {error}"], ""
        except Exception:
            cells, wrong = ["", "", "", "", traceback.format_exc().splitlines()[-1]], "RAISES: "
            traceback.print_exc()
        good &= not wrong
        cells[-1] = f"{wrong}{cells[-1]}"
        print(f"| {library} | {example.name} | {' | '.join(map(str, cells))} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
