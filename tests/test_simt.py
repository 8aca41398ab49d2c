"""The CUDA kernels and their launch sequences, run thread by thread on the host (tests/simt), against the reference.

Every variant runs under 20 seeds with the same bits, plain, under AddressSanitizer and UBSan, and under
ThreadSanitizer; then, plain, over block and grid sizes, alignments, tails, adversarial values and what a call may leave
out; and the bytes that each launch moves are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from simt import build
from simt.server import SCHEDULES, Failure, How, Launch, Run, Server

from bnkernels.testing import DTYPE_PAIRS, DTYPES, Case, Inputs, assert_within, cases, judge_call, same_bits

BUILDS = ("plain", "asan", "tsan")
SEEDS = range(20)
LAYOUTS = ("channels_first", "channels_last")
PAIRS = [pytest.param(pair, id="+".join(dict.fromkeys(pair))) for pair in DTYPE_PAIRS]

FORWARD = ("x", "y", "weight", "bias", "mean", "invstd", "running_mean", "running_var", "num_batches_tracked")
BACKWARD = ("x", "grad_y", "grad_x", "weight", "mean", "invstd", "grad_weight", "grad_bias")


class Servers:
    """One server for each build, made when first asked for, and anew after one has died."""

    def __init__(self) -> None:
        # Compiled once: what all tests of a run see is one state of the sources.
        self._programs = build.programs(("run_kernels", name) for name in BUILDS)
        self._running: dict[str, Server] = {}

    def __call__(self, name: str) -> Server:
        if name not in self._running or not self._running[name].alive:
            self._running[name] = Server(self._programs["run_kernels", name])
        return self._running[name]

    def close(self) -> None:
        for server in self._running.values():
            if server.alive:
                server.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


@pytest.fixture
def plain(servers: Servers) -> Server:
    return servers("plain")


def make(shape: tuple[int, ...], pair: tuple[str, str], training: bool = True, weight: str = "normal") -> Inputs:
    return Case("offset_1e2", shape, *pair, weight=weight, training=training).inputs()


def judge(inputs: Inputs, run: Run, context: object) -> None:
    assert_within(judge_call(inputs, run.outputs), str(context))


def assert_same(run: Run, other: Run, context: object, but: tuple[str, ...] = ()) -> None:
    different = [
        field.name
        for field in fields(run.outputs)
        if field.name not in but and not same_bits(getattr(run.outputs, field.name), getattr(other.outputs, field.name))
    ]
    assert not different, (different, context)


# Rows that start anywhere, with heads and tails, in blocks that hold several of them; and rows of whole vectors.
FIRST = ((3, 5, 37), (2, 3, 8, 8))
# Channels that are no whole vectors, over more than one slab of lanes; and whole vectors.
LAST = ((5, 69, 3), (37, 16))


# --- every variant, 20 seeds, three builds ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_seeds_change_no_bit(servers: Servers, pair: tuple[str, str], layout: str, training: bool, name: str) -> None:
    """The order of threads, blocks and waves decides nothing, no access is out of bounds, and no two race."""
    for shape in FIRST if layout == "channels_first" else LAST:
        inputs = make(shape, pair, training)
        # Fewer blocks than shares: each takes several, and uses its shared memory again.
        how = How(block=64, chunks=2, finish_block=64, grid=2, seeds=SEEDS)
        run = servers(name).call(inputs, how, channels_last=layout == "channels_last")
        judge(inputs, run, (shape, pair))


# --- every barrier is needed -----------------------------------------------------------------------------------------


def unkept(server: Server, inputs: Inputs, how: How, last: bool, launch: int) -> Run:
    """The forward, or the backward, with one launch of it changed by how.without."""
    sound = server.call(inputs, replace(how, without=None, seeds=range(1)), channels_last=last)
    if launch < 3:
        return server.forward_train(inputs, how, channels_last=last)
    mean, invstd = sound.outputs.mean, sound.outputs.invstd
    assert mean is not None and invstd is not None and how.without is not None
    how = replace(how, without=(launch - 3, how.without[1]))
    return server.backward(inputs, mean, invstd, how, channels_last=last)


@pytest.mark.parametrize("name", ["plain", "tsan"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS[:2] + PAIRS[-1:])
def test_every_barrier_is_missed(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    """In every kernel, each of its barriers: without it some seed changes a bit, or NaN comes out of shared memory; and
    ThreadSanitizer names the race, whatever the seed."""
    last = layout == "channels_last"
    # Every block has several shares, or groups of channels, one after the other, and work for each of its warps.
    inputs = make((2, 69, 301), pair)
    how = How(block=64, chunks=5 if last else 2, finish_block=64, grid=2, seeds=range(1 if name == "tsan" else 40))
    met = [launch.barriers for launch in servers(name).call(inputs, how, channels_last=last).launches]
    assert [len(barriers) for barriers in met] == [2, 2, 0, 2, 2, 0]
    for launch, barriers in enumerate(met):
        for barrier in barriers:
            without = replace(how, without=(launch, barrier))
            if name == "tsan":
                with pytest.raises(Failure, match="ThreadSanitizer: data race"):
                    unkept(servers(name), inputs, without, last, launch)
            else:
                with pytest.raises(AssertionError, match=r"differs|beyond the gate"):
                    judge(inputs, unkept(servers(name), inputs, without, last, launch), barrier)


# --- how it is run decides nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_grids_residency_and_schedules_change_no_bit(plain: Server, pair: tuple[str, str], layout: str) -> None:
    last = layout == "channels_last"
    for shape in FIRST if not last else LAST:
        inputs = make(shape, pair)
        how = How(block=64, chunks=3, finish_block=64)
        first = plain.call(inputs, how, channels_last=last)
        judge(inputs, first, (shape, how))
        for schedule in SCHEDULES:
            for grid, resident in ((None, 0), (1, 0), (2, 0), (3, 2), (None, 1)):
                other = replace(how, schedule=schedule, grid=grid, resident=resident, seeds=range(2))
                assert_same(first, plain.call(inputs, other, channels_last=last), (shape, other))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_blocks_and_chunks(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """Down to one warp, and to more chunks than there is work; each plan's results are its own, and within the gate."""
    last = layout == "channels_last"
    for shape in FIRST if not last else LAST:
        for training in (True, False):
            inputs = make(shape, pair, training)
            for block in (32, 64, 96, 256):
                for chunks in (1, 2, 7, 1000):
                    how = How(block=block, chunks=chunks, finish_block=32 if chunks == 2 else 256, grid=5)
                    judge(inputs, plain.call(inputs, how, channels_last=last), (shape, how))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_plans_for_devices(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """plan_streaming's own choices, from a device with one multiprocessor to one with many."""
    last = layout == "channels_last"
    inputs = make((4, 19, 23, 23), pair)
    for device in ((1, 1024), (16, 1536), (132, 2048)):
        how = How(device=device, resident=8)
        judge(inputs, plain.call(inputs, how, channels_last=last), how)


# --- where tensors lie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_alignments(plain: Server, pair: tuple[str, str], layout: str) -> None:
    """Each tensor at every distance from a vector boundary, alone and with all others at distances of their own."""
    last = layout == "channels_last"
    elements = 16 // DTYPES[pair[0]].itemsize
    for shape in FIRST if not last else LAST:
        inputs = make(shape, pair)
        how = How(block=64, chunks=2, seeds=range(2))
        aligned = plain.call(inputs, how, channels_last=last)
        for shift in range(1, elements):
            for tensor in dict.fromkeys(FORWARD + BACKWARD):
                other = replace(how, misaligned={tensor: shift})
                run = plain.call(inputs, other, channels_last=last)
                judge(inputs, run, (shape, other))
                # x leads: its alignment cuts rows into other windows, and sums are then taken in another order.
                if tensor != "x":
                    assert_same(aligned, run, other)
            together = {
                tensor: (shift * (i + 1)) % elements for i, tensor in enumerate(dict.fromkeys(FORWARD + BACKWARD))
            }
            for misaligned in (together, dict.fromkeys(together, shift)):
                other = replace(how, misaligned=misaligned)
                judge(inputs, plain.call(inputs, other, channels_last=last), (shape, other))


@pytest.mark.parametrize("name", ["asan", "tsan"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_alignments_under_sanitizers(servers: Servers, pair: tuple[str, str], layout: str, name: str) -> None:
    last = layout == "channels_last"
    elements = 16 // DTYPES[pair[0]].itemsize
    inputs = make(FIRST[0] if not last else LAST[0], pair)
    for shift in range(1, elements):
        misaligned = {
            tensor: (shift * (i + 1)) % elements for i, tensor in enumerate(dict.fromkeys(FORWARD + BACKWARD))
        }
        how = How(block=32, chunks=2, finish_block=32, grid=3, misaligned=misaligned)
        judge(inputs, servers(name).call(inputs, how, channels_last=last), how)


@pytest.mark.parametrize("pair", PAIRS)
def test_tails(plain: Server, pair: tuple[str, str]) -> None:
    """Rows, or channels, of every length from one to beyond two vectors."""
    elements = 16 // DTYPES[pair[0]].itemsize
    for length in range(1, 2 * elements + 2):
        for shift in {0, 1, elements - 1}:
            how = How(block=32, chunks=2, misaligned={"x": shift, "y": shift, "grad_y": shift})
            inputs = make((3, 2, length), pair)
            if length > 1:
                judge(inputs, plain.call(inputs, how, channels_last=False), (length, how))
            inputs = make((5, length), pair)
            judge(inputs, plain.call(inputs, how, channels_last=True), (length, how))


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_adversarial_cases(plain: Server, pair: tuple[str, str]) -> None:
    """The quick grid of bnkernels.testing: every family of values, gradient and weight."""
    count = 0
    for case in cases("quick"):
        if (case.dtype, case.parameters) != pair or math.prod(case.shape) > 50_000:
            continue
        last = len(case.shape) == 2 or case.layout.startswith("channels_last")
        inputs = case.inputs()
        judge(inputs, plain.call(inputs, How(device=(3, 512), resident=8), channels_last=last), case)
        count += 1
    assert count > 50


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_may_be_missing(plain: Server, training: bool, layout: str) -> None:
    last = layout == "channels_last"
    pair = ("bfloat16", "float32")
    how = How(block=32, chunks=2)
    shape = FIRST[0] if not last else LAST[0]
    for weight in ("none", "weight_only", "bias_only"):
        inputs = make(shape, pair, training, weight)
        judge(inputs, plain.call(inputs, how, channels_last=last), weight)
    full = make(shape, pair, training)
    if training:
        for missing in ("running_mean", "running_var", "num_batches_tracked"):
            inputs = replace(full, **{missing: None})
            judge(inputs, plain.call(inputs, how, channels_last=last), missing)
    run = plain.call(full, how, channels_last=last)
    mean, invstd = run.outputs.mean, run.outputs.invstd
    assert mean is not None and invstd is not None
    for need in ((x, w, b) for x in (True, False) for w in (True, False) for b in (True, False)):
        part = plain.backward(full, mean, invstd, how, channels_last=last, need=need)
        given = [getattr(part.outputs, name) is not None for name in ("dx", "dweight", "dbias")]
        assert given == list(need)
        but = [name for name, needed in zip(("dx", "dweight", "dbias"), need) if not needed]
        forward = [field.name for field in fields(run.outputs) if field.name not in ("dx", "dweight", "dbias")]
        assert_same(run, part, need, but=(*but, *forward))
        if not any(need):
            assert part.launches == []


@pytest.mark.parametrize("counted", [1, 4, 10_000])
def test_cumulative_average(plain: Server, counted: int) -> None:
    inputs = make((3, 70, 5), ("float16", "float32"))
    inputs = replace(inputs, momentum=None, num_batches_tracked=torch.tensor(counted))
    # Several finishing blocks: all must see the same count.
    how = How(block=32, chunks=3, finish_block=32, grid=8, seeds=SEEDS)
    judge(inputs, plain.call(inputs, how, channels_last=False), counted)


# --- the bytes that move ---------------------------------------------------------------------------------------------


def requested(inputs: Inputs, last: bool, lead: int, own: int) -> int:
    """Bytes that one pass asks of a tensor like x that lies `own` elements past a boundary, x lying `lead` past one.

    Channels-last, and rows of whole vectors: each byte once. A row that starts or ends inside a vector takes that
    vector whole, where it lies inside the tensor, and so does its neighbour: the same memory sector, asked for twice.
    """
    size = inputs.x.element_size()
    total = inputs.x.numel()
    if last or own != lead:
        return total * size
    vector = 16 // size
    inner = math.prod(inputs.x.shape[2:])
    asked = 0
    for start in range(0, total, inner):
        window = start - (lead + start) % vector
        while window < start + inner:
            whole = window >= 0 and window + vector <= total
            asked += vector if whole else min(window + vector, start + inner) - max(window, start)
            window += vector
    return asked * size


def moved(launch: Launch, but: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """Bytes read and written, of the tensors with any."""
    names = [name for name in launch.read if name not in but and (launch.read[name] or launch.written[name])]
    return {name: (launch.read[name], launch.written[name]) for name in names}


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_bytes(plain: Server, pair: tuple[str, str], layout: str, lead: int) -> None:
    """Forward: x read twice, y written once. Backward: x and grad_y read twice, grad_x written once. Inference: x read
    once, y written once; grad_y twice and x once, or, for grad_x alone, grad_y once and x never. Partials: once."""
    last = layout == "channels_last"
    for shape in FIRST if not last else LAST:
        inputs = make(shape, pair)
        channels, chunks = shape[1], 2
        block = 32
        how = How(block=block, chunks=chunks, misaligned={"x": lead})
        all_of_x = inputs.x.numel() * inputs.x.element_size()
        x = requested(inputs, last, lead, lead)
        g = requested(inputs, last, lead, 0)
        if last or (math.prod(shape[2:]) * inputs.x.element_size() % 16 == 0 and lead == 0):
            assert x == g == all_of_x
        parameters = channels * DTYPES[pair[1]].itemsize
        saved = channels * (8 if pair[0] == "float64" else 4)
        vectors = ("weight", "bias", "mean", "invstd", "running_mean", "running_var", "scratch")

        run = plain.call(inputs, how, channels_last=last)
        statistics, finish, normalize, sums, finish_sums, grad_input = run.launches
        # The plan may make fewer chunks than asked for, never more.
        partials = statistics.written["scratch"]
        assert partials % (24 * channels) == 0 and 0 < partials <= 24 * channels * chunks
        assert moved(statistics) == {"x": (x, 0), "num_batches_tracked": (8, 8), "scratch": (0, partials)}
        assert moved(finish) == {
            "scratch": (partials, 0),
            "mean": (0, saved),
            "invstd": (0, saved),
            "running_mean": (parameters, parameters),
            "running_var": (parameters, parameters),
        }
        assert moved(normalize, but=vectors) == {"x": (x, 0), "y": (0, all_of_x)}
        assert moved(sums, but=("mean", "invstd")) == {"grad_y": (g, 0), "x": (x, 0), "scratch": (0, partials * 2 // 3)}
        assert moved(finish_sums) == {
            "scratch": (partials * 2 // 3, 16 * channels),
            "grad_weight": (0, parameters),
            "grad_bias": (0, parameters),
        }
        assert moved(grad_input, but=vectors) == {"grad_y": (g, 0), "x": (x, 0), "grad_x": (0, all_of_x)}
        # What is read per channel is read once by each thread for each of its shares, not once per element.
        for launch in (normalize, sums, grad_input):
            columns = 16 // inputs.x.element_size() if last else 1
            for name in ("weight", "bias", "mean", "invstd"):
                itemsize = (parameters if name in ("weight", "bias") else saved) // channels
                assert launch.read.get(name, 0) <= launch.grid * block * columns * itemsize

        inputs = make(shape, pair, training=False)
        run = plain.call(inputs, how, channels_last=last)
        normalize, sums, finish_sums, grad_input = run.launches
        but = tuple(name for name in vectors if name not in ("mean", "invstd"))
        assert moved(normalize, but) == {"x": (x, 0), "y": (0, all_of_x), "mean": (0, saved), "invstd": (0, saved)}
        assert moved(grad_input, vectors) == {"grad_y": (g, 0), "grad_x": (0, all_of_x)}
        mean, invstd = run.outputs.mean, run.outputs.invstd
        assert mean is not None and invstd is not None
        (only,) = plain.backward(inputs, mean, invstd, how, channels_last=last, need=(True, False, False)).launches
        assert moved(only, vectors) == moved(grad_input, vectors)


# --- beyond 32 bits --------------------------------------------------------------------------------------------------

# Outer, channels, inner of over 2^32 elements, or 2^31 channels, and the chunks that make the last ones small.
HUGE = (
    ((1_500_007, 3, 1003), 400_000),  # many short rows of odd length
    ((3, 1_500_007, 1003), 100),  # many channels
    ((2, 1, 2**32 + 77), 1 << 20),  # rows longer than 2^32
    ((1, 2**31 + 11, 2), 2),  # more channels than a grid has blocks
    ((2**32 + 5, 1, 1), 1 << 23),  # channels-last, one channel
    ((70_000_001, 64, 1), 1 << 17),  # whole vectors
    ((2, 2**31 + 24, 1), 2),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("problem, chunks", HUGE)
def test_huge_tensors_at_their_ends(
    plain: Server, problem: tuple[int, int, int], chunks: int, dtype: torch.dtype
) -> None:
    """The last blocks of an inference and of its gradient, on tensors that take memory only where they are touched."""
    outer, channels, inner = problem
    total = outer * channels * inner
    x, grad = torch.randn(2, min(total, 200_000)).to(dtype)
    weight, bias, running_mean, running_var = torch.rand(4, min(channels, 2000)) + 1
    saved = torch.zeros(len(bias))
    how = How(block=64, chunks=chunks, last_blocks=3)
    vectors = {"weight": ("in", weight), "bias": ("in", bias)}
    vectors |= {"running_mean": ("in", running_mean), "running_var": ("in", running_var)}
    outputs = {"y": ("out", x), "mean": ("out", saved), "invstd": ("out", saved)}
    forward = plain.run_tails("forward_eval", problem, {"x": ("in", x), **vectors, **outputs}, how, eps=1e-5)
    invstd = (running_var + 1e-5).rsqrt()
    tensors = {"x": ("in", x), "grad_y": ("in", grad), "grad_x": ("out", x), "weight": ("in", weight)}
    tensors |= {"mean": ("in", running_mean), "invstd": ("in", invstd)}
    backward = plain.run_tails("backward", problem, tensors, how, training=0)

    position = torch.arange(total - len(x), total)
    channel = position // inner % channels - (channels - len(bias))
    known = channel >= 0
    channel = channel.clamp(min=0)
    y = (x - running_mean[channel]) * invstd[channel] * weight[channel] + bias[channel]
    dx = grad * weight[channel] * invstd[channel]
    for run, got, want, name in ((forward, forward.outputs.y, y, "y"), (backward, backward.outputs.dx, dx, "grad_x")):
        assert got is not None
        written = got != 0
        # All that was written, which is every share's worth, lies in the end, where it belongs, and is right.
        assert int(written.sum()) * got.element_size() == run.launches[0].written[name] > 0
        assert bool(known[written].all())
        error = (got.double() - want.double()).abs()
        assert bool((error <= torch.finfo(dtype).eps * want.abs() + 1e-5)[written].all())


# --- the server itself -----------------------------------------------------------------------------------------------


def test_too_small_a_tensor_is_a_fault(plain: Server) -> None:
    """What run_kernels reports reaches the test: here a weight vector that is one short."""
    inputs = make(FIRST[0], ("float32", "float32"))
    assert inputs.weight is not None
    short = replace(inputs, weight=inputs.weight[:-1].clone())
    with pytest.raises(Failure, match=r"out of bounds: read of 4 bytes at byte 16 of 'weight', which has 16; .*\.cuh:"):
        plain.call(short, How(), channels_last=False)
    judge(inputs, plain.call(inputs, How(), channels_last=False), "the server goes on")
