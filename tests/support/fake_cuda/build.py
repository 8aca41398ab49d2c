"""Compiles the runtime: a library by the name of CUDA's driver, to be loaded before torch loads CUDA's runtime."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simt import build as simt

from build_support import find_cuda_root

HEADERS = "tests/support/fake_cuda/*.h"
SOURCES = "tests/support/fake_cuda/*.cpp"
# What lies above global memory, of which the runtime has its own (memory.cpp).
ENGINE = [file for file in simt.ENGINE if not file.endswith("buffers.cpp")]
FLAGS = [*simt.BUILDS["plain"], "-Wno-unknown-pragmas"]
# By this name torch opens the driver. Symbols are looked up here before any library that is loaded later.
LINK = ["-shared", "-Wl,-soname,libcuda.so.1", "-ldl"]


def library(root: Path = simt.ROOT) -> Path:
    """The library's path. Raises RuntimeError where it does not compile."""
    toolkit = find_cuda_root(os.environ)
    if toolkit is None:
        raise RuntimeError("no CUDA toolkit, with whose headers the fake CUDA device is compiled")
    flags = [*FLAGS, "-isystem", str(toolkit / "include")]
    files = [*sorted(str(path.relative_to(root)) for path in root.glob(SOURCES)), *ENGINE, *simt.PLAN]
    own = [path.read_bytes() for path in sorted(root.glob(HEADERS))]
    headers = [*simt.headers_of(root), *own]
    units = [(file, flags, headers) for file in files]
    # With the flags and headers of tests/support/simt, so that one compilation serves both.
    plain = simt.BUILDS["plain"]
    units += [(simt.KERNELS, [*plain, simt.of(dtype)], simt.headers_of(root)) for dtype in simt.ELEMENTS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda unit: simt.compiled(root, *unit), units))
    return simt.make("libcuda.so.1", [*map(str, objects), *LINK], [path.name.encode() for path in objects])
