"""Runs the cases: checks the results, then takes interleaved samples for each direction and mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import cuda, machine, tolerance
from .cases import MAX_RING, Buffers, Case, make_buffers, make_ring, ring_length
from .providers import COMPILED, COPY, Provider, make_call, make_copy
from .results import Record, Run
from .sampling import Effort, Ring, Timer, cpu_timer, interleave

# A CPU ring holds more than this multiple of the last-level cache.
CPU_CACHE_MULTIPLE = 2
CPU_RING_LIMIT = 1 << 30
TOLERANCE_SEED = 12345


@dataclass(frozen=True)
class Plan:
    """What to run."""

    device: torch.device
    cases: Sequence[Case]
    directions: Sequence[str]
    providers: Sequence[str]
    modes: Sequence[str]  # ("cpu",), or modes of cuda.py
    effort: Effort
    compile_all: bool  # time the compiled provider in every direction, not only in the training step
    copy_bytes: int = cuda.COPY_BYTES
    max_ring: int = MAX_RING

    def takes_part(self, name: str, direction: str) -> bool:
        return name != COMPILED or direction == "step" or self.compile_all


def execute(
    plan: Plan,
    run: Run,
    progress: Callable[[Iterable[Case]], Iterable[Case]] = iter,
    finished: Callable[[Case], None] = lambda case: None,
) -> None:
    """Fills `run` with tolerance records and samples; calls finished() after every case.

    A case that raises, or whose result is wrong, is recorded in run.failed with the reason, and the next case runs.
    KeyboardInterrupt is propagated; `run` then holds what was measured before it.
    """
    try:
        _measure_copy(plan, run)
        for case in progress(plan.cases):
            _attempt(run, str(case), partial(_run_case, plan, case, run))
            finished(case)
        _measure_copy(plan, run)
    finally:
        if plan.device.type == "cuda":
            run.machine["gpu"]["state_at_end"] = machine.gpu_state()
        run.machine["load_average_at_end"] = machine.load_average()
        run.notes += _fallbacks(run.records)


def _attempt(run: Run, what: str, work: Callable[[], None]) -> None:
    try:
        work()
    except torch.OutOfMemoryError:
        run.notes.append(f"{what}: skipped, out of device memory")
    except tolerance.ToleranceError as error:
        run.tolerance += error.records
        run.failed.append(f"{what}: {error}")
    except Exception as error:  # e.g. a kernel fault or a compiler error: the other cases still run
        first_line = (str(error).strip().splitlines() or [""])[0]
        run.failed.append(f"{what}: {type(error).__name__}: {first_line}")


def _measure_copy(plan: Plan, run: Run) -> None:
    if plan.device.type == "cuda":

        def measure() -> None:
            run.device_copy += cuda.copy_bandwidth(plan.device, plan.copy_bytes)

        _attempt(run, "device copy", measure)


def _run_case(plan: Plan, case: Case, run: Run) -> None:
    if plan.device.type == "cuda":
        cuda.free_memory()  # of the previous case, whose results are unreachable now
    providers = {name: Provider.make(name, case, plan.device) for name in plan.providers}
    _check(plan, case, providers, run)
    for direction in plan.directions:
        for mode in plan.modes:
            run.records.append(_measure(plan, case, providers, direction, mode))
            if plan.device.type == "cuda":
                cuda.free_memory()


def _check(plan: Plan, case: Case, providers: dict[str, Provider], run: Run) -> None:
    """Checks each provider's results, in each kind of call to be timed, against the reference."""
    buffers = make_buffers(case, plan.device, TOLERANCE_SEED)
    for training in (True, False):
        directions = [name for name in plan.directions if (name != "eval") == training]
        chosen = {
            name: provider
            for name, provider in providers.items()
            if any(plan.takes_part(name, direction) for direction in directions)
        }
        if directions:
            run.tolerance += tolerance.check(case, chosen, buffers, training)


def _measure(plan: Plan, case: Case, providers: dict[str, Provider], direction: str, mode: str) -> Record:
    chosen = {name: one for name, one in providers.items() if plan.takes_part(name, direction)}
    on_gpu = plan.device.type == "cuda"
    length = _ring_length(plan, case, direction, mode)
    buffers = make_ring(case, plan.device, length)
    ring = Ring(length)
    timers: dict[str, Timer] = {}
    method: dict[str, str] = {}
    for name, make in _makers(chosen, direction, buffers):
        if not on_gpu:
            timers[name], method[name] = cpu_timer(make(), ring), "wall"
            continue
        timed = cuda.user_timer(make(), ring) if mode == "user" else cuda.graph_timer(make, ring, mode)
        timers[name], method[name] = timed.timer, timed.method if not timed.why else f"{timed.method}: {timed.why}"
    seconds = interleave(timers, plan.effort)
    return Record.of(case, direction, mode, method, seconds)


def _makers(
    providers: dict[str, Provider], direction: str, buffers: Sequence[Buffers]
) -> Iterator[tuple[str, Callable[[], Callable[[int], Any]]]]:
    """Each provider's name and a factory of its call; the copy of x comes last."""
    for name, provider in providers.items():

        def make(provider: Provider = provider) -> Callable[[int], Any]:
            return make_call(provider, direction, buffers)

        yield name, make
    yield COPY, lambda: make_copy(buffers)


def _ring_length(plan: Plan, case: Case, direction: str, mode: str) -> int:
    if plan.device.type == "cuda":
        if mode == "warm":
            return 1
        memory = int(torch.cuda.get_device_properties(plan.device).total_memory)
        # Outputs are part of the ring: each call of the graph has its own.
        per_call = case.floor_bytes(direction)
        length = ring_length(case, per_call, cuda.COLD_L2_MULTIPLE * cuda.l2_bytes(plan.device), memory // 16)
        return min(length, plan.max_ring)
    # Only inputs are part of the ring: outputs come from the allocator, which reuses freed memory, as in a program.
    per_call = case.tensor_bytes * (1 if direction in ("forward", "eval") else 2)
    length = ring_length(case, per_call, CPU_CACHE_MULTIPLE * machine.last_level_cache_bytes(), CPU_RING_LIMIT)
    return min(length, plan.max_ring)


def _fallbacks(records: Sequence[Record]) -> list[str]:
    """One note per reason why graph capture failed, with the number of cases."""
    reasons: dict[str, int] = {}
    for record in records:
        for name, method in record.method.items():
            if method.startswith("events"):
                reason = f"{name} was timed by events, not in a CUDA graph ({method.removeprefix('events: ')})"
                reasons[reason] = reasons.get(reason, 0) + 1
    return [f"{reason}: {count} cases" for reason, count in reasons.items()]
