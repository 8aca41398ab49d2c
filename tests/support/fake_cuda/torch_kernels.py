"""torch's operators on the fake CUDA device: computed in place by torch's CPU kernels, since its memory is host memory.

Only bnkernels' kernels are compiled for the host. Every other operator that has a CUDA kernel in torch is overridden:
it waits for its current stream, runs the CPU kernel on the same memory, and copies the results to new device memory. In
a capture, where no work may run yet, it becomes a graph node that does this at each replay. Operators that only
allocate or describe tensors stay torch's. Byte copies are put on streams as on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .runtime import Runtime

# Operators that stay torch's: they launch no kernel.
NATIVE = frozenset(
    ("empty.memory_format", "empty_strided", "resize_", "as_strided", "view", "_reshape_alias", "unfold")
    + ("set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "is_set_to")
    + ("view_as_real", "view_as_complex", "record_stream", "_local_scalar_dense")
)


@cache
def install() -> None:
    """Installs the overrides, once per process and for its lifetime."""
    torch.backends.cudnn.enabled = False  # torch's convolutions without cuDNN have CPU kernels
    library = torch.library.Library("aten", "IMPL")
    runtime = Runtime()
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, operator = name.partition("::")
        if namespace == "aten" and operator not in NATIVE:
            library.impl(operator, _Kernel(runtime, operator), "CUDA", allow_override=True)
    library.impl("copy_", _Copy(runtime), "CUDA")
    _forever.append(library)


_forever: list[torch.library.Library] = []


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same memory."""
    storage = tensor.untyped_storage()
    bytes = storage.nbytes()
    view = torch.empty(0, dtype=tensor.dtype)
    if bytes:
        memory = (ctypes.c_char * bytes).from_address(storage.data_ptr())
        view = view.set_(torch.frombuffer(memory, dtype=torch.uint8).untyped_storage())
    view = torch.as_strided(view, tensor.size(), tensor.stride(), tensor.storage_offset())
    return torch._neg_view(view) if tensor.is_neg() else view


class _Kernel:
    """An operator, computed by its CPU kernel."""

    def __init__(self, runtime: Runtime, operator: str) -> None:
        self.runtime = runtime
        base, _, overload = operator.partition(".")
        self.overloads: Callable[..., Any] = getattr(torch.ops.aten, base)
        self.op: Callable[..., Any] = getattr(self.overloads, overload or "default")
        self.tensors = [type(argument.type) is torch.TensorType for argument in self.op._schema.arguments]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = _device_of(tensors, kwargs)
        self.runtime.note(self.op.name())
        with torch.cuda.device(device):
            return self._call(tensors, device, args, kwargs)

    def _call(self, tensors: list[Tensor], device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = torch.cuda.current_stream(device)
        call = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        call = tree_map_only(torch.Generator, _generator, call)
        views = [on_host(tensor) if tensor.is_cuda else tensor for tensor in tensors]
        call = _replaced(call, tensors, views)
        if torch.cuda.is_current_stream_capturing():
            read = [view.clone() for view in views]
            outcome = self._run(_replaced(call, views, read))  # to get the shapes of its results
        else:
            read = views
            self.runtime.finish(stream)
            outcome = self._run(call)
        made = _new(outcome, read)
        targets = [torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device=device) for one in made]
        written = [on_host(target) for target in targets]
        if torch.cuda.is_current_stream_capturing():
            # A graph does not hold references to device memory: within its pool, freed memory is reused.
            self.runtime.put(stream, lambda: _write(written, _new(self._run(call), views)))
        else:
            _write(written, made)
            _resize(tensors, views)
        return _replaced(outcome, [*read, *made], [*tensors, *targets])

    def _run(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = call
        # A number in place of a tensor argument arrives as a number, for which the packet selects the overload.
        number = any(wanted and isinstance(arg, (int, float, complex)) for wanted, arg in zip(self.tensors, args))
        with torch.no_grad():
            return (self.overloads if number else self.op)(*args, **kwargs)


class _Copy(_Kernel):
    """copy_: copies bytes if both layouts match, otherwise runs a kernel."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime, "copy_")

    def __call__(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        lie = [(each.dtype, each.size(), each.stride(), each.is_neg()) for each in (target, source)]
        if lie[0] != lie[1] or not _is_dense(target):
            return super().__call__(target, source)
        with torch.cuda.device(target.device if target.is_cuda else source.device):
            stream = torch.cuda.current_stream()
            self.runtime.copy(target.data_ptr(), source.data_ptr(), target.nbytes, stream)
            if target.device != source.device and not non_blocking:
                self.runtime.finish(stream)
        return target


def _device_of(tensors: Sequence[Tensor], kwargs: dict[str, Any]) -> torch.device:
    for tensor in tensors:
        if tensor.is_cuda:
            return tensor.device
    named = kwargs.get("device")
    return named if named is not None and named.index is not None else torch.device("cuda", torch.cuda.current_device())


def _generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator with the same state; advances the original's state as a kernel that draws numbers does."""
    if generator.device.type == "cpu":
        return generator
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed(generator.initial_seed() + offset)


def _replaced(tree: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    """The tree with new[i] in place of old[i], compared by identity."""
    by = {id(one): other for one, other in zip(old, new)}
    return tree_map_only(Tensor, lambda tensor: by.get(id(tensor), tensor), tree)


def _new(outcome: Any, read: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of an outcome that are not among those read."""
    known = {id(tensor) for tensor in read}
    return [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor) and id(leaf) not in known]


def _write(targets: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    for target, result in zip(targets, results):
        target.copy_(result)


def _resize(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    """Applies the new sizes of tensors that an operator resized, as `out` variants do."""
    for tensor, view in zip(tensors, views):
        if tensor.size() != view.size():
            tensor.resize_(view.size())
            on_host(tensor).copy_(view)


def _is_dense(tensor: Tensor) -> bool:
    return sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride())) + 1 == tensor.numel()
