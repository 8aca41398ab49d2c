"""Loads the compiled library bnkernels._C, and raises ImportError with the remedy if it does not fit this torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch

_FIX = (
    "Rebuild bnkernels with the torch that it will run with:\n"
    "    pip install --no-build-isolation --force-reinstall --no-deps bnkernels\n"
    "(from a source tree: pip install --no-build-isolation .)"
)


def _built_against() -> dict[str, str]:
    """The versions of torch and CUDA that the compiled library was built against; {} if there is none.

    Parses the tag that the build compiles into the binary, because a library that fails to load cannot be called.
    """
    for library in sorted(Path(__file__).parents[1].glob("_C.*")):
        if library.suffix in (".so", ".pyd"):
            tag = re.search(rb"bnkernels-build torch=([^\s\0]+) cuda=([^\s\0]+)", library.read_bytes())
            if tag is not None:
                return {"library": library.name, "torch": tag[1].decode(), "cuda": tag[2].decode()}
            return {"library": library.name, "torch": "an unknown torch", "cuda": "unknown"}
    return {}


def load_error(reason: object, counterpart: str = "this torch") -> ImportError:
    running = f"running: torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    built = _built_against()
    if not built:
        return ImportError(f"bnkernels is not built for this Python: no compiled library found.\n{running}\n{_FIX}")
    return ImportError(
        f"bnkernels' compiled library {built['library']} does not match {counterpart}: {reason}\n"
        f"built against: torch {built['torch']}, CUDA {built['cuda']}\n{running}\n{_FIX}"
    )


def _is_check() -> bool:
    """Whether `python -m bnkernels.check` or its console script runs this import."""
    argv = sys.orig_argv
    return any(pair == ("-m", "bnkernels.check") for pair in pairwise(argv)) or any(
        Path(argument).stem == "bnkernels-check" for argument in argv[:2]
    )


def fail(error: ImportError, cause: ImportError | None = None) -> NoReturn:
    # Python exits with 1 if an import fails, but exit code 1 of the check means "out of bounds". The check itself
    # cannot handle the error, because the package is imported first.
    if _is_check():
        print(f"bnkernels.check could not run: {error}", file=sys.stderr)
        raise SystemExit(2)
    raise error from cause


def _release(version: str) -> tuple[str, ...]:
    """("2", "15") for "2.15.0+cu132". torch's C++ ABI is stable within a minor release only."""
    return tuple(version.split(".")[:2])


def _incompatibility(built: Mapping[str, object], torch_version: str, torch_cuda: str | None) -> str | None:
    """Why a library that has loaded must not be used, or None if it is compatible."""
    if _release(str(built["torch"])) != _release(torch_version):
        # All symbols resolved, but the layout of torch's C++ objects may differ, which would silently corrupt memory.
        return "torch's C++ interface changes between releases"
    built_cuda = built["cuda"]
    if built_cuda is not None and torch_cuda is not None and _release(str(built_cuda))[0] != _release(torch_cuda)[0]:
        # The process would have two CUDA runtimes, whose streams and errors are not interchangeable.
        return "the CUDA runtime changes between major versions"
    return None


try:
    from bnkernels import _C as _C  # re-exported
except ImportError as error:
    fail(load_error(error), error)

_reason = _incompatibility(_C.build_info(), torch.__version__, torch.version.cuda)
if _reason is not None:
    fail(load_error(_reason))
