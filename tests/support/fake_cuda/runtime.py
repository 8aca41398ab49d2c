"""The fake runtime from Python."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import VARIABLE

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Runtime:
    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[VARIABLE])
        self._functions: list[object] = []  # references: graphs call these at every replay

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, name)(*arguments)
        if error:
            raise RuntimeError(f"{name}: cudaError_t {error}")

    def finish(self, stream: torch.cuda.Stream) -> None:
        """Runs the pending work of the stream."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream.cuda_stream))

    def put(self, stream: torch.cuda.Stream, function: Callable[[], None]) -> None:
        """Adds the function to the stream as work, or as a node to the graph being captured."""

        def call(_: object) -> None:
            try:
                function()
            except BaseException:
                self._library.fake_cuda_fault(traceback.format_exc().encode())

        called = _FUNCTION(call)
        self._functions.append(called)
        self._call("cudaLaunchHostFunc", ctypes.c_void_p(stream.cuda_stream), called, None)

    def copy(self, target: int, source: int, bytes: int, stream: torch.cuda.Stream) -> None:
        """Copies between addresses, as work of the stream."""
        default = 4  # cudaMemcpyDefault
        arguments = (ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(bytes), default)
        self._call("cudaMemcpyAsync", *arguments, ctypes.c_void_p(stream.cuda_stream))

    def note(self, operator: str) -> None:
        """Records, for recorded(), that torch would launch its own kernels here."""
        self._library.fake_cuda_note(operator.encode())

    @contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """The work that a device would receive within the context, in order.

        Contains kernels by their mangled names, torch's operators as aten::..., collectives, "a copy" and the like.
        """
        tasks: list[str] = []
        self._library.fake_cuda_begin_record()
        try:
            yield tasks
        finally:
            self._library.fake_cuda_end_record.restype = ctypes.c_char_p
            tasks += self._library.fake_cuda_end_record().decode().splitlines()
