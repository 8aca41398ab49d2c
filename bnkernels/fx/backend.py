"""The torch.compile backends "bnkernels" (fusion, then eager) and "bnkernels_inductor" (fusion, then inductor).

Importing torch._dynamo takes seconds, so the backends are registered lazily, when it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx

from ..functional import batch_norm_tracked
from ..running_stats import checkpoint_contexts
from .calls import STATISTICS, norm_call

logger = logging.getLogger("bnkernels")

Record = Callable[[fx.Node, Sequence[Any], dict[fx.Node, Any], str, str], None]
EAGER, INDUCTOR = "bnkernels", "bnkernels_inductor"


def fuse_graphs(graph_module: fx.GraphModule, example_inputs: Sequence[Any], record: Record | None = None) -> int:
    """Runs the fusion pass on a captured graph and its subgraphs (checkpointed blocks).

    record is called for each BatchNorm. Returns the number of fused calls.
    """
    from .patterns import fuse_graph

    fused = 0
    for module in graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        inputs: dict[fx.Node, Any] = {}
        if module is graph_module:
            inputs = dict(zip((node for node in module.graph.nodes if node.op == "placeholder"), example_inputs))
        for call, what, reason in fuse_graph(module.graph):
            fused += bool(what)
            if record is not None:
                tensors = [value for value in call.arguments.values() if isinstance(value, fx.Node)]
                record(call.node, tensors, inputs, what, reason)
        module.graph.lint()
        module.recompile()
    return fused


def eager_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, record: Record | None = None, **_: Any
) -> Callable[..., Any]:
    """Fuses, then executes the graph eagerly. Autograd works as in eager mode, to any order."""
    logger.debug("fused %d calls in a graph", fuse_graphs(graph_module, example_inputs, record))
    _checkpoint_eagerly(graph_module)
    return graph_module.forward


def inductor_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    record: Record | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fuses, then compiles the graph with inductor. mode, options: as for torch.compile."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    logger.debug("fused %d calls in a graph", fuse_graphs(graph_module, example_inputs, record))
    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **(options or {})}
    compiled: Any = compile_fx(graph_module, list(example_inputs), config_patches=patches or None)
    return compiled


BACKENDS: dict[str, Callable[..., Callable[..., Any]]] = {EAGER: eager_backend, INDUCTOR: inductor_backend}


def _checkpoint_eagerly(graph_module: fx.GraphModule) -> None:
    """Replaces the checkpoint operator of captured graphs by torch.utils.checkpoint.

    The operator only tags the block for a compiler's partitioner; executed eagerly, it would not recompute.
    """
    from torch._higher_order_ops.wrap import tag_activation_checkpoint as operator

    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            found = [node for node in module.graph.nodes if node.op == "call_function" and node.target is operator]
            for node in found:
                node.target = _checkpoint
            if found:
                module.recompile()


def _checkpoint(block: fx.GraphModule, *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """torch.utils.checkpoint of a captured block.

    The checkpointed function takes no arguments. As arguments, the running statistics would be saved for the backward,
    which raises if the block has updated them in place.
    """
    context_fn = block.meta.get("_checkpoint_context_fn")
    if context_fn is not None:
        kwargs["context_fn"] = context_fn
    updates_once = getattr(context_fn, "func", None) is checkpoint_contexts
    is_recomputation = False

    def run() -> Any:
        nonlocal is_recomputation
        run_args = _with_cloned_statistics(block, args) if is_recomputation and updates_once else args
        is_recomputation = True
        return block(*run_args)

    return torch.utils.checkpoint.checkpoint(run, use_reentrant=False, **kwargs)


def _with_cloned_statistics(block: fx.GraphModule, args: Sequence[Any]) -> list[Any]:
    """The arguments, with clones of the buffers that this package's BatchNorms update.

    The recomputation then leaves the original buffers unchanged.
    """
    updated: set[Any] = set()
    for node in block.graph.nodes:
        call = norm_call(node)
        if call is not None and call.training and not call.is_torch:
            updated |= {call.arguments[name] for name in STATISTICS}
    inputs = [node for node in block.graph.nodes if node.op == "placeholder"]
    return [arg.clone() if node in updated else arg for node, arg in zip(inputs, args)]


# Registration


def register() -> None:
    """Makes each layer a single node of captured graphs, and registers the backends by name."""
    from torch._dynamo.backends import registry

    torch.compiler.allow_in_graph(batch_norm_tracked)
    for name, backend in BACKENDS.items():
        # torch may have registered it from the package's entry points.
        if name not in registry._BACKENDS:
            registry.register_backend(backend, name=name)


class _Finder(importlib.abc.MetaPathFinder):
    """Calls register() after the import of torch._dynamo."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def register_on_import() -> None:
    if "torch._dynamo" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())
