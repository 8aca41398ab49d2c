from __future__ import annotations

from . import Build, Mutant

MUTANTS: list[Mutant] = []
