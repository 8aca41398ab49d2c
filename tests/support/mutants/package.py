"""What the catalogues of bnkernels/**/*.py share: selections of tests, and where the files are."""

from __future__ import annotations

from . import Mutant

FUSED = ("tests/api/test_fused.py", "-k", "not numbers and not compiled and not opcheck")
SYNC = (
    "tests/distributed/test_sync.py",
    "tests/distributed/test_sync_derivatives.py",
    "-k",
    "not compiled and not missing and not tells",
)
FUSE_RESULTS = (
    "tests/compile/test_fuse_results.py",
    "-k",
    "undone or tracers or more_models or checkpointed or copies or lazy",
)


def mutant(fault: str, file: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    """A fault of a file of bnkernels, for which nothing is rebuilt."""
    return Mutant(fault, f"bnkernels/{file}", old, new, tests)
