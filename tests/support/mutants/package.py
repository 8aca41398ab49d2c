"""Shared by the catalogues of bnkernels/**/*.py: selections of tests, and the files' location."""

from __future__ import annotations

from . import Mutant

FUSED = ("tests/api/test_fused.py", "-k", "not test_values and not compiled and not opcheck")
SYNC = (
    "tests/distributed/test_sync.py",
    "tests/distributed/test_sync_derivatives.py",
    "-k",
    "not compiled and not missing and not pool_reports",
)
FUSE_RESULTS = (
    "tests/compile/test_fuse_results.py",
    "-k",
    "undo or tracers or more_models or checkpoint or copies or lazy",
)


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    """A fault in a file of bnkernels, which needs no rebuild."""
    return Mutant(fault, f"bnkernels/{file}", old, new, tests)
