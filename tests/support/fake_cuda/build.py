"""Compiles the runtime: a library with the name of CUDA's driver, loaded before torch loads CUDA's runtime."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simt import build as simt

from build_support import find_cuda_root

HEADERS = "tests/support/fake_cuda/*.h"
SOURCES = "tests/support/fake_cuda/*.cpp"
# The engine without its global memory, which the runtime replaces (memory.cpp).
ENGINE = [file for file in simt.ENGINE if not file.endswith("buffers.cpp")]
FLAGS = [*simt.BUILDS["plain"], "-Wno-unknown-pragmas"]
# torch opens the driver by this name. Symbols are found here before those of any library that is loaded later.
LINK = ["-shared", "-Wl,-soname,libcuda.so.1", "-ldl"]


def library(root: Path = simt.ROOT) -> Path:
    """The library's path. Raises RuntimeError if it does not compile."""
    toolkit = find_cuda_root(os.environ)
    if toolkit is None:
        raise RuntimeError("the fake CUDA device needs the headers of a CUDA toolkit, but none was found")
    flags = [*FLAGS, "-isystem", str(toolkit / "include")]
    files = [*sorted(str(path.relative_to(root)) for path in root.glob(SOURCES)), *ENGINE, *simt.PLAN]
    own = [path.read_bytes() for path in sorted(root.glob(HEADERS))]
    headers = [*simt.headers_of(root), *own]
    units = [(file, flags, headers) for file in files]
    # The flags and headers of tests/support/simt, so that both share one compilation.
    plain = simt.BUILDS["plain"]
    units += [(simt.KERNELS, [*plain, simt.of(dtype)], simt.headers_of(root)) for dtype in simt.ELEMENTS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda unit: simt.compiled(root, *unit), units))
    return simt.make("libcuda.so.1", [*map(str, objects), *LINK], [path.name.encode() for path in objects])
