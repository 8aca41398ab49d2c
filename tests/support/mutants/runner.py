"""Runs mutants in copies of the repository."""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from . import Build, Mutant

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 900  # seconds for the tests of a mutant; a longer run counts as hung


@dataclass(frozen=True)
class Outcome:
    """The result of a mutant: killed, and by which test; or the error that prevented testing it."""

    mutant: Mutant
    killed_by: str = ""
    error: str = ""
    seconds: float = 0

    @property
    def survived(self) -> bool:
        return not self.killed_by and not self.error


class Tree:
    """A copy of the repository with its own build. Reuses the build of an earlier run."""

    def __init__(self, root: Path, source: Path = ROOT) -> None:
        self.root = root.resolve()  # working directory of the tests
        self.source = source
        self._extension: Build | None = None  # current build: EXTENSION, FAKE_CUDA, or None
        self._passing: set[tuple[Build, tuple[str, ...]]] = set()
        self._copy()

    def test(self, mutant: Mutant) -> Outcome:
        started = time.monotonic()
        file = self.root / mutant.file
        original = file.read_text()
        try:
            changed = mutant.apply(original)
            selection = (mutant.build, mutant.tests)
            if selection not in self._passing:
                failed = self._failing_test(*selection)
                if failed:
                    return Outcome(mutant, error=f"fails without the mutant: {failed}")
                self._passing.add(selection)
            file.write_text(changed)
            if mutant.build in (Build.EXTENSION, Build.FAKE_CUDA):
                self._extension = None
            killed_by = self._failing_test(*selection)
            return Outcome(mutant, killed_by, seconds=time.monotonic() - started)
        except (RuntimeError, ValueError) as error:
            return Outcome(mutant, error=str(error))
        finally:
            file.write_text(original)
            if mutant.build in (Build.EXTENSION, Build.FAKE_CUDA):
                self._extension = None

    def _copy(self) -> None:
        """Copies only files that differ, so that ninja rebuilds no more than needed."""
        listed = ["git", "-C", str(self.source), "ls-files", "-co", "--exclude-standard", "-z"]
        names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
        for folder in (
            "bnkernels",
            "csrc",
            "tests",
        ):  # delete removed files, since setup.py compiles every file it finds
            for path in (self.root / folder).rglob("*.*"):
                if (
                    path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
                    and str(path.relative_to(self.root)) not in names
                ):
                    path.unlink()
        for name in filter(None, names):
            source, target = self.source / name, self.root / name
            if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def _failing_test(self, build: Build, tests: Sequence[str]) -> str:
        """The first test that fails, or another reason why the run ended; empty if all pass."""
        with_cuda = build is Build.FAKE_CUDA
        if self._extension is None or with_cuda != (self._extension is Build.FAKE_CUDA):
            self._build(with_cuda)
        command = [sys.executable, "-m"]
        if with_cuda:
            command += ["fake_cuda", "-m"]
        command += ["pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
        try:
            done = self._run(command, TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"no end after {TIMEOUT} s"
        if done.returncode == 0:
            return ""
        if done.returncode in (4, 5):  # the selection is empty
            raise RuntimeError(f"pytest {' '.join(tests)}: {done.stdout[-300:]}")
        if compiler := re.search(r"^.*:\d+: error: .*|^.*\(\d+\): error: .*", done.stdout, re.MULTILINE):
            raise RuntimeError(f"does not compile: {compiler[0]}")
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return found[1] if found else f"exit status {done.returncode}"

    def _build(self, with_cuda: bool) -> None:
        self._extension = None
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = self._run(command, None, FORCE_CUDA=str(int(with_cuda)), TORCH_CUDA_ARCH_LIST="9.0")
        if done.returncode != 0:
            raise RuntimeError(f"does not compile: {done.stdout[-600:]}")
        self._extension = Build.FAKE_CUDA if with_cuda else Build.EXTENSION

    def _run(self, command: Sequence[str], timeout: float | None, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root), str(self.root / "tests" / "support")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "passive",
            **variables,
        }
        with subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # including its servers
                process.communicate()
                raise
            return subprocess.CompletedProcess(command, process.returncode, output, "")


def run(mutants: Sequence[Mutant], folder: Path, jobs: int) -> Iterator[Outcome]:
    """Yields outcomes as they arrive. Each of `jobs` trees takes mutants in the order of their files, which saves
    builds."""
    trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
    for number in range(jobs):
        trees.put(Tree(folder / f"tree{number}"))
    order = list(Build)
    ordered = sorted(mutants, key=lambda mutant: (order.index(mutant.build), mutant.file))

    def one(mutant: Mutant) -> Outcome:
        tree = trees.get()
        try:
            return tree.test(mutant)
        finally:
            trees.put(tree)

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for future in as_completed([pool.submit(one, mutant) for mutant in ordered]):
            yield future.result()
