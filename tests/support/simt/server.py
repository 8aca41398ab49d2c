"""run_kernels from Python: the launch sequences of csrc/cuda/launch on tensors, thread by thread on the host.

    server = Server("plain")
    run = server.call(inputs, How(block=64, splits=3, seeds=range(20)), channels_last=False)
    run.outputs.y, run.launches[0].read["x"]

Tensors are dense, and `channels_last` gives the order of their memory. `How` holds the plan and everything about the
execution that must not change a bit of the results.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from bnkernels.testing import Epilogue, Inputs, Outputs

from . import build
from .plans import Limits, Persistent, Plan

PLAIN = Epilogue()
SCHEDULES = ("seeded", "in_order", "reverse", "stall_one")


@dataclass(frozen=True)
class How:
    """How to run a sequence. For a field that is None the plan chooses."""

    block: int = 64
    splits: int = 1
    device: tuple[int, int] | None = None
    """Multiprocessors and threads per multiprocessor: plan_two_pass chooses block and splits."""
    persistent: Persistent | None = None
    """Use the persistent kernel with this plan, for the operations that have one."""
    limits: Limits | None = None
    """Use the path and the plan that plan_pass chooses for this device."""
    finalize_block: int | None = None
    grid: int | None = None
    """Upper limit of every grid."""
    seeds: range = field(default=range(1))
    schedule: str = "seeded"
    at_a_time: int = 0
    """Co-resident blocks; 0: all. (The persistent kernel always runs all.)"""
    co_resident: int | None = None
    """Co-resident blocks of the persistent kernel, fewer than all."""
    workspace: str | None = None
    """Name of the barrier workspace. The next call with the same name starts from the state that this one leaves."""
    last_blocks: int | None = None
    """Number of blocks that run, from the end of each grid; all others do nothing."""
    without: tuple[int | None, str] | None = None
    """A launch of the sequence, or None for all, and the barrier ("file:line") that it skips."""
    misaligned: Mapping[str, int] = field(default_factory=dict)
    """Offset of each tensor, by its name in problem.h, from a 16-byte boundary, in elements."""


@dataclass(frozen=True)
class Launch:
    """One launch and the bytes that it moved, by tensor, including "scratch"."""

    grid: int
    block: int
    switches: int
    barriers: tuple[str, ...]
    """The barriers that the launch reached, as "file:line"."""
    read: dict[str, int]
    written: dict[str, int]


@dataclass(frozen=True)
class Run:
    outputs: Outputs
    launches: list[Launch]
    plans: list[Plan]
    """The plan of each sequence, if `How.limits` is given."""
    results: dict[str, Tensor] = field(default_factory=dict)
    """All written tensors, by their names in problem.h."""


class Failure(AssertionError):
    """The engine ended a launch with a fault, a seed changed the results, or a sanitizer reported an error."""


class Process:
    """One process of run_kernels. It survives a fault or a difference; a sanitizer's report ends it."""

    def __init__(self, program: Path) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            build.command(program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | build.ENVIRONMENT,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.requests, self.answers = self._process.stdin, self._process.stdout

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process. Raises Failure if it does not exit cleanly: leaks are reported only then."""
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.answers.close()
        if self._process.wait() != 0:
            raise Failure(self.complaint())

    def kill(self) -> None:
        """Ends the process and ignores its reports."""
        self._process.kill()
        self._process.wait()

    def has_complained(self) -> bool:
        return os.fstat(self._stderr.fileno()).st_size > 0

    def complaint(self) -> str:
        """The stderr of the process, which has ended."""
        code = self._process.wait()
        self._stderr.seek(0)
        return f"exit code {code}\n" + self._stderr.read().decode(errors="replace")[:20_000]


class Server:
    """run_kernels in one build: a process for each element type, compiled and started on first use.

    A process that has died is restarted.
    """

    def __init__(self, name: str) -> None:
        """`name`: one of build.BUILDS."""
        self._name = name
        self._programs: dict[str, Path] = {}
        self._processes: dict[str, Process] = {}

    def _process(self, dtype: str) -> Process:
        if dtype not in self._programs:  # once, so that all tests of a run use one state of the sources
            self._programs[dtype] = build.program(f"run_kernels_{dtype}", self._name)
        if dtype not in self._processes or not self._processes[dtype].alive:
            self._processes[dtype] = Process(self._programs[dtype])
        return self._processes[dtype]

    def close(self) -> None:
        """Ends the processes. Raises Failure if one does not exit cleanly."""
        for process in self._processes.values():
            if process.alive:
                process.close()

    def kill(self) -> None:
        """Ends the processes and ignores their reports."""
        for process in self._processes.values():
            process.kill()

    def call(self, inputs: Inputs, how: How, *, channels_last: bool, epilogue: Epilogue = PLAIN) -> Run:
        """The forward that `inputs.training` selects, then the backward from what it saved.

        There is no backward for a residual addition: the kernels have none of their own for it.
        """
        forward = (self.forward_train if inputs.training else self.forward_eval)(
            inputs, how, channels_last=channels_last, epilogue=epilogue
        )
        if epilogue.residual is not None:
            return forward
        saved = forward.outputs
        assert saved.mean is not None and saved.invstd is not None
        relu = (forward.results["relu_low"], forward.results["relu_high"]) if epilogue.has_bounds else None
        backward = self.backward(inputs, saved.mean, saved.invstd, how, channels_last=channels_last, relu=relu)
        gradients = {name: getattr(backward.outputs, name) for name in _OUTPUT_NAMES.values()}
        return Run(
            replace(saved, **gradients),
            forward.launches + backward.launches,
            forward.plans + backward.plans,
            forward.results | backward.results,
        )

    def forward_train(self, inputs: Inputs, how: How, *, channels_last: bool, epilogue: Epilogue = PLAIN) -> Run:
        names = ("x", "weight", "bias")
        tensors: list[tuple[str, str, Tensor]] = [(n, "in", t) for n in names if (t := getattr(inputs, n)) is not None]
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if (tensor := getattr(inputs, name)) is not None:
                tensors.append((name, "inout", tensor))
        tensors += self._forward_tensors(inputs, epilogue)
        cumulative = inputs.momentum is None
        options = {"momentum": 0.0 if cumulative else inputs.momentum, "cumulative": int(cumulative), "eps": inputs.eps}
        options["relu"] = int(epilogue.relu)
        return self._run("forward_train", inputs.x, tensors, options, how, channels_last)

    def forward_eval(self, inputs: Inputs, how: How, *, channels_last: bool, epilogue: Epilogue = PLAIN) -> Run:
        names = ("x", "weight", "bias", "running_mean", "running_var")
        tensors: list[tuple[str, str, Tensor]] = [(n, "in", t) for n in names if (t := getattr(inputs, n)) is not None]
        tensors += self._forward_tensors(inputs, epilogue)
        options = {"eps": inputs.eps, "relu": int(epilogue.relu)}
        return self._run("forward_eval", inputs.x, tensors, options, how, channels_last)

    def backward(
        self,
        inputs: Inputs,
        mean: Tensor,
        invstd: Tensor,
        how: How,
        *,
        channels_last: bool,
        need: tuple[bool, bool, bool] = (True, True, True),
        relu: tuple[Tensor, Tensor] | None = None,
    ) -> Run:
        """`need`: the gradients of x, weight and bias. `relu`: relu_low and relu_high of a ReLU that follows."""
        tensors = [("grad_y", "in", inputs.grad), ("x", "in", inputs.x), ("mean", "in", mean), ("invstd", "in", invstd)]
        if inputs.weight is not None:
            tensors.append(("weight", "in", inputs.weight))
        if relu is not None:
            tensors += [("relu_low", "in", relu[0]), ("relu_high", "in", relu[1])]
        vector = inputs.weight if inputs.weight is not None else mean
        for name, like, needed in zip(("grad_x", "grad_weight", "grad_bias"), (inputs.x, vector, vector), need):
            if needed:
                tensors.append((name, "out", torch.empty_like(like)))
        return self._run("backward", inputs.x, tensors, {"training": int(inputs.training)}, how, channels_last)

    def plan(self, operation: str, problem: tuple[int, int, int], dtype: str, limits: Limits) -> Plan:
        """plan_pass for an aligned tensor: outer, channels, inner. No kernel runs."""
        outer, channels, inner = problem
        settings = {"outer": outer, "channels": channels, "inner": inner, "dtype": dtype, "training": 1, "only_plan": 1}
        (plan,) = self._request(operation, settings, [], How(limits=limits), False).plans
        return plan

    def run_tails(
        self,
        operation: str,
        problem: tuple[int, int, int],
        tails: Mapping[str, tuple[str, Tensor]],
        how: How,
        **options: float,
    ) -> Run:
        """Runs a sequence on tensors larger than memory. They are zero except for their ends, which `tails` gives by
        name, with a mode.

        `problem`: outer, channels, inner. Use with `how.last_blocks`; returns the ends.
        """
        outer, channels, inner = problem
        x = tails["x"][1]
        sent = []
        for name, (mode, tail) in tails.items():
            whole = channels if name in _PER_CHANNEL else outer * channels * inner
            here = min(whole, tail.numel())
            size = tail.element_size()
            sent.append((name, mode, tail[-here:], whole * size, here * size))
        settings = {"outer": outer, "channels": channels, "inner": inner, "dtype": _name(x), **options}
        return self._request(operation, settings, sent, how, False)

    def step(
        self,
        operation: str,
        x: Tensor,
        tensors: list[tuple[str, str, Tensor]],
        options: Mapping[str, object],
        how: How,
        *,
        channels_last: bool,
    ) -> Run:
        """Runs a step of sync_steps.h, with its tensors by name and mode. `x` gives the problem's sizes."""
        return self._run(operation, x, tensors, options, how, channels_last)

    @staticmethod
    def _forward_tensors(inputs: Inputs, epilogue: Epilogue) -> list[tuple[str, str, Tensor]]:
        """The residual and the outputs, except for the running statistics."""
        saved = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
        names = ("mean", "invstd", "relu_low", "relu_high") if epilogue.has_bounds else ("mean", "invstd")
        vectors = [(name, "out", torch.empty(inputs.x.shape[1], dtype=saved)) for name in names]
        added = [] if epilogue.residual is None else [("residual", "in", epilogue.residual)]
        return [*added, ("y", "out", torch.empty_like(inputs.x)), *vectors]

    def _run(
        self,
        operation: str,
        x: Tensor,
        tensors: list[tuple[str, str, Tensor]],
        options: Mapping[str, object],
        how: How,
        channels_last: bool,
    ) -> Run:
        channels = x.shape[1]
        outer, inner = (x.numel() // channels, 1) if channels_last else (x.shape[0], math.prod(x.shape[2:]))
        settings: dict[str, object] = {
            "outer": outer,
            "channels": channels,
            "inner": inner,
            "dtype": _name(x),
            **options,
        }
        sent = [(name, mode, t, t.numel() * t.element_size(), 0) for name, mode, t in tensors]
        return self._request(operation, settings, sent, how, channels_last)

    def _request(
        self,
        operation: str,
        settings: dict[str, object],
        tensors: list[tuple[str, str, Tensor, int, int]],
        how: How,
        channels_last: bool,
    ) -> Run:
        """`tensors`: name, mode, content, total bytes, and the number of bytes at the end that the content covers (0:
        dense)."""
        process = self._process(str(settings["dtype"]))
        settings |= {
            "schedule": how.schedule,
            "first_seed": how.seeds.start,
            "seeds": len(how.seeds),
            "at_a_time": how.at_a_time,
        }
        if how.limits is not None:
            settings["limits"] = ",".join(str(int(value)) for value in astuple(how.limits))
        elif how.persistent is not None:
            settings |= {key: int(v) if isinstance(v, bool) else v for key, v in asdict(how.persistent).items()}
        elif how.device is not None:
            settings |= {"multiprocessors": how.device[0], "threads": how.device[1]}
        else:
            settings |= {"block": how.block, "splits": how.splits}
        for key in ("finalize_block", "grid", "last_blocks", "co_resident", "workspace"):
            if (value := getattr(how, key)) is not None:
                settings[key] = value
        if how.without is not None:
            launch, barrier = how.without
            settings["without"] = f"{'all' if launch is None else launch}:{barrier}"
        words = [operation, *(f"{key}={value}" for key, value in settings.items())]
        for name, mode, tensor, size, tail in tensors:
            shift = how.misaligned.get(name, 0) * tensor.element_size()
            words.append(f"tensor={name}:{mode}:{_name(tensor)}:{size}:{shift}:{tail}")
        content = [_to_bytes(tensor, channels_last) for _, mode, tensor, *_ in tensors if mode != "out"]
        try:
            process.requests.write(b"".join([" ".join(words).encode() + b"\n", *content]))
            process.requests.flush()
        except BrokenPipeError:
            raise Failure(process.complaint()) from None
        run = self._answer(process, [(name, t) for name, mode, t, *_ in tensors if mode != "in"], channels_last)
        # ThreadSanitizer reports and continues.
        if process.has_complained():
            process.kill()
            raise Failure(process.complaint())
        return run

    @staticmethod
    def _answer(process: Process, results: list[tuple[str, Tensor]], channels_last: bool) -> Run:
        launches, plans = [], []
        while (line := process.answers.readline().decode().strip()) != "done":
            kind, _, rest = line.partition(" ")
            if kind == "plan":
                plans.append(Plan.parse(rest))
                continue
            if kind != "launch":
                # After a fault the sanitizers may have more to report.
                if line and not process.has_complained():
                    raise Failure(line.replace("|", "\n"))
                if line:
                    process.kill()
                raise Failure("\n".join(filter(None, [line.replace("|", "\n"), process.complaint()])))
            grid, block, switches, barriers, *traffic = rest.split()
            moved = [entry.split(":") for entry in traffic]
            read = {name: int(count) for name, count, _ in moved}
            written = {name: int(count) for name, _, count in moved}
            met = tuple(barriers.split(",")[:-1])
            launches.append(Launch(int(grid), int(block), int(switches), met, read, written))
        written = {}
        for name, like in results:
            data = process.answers.read(like.numel() * like.element_size())
            written[name] = _from_bytes(data, like, channels_last)
        named = {_OUTPUT_NAMES.get(name, name): tensor for name, tensor in written.items()}
        known = {name.name for name in fields(Outputs)}
        outputs = Outputs(**{name: tensor for name, tensor in named.items() if name in known})
        return Run(outputs, launches, plans, written)


_PER_CHANNEL = {"weight", "bias", "running_mean", "running_var", "mean", "invstd"}
_OUTPUT_NAMES = {"grad_x": "dx", "grad_weight": "dweight", "grad_bias": "dbias"}


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _to_bytes(tensor: Tensor, channels_last: bool) -> bytes:
    if channels_last and tensor.dim() > 1:
        tensor = tensor.movedim(1, -1)
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _from_bytes(data: bytes, like: Tensor, channels_last: bool) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=like.dtype)
    if not channels_last or like.dim() <= 1:
        return flat.reshape(like.shape)
    return flat.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
