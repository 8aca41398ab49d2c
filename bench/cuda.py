"""GPU timers: CUDA graphs of the calls with L2 cold or warm, and the bandwidth of a device copy.

A CUDA graph replays the kernels without Python or dispatch in between: the time measured is that of the GPU.
  cold   the graph holds one call on each buffer of a ring larger than 5 times L2, each output in separate memory:
         L2 holds nothing of a call from an earlier one
  warm   the graph holds calls on one buffer, all outputs in the same memory: tensors that fit stay in L2
  user   no graph: successive module calls from Python, then a synchronization; measures the overhead of small calls
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .sampling import Ring, Timer

MODES = ("cold", "warm", "user")

COLD_L2_MULTIPLE = 5
WARM_CALLS = 8
WARMUP_CALLS = 3
COPY_BYTES = 1 << 30
COPY_SAMPLES = 15
COPY_REPEATS = 4  # copies per sample

Call = Callable[[int], object]


@dataclass(frozen=True)
class GpuTimer:
    """A Timer and its method: "graph", "events" (graph capture failed for the reason in `why`) or "wall"."""

    timer: Timer
    method: str
    why: str = ""


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _elapsed(work: Callable[[], object], repeats: int, stream: torch.cuda.Stream) -> float:
    """Device seconds of `repeats` calls of `work` on `stream`."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        start.record(stream)
        for _ in range(repeats):
            work()
        end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _capture(call: Call, indices: list[int], stream: torch.cuda.Stream, distinct_outputs: bool) -> torch.cuda.CUDAGraph:
    """A graph of call(i) for the indices; with distinct_outputs every result has separate memory."""
    graph = torch.cuda.CUDAGraph()
    outputs: list[object] = []
    with torch.cuda.graph(graph, stream=stream):
        for index in indices:
            made = call(index)
            if distinct_outputs:
                outputs.append(made)
    return graph


def graph_timer(make_call: Callable[[], Call], ring: Ring, mode: str) -> GpuTimer:
    """A timer of the call in mode "cold" or "warm". `make_call` runs on the stream that the graph is captured on.

    The unit is one call: a request for n calls replays the graph until at least n have run, and is scaled to n.
    """
    stream = torch.cuda.Stream()
    indices = list(range(ring.length)) if mode == "cold" else [0] * WARM_CALLS
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Autograd runs a backward on the stream of its forward, so make_call runs its forwards on this stream.
        call = make_call()
        for _ in range(WARMUP_CALLS):
            call(0)
    torch.cuda.synchronize()

    why = ""
    try:
        graph = _capture(call, indices, stream, distinct_outputs=mode == "cold")
        work: Callable[[], object] = graph.replay
    except RuntimeError as error:
        why = (str(error).strip().splitlines() or ["unknown error"])[0]
        torch.cuda.synchronize()

        def work() -> None:
            for index in indices:
                call(index)

    def timer(count: int) -> float:
        repeats = max(1, round(count / len(indices)))
        return _elapsed(work, repeats, stream) * count / (repeats * len(indices))

    return GpuTimer(timer, "events" if why else "graph", why)


def user_timer(call: Call, ring: Ring) -> GpuTimer:
    """A timer of calls from Python, with a synchronization before and after."""

    def timer(count: int) -> float:
        indices = ring.take(count)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in indices:
            call(index)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return GpuTimer(timer, "wall")


def copy_bandwidth(device: torch.device, bytes: int = COPY_BYTES) -> list[float]:
    """Bytes/s, read plus written, of a device-to-device copy: samples timed by events, after a warm-up.

    The reference that achieved floor bytes/s are compared with.
    """
    samples = _copy_samples(device, bytes)
    free_memory()
    return samples


def _copy_samples(device: torch.device, bytes: int) -> list[float]:
    source = torch.empty(bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    stream = torch.cuda.current_stream()
    _elapsed(lambda: target.copy_(source), WARMUP_CALLS, stream)
    return [
        2 * bytes * COPY_REPEATS / _elapsed(lambda: target.copy_(source), COPY_REPEATS, stream)
        for _ in range(COPY_SAMPLES)
    ]


def free_memory() -> None:
    """Frees the graphs' memory pools, so that the next case starts with an empty device."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
