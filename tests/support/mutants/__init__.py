"""Mutation testing: realistic faults, applied one per run, that the tests must detect.

    make mutants                                   all of them: hours on 2 cores
    make mutants MUTANTS_ARGS="--area modules -k momentum"

`python -m mutants` (with tests/support on PYTHONPATH) copies the repository to out/mutants. For each mutant of the
catalogue (tests/support/mutants/*.py) it replaces one snippet of one file, rebuilds what depends on it, runs the
relevant tests, and restores the file. A mutant is *killed* if a test fails or hangs, and *survives* if all pass. Each
selection of tests first runs on the unmodified copy, where it must pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib import import_module

AREAS = ("device", "plans", "launchers", "cpu", "ops", "modules", "derivatives", "fusion")


class Build(Enum):
    """What to rebuild before the tests run with a change."""

    NONE = "nothing"
    SIMT = "the kernels for the host, by the tests of tests/support/simt themselves"
    EXTENSION = "the extension, without CUDA"
    FAKE_CUDA = "the extension with CUDA, for tests on the fake CUDA device"


@dataclass(frozen=True)
class Mutant:
    """One fault: `old`, which occurs once in `file`, becomes `new`; `tests` (arguments of pytest) must detect it.

    survives: why no test can detect it (an equivalent mutant), or empty.
    """

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    build: Build = Build.NONE
    survives: str = ""

    def apply(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {text.count(self.old)} times, expected once: {self.old!r} ({self.fault})")
        return text.replace(self.old, self.new)


def catalogue() -> dict[str, list[Mutant]]:
    """The mutants, by area."""
    return {area: import_module(f"{__name__}.{area}").MUTANTS for area in AREAS}
