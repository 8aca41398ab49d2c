"""A pool of processes that form a torch.distributed group, for tests: started once, then given functions to run.

    pool = Pool(4, "gloo")
    results = pool.run(function, *arguments)      # function(*arguments) in each process, results by rank

A process that raises fails the test with its traceback. If one does not answer in time, all are killed, and the next
run starts new ones: a deadlock fails one test and hangs none. The error lists where each process was: the stacks of its
Python threads, and what its threads waited for in the kernel.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fake_cuda
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEADLINE = 90.0
"""Seconds, sized for a busy machine."""

PRELOADED = ["torch", "torch.distributed", "bnkernels"]
"""Modules that the fork server imports once."""


class Broken(AssertionError):
    """A process raised, died, or did not answer."""


class Collectives(TorchDispatchMode):
    """Counts the collectives called in its context. (torch's CommDebugMode changes strides: it takes views.)"""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional"):
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


class Pool:
    def __init__(self, size: int, backend: str) -> None:
        self.size, self._backend = size, backend
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: Path | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, deadline: float = DEADLINE) -> list[Any]:
        """Results of function(*arguments) in every process, by rank. `function` must be a module-level function.

        Results must be picklable. If a process fails, kills all processes and raises Broken with their errors.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        end = time.monotonic() + deadline
        answers: list[tuple[bool, Any]] = []
        late = False
        for rank, (_, pipe) in enumerate(self._workers):
            try:
                in_time = pipe.poll(max(0.0, end - time.monotonic()))
                answers.append(pickle.loads(pipe.recv_bytes()) if in_time else (False, f"no answer in {deadline:g} s"))
                late = late or not in_time
            except EOFError:
                answers.append((False, f"process of rank {rank} has died"))
        if not all(well for well, _ in answers):
            if late:
                answers = [
                    (False, f"{what if not well else 'has answered'}\n{self._where(rank)}")
                    for rank, (well, what) in enumerate(answers)
                ]
            self.close()
            raise Broken("\n".join(f"rank {rank}: {what}" for rank, (well, what) in enumerate(answers) if not well))
        return [result for _, result in answers]

    def close(self) -> None:
        """Kills the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _where(self, rank: int) -> str:
        """Where a process is: the Python stacks it reports, and the kernel's wait channel of each thread."""
        assert self._folder is not None
        process, _ = self._workers[rank]
        stacks = _stacks_of(self._folder, rank)
        said = "has not started to report where it is"
        if process.is_alive() and stacks.exists():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)
            said = stacks.read_text()
        waits = []
        for task in sorted(Path(f"/proc/{process.pid}/task").glob("*")):
            try:
                waits.append(" ".join((task / name).read_text().strip() for name in ("comm", "wchan")))
            except OSError:
                continue
        return "\n".join((said, "threads, and what they wait for in the kernel:", *waits))

    def _start(self) -> None:
        # A fork server imports torch once; an import in each process would take longer than most tests.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = Path(tempfile.mkdtemp(prefix="bnkernels-processes-"))
        for rank in range(self.size):
            parent_end, child_end = context.Pipe()
            process = context.Process(
                target=_serve, args=(child_end, rank, self.size, self._backend, self._folder), daemon=True
            )
            process.start()
            child_end.close()
            self._workers.append((process, parent_end))


def _stacks_of(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}"


def _serve(pipe: Connection, rank: int, size: int, backend: str, folder: Path) -> None:
    stacks = open(_stacks_of(folder, rank), "w")  # noqa: SIM115 (open until the process ends)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    if fake_cuda.is_attached():
        fake_cuda.attach()
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, rank=rank, world_size=size, init_method=f"file://{folder}/store", timeout=timedelta(seconds=DEADLINE)
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = pickle.dumps((True, function(*arguments)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
