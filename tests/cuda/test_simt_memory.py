"""The kernels on the host: the bytes that each launch moves, and the ends of huge tensors."""

from __future__ import annotations

import math

import pytest
import torch
from simt.common import FIRST, LAST, LAYOUTS, PAIRS, make, requested
from simt.server import How, Launch, Server

from bnkernels.testing import DTYPES

pytest_plugins = ["simt.fixtures"]

# --- bytes moved -----------------------------------------------------------------------------------------------------


def moved(launch: Launch, but: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """Bytes read and written of each tensor that moves any."""
    names = [name for name in launch.read if name not in but and (launch.read[name] or launch.written[name])]
    return {name: (launch.read[name], launch.written[name]) for name in names}


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_bytes(plain: Server, pair: tuple[str, str], layout: str, lead: int) -> None:
    """Forward: x read twice, y written once. Backward: x and grad_y read twice, grad_x written once. Inference forward:
    x read once, y written once. Inference backward: grad_y read twice and x once; for grad_x alone, grad_y once and
    x never. Partials: once."""
    last = layout == "channels_last"
    for shape in FIRST if not last else LAST:
        inputs = make(shape, pair)
        channels, splits = shape[1], 2
        block = 32
        how = How(block=block, splits=splits, misaligned={"x": lead})
        all_of_x = inputs.x.numel() * inputs.x.element_size()
        x = requested(inputs, last, lead, lead)
        g = requested(inputs, last, lead, 0)
        if last or (math.prod(shape[2:]) * inputs.x.element_size() % 16 == 0 and lead == 0):
            assert x == g == all_of_x
        parameters = channels * DTYPES[pair[1]].itemsize
        saved = channels * (8 if pair[0] == "float64" else 4)
        vectors = ("weight", "bias", "mean", "invstd", "running_mean", "running_var", "scratch")

        run = plain.call(inputs, how, channels_last=last)
        statistics, finish, normalize, sums, finalize_sums, grad_input = run.launches
        # The plan may make fewer splits than requested, never more.
        partials = statistics.written["scratch"]
        assert partials % (24 * channels) == 0 and 0 < partials <= 24 * channels * splits
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
        assert moved(finalize_sums) == {
            "scratch": (partials * 2 // 3, 16 * channels),
            "grad_weight": (0, parameters),
            "grad_bias": (0, parameters),
        }
        assert moved(grad_input, but=vectors) == {"grad_y": (g, 0), "x": (x, 0), "grad_x": (0, all_of_x)}
        # Each thread reads per-channel values once for each of its work tiles, not once per element.
        for launch in (normalize, sums, grad_input):
            columns = 16 // inputs.x.element_size() if last else 1
            for name in ("weight", "bias", "mean", "invstd"):
                itemsize = (parameters if name in ("weight", "bias") else saved) // channels
                assert launch.read.get(name, 0) <= launch.grid * block * columns * itemsize

        inputs = make(shape, pair, training=False)
        run = plain.call(inputs, how, channels_last=last)
        normalize, sums, finalize_sums, grad_input = run.launches
        but = tuple(name for name in vectors if name not in ("mean", "invstd"))
        assert moved(normalize, but) == {"x": (x, 0), "y": (0, all_of_x), "mean": (0, saved), "invstd": (0, saved)}
        assert moved(grad_input, vectors) == {"grad_y": (g, 0), "grad_x": (0, all_of_x)}
        mean, invstd = run.outputs.mean, run.outputs.invstd
        assert mean is not None and invstd is not None
        (only,) = plain.backward(inputs, mean, invstd, how, channels_last=last, need=(True, False, False)).launches
        assert moved(only, vectors) == moved(grad_input, vectors)


# --- beyond 32 bits --------------------------------------------------------------------------------------------------

# Outer, channels, inner of more than 2^32 elements, or 2^31 channels, and the number of splits that makes the last ones
# small.
HUGE = (
    ((1_500_007, 3, 1003), 400_000),  # many short rows of odd length
    ((3, 1_500_007, 1003), 100),  # many channels
    ((2, 1, 2**32 + 77), 1 << 20),  # rows longer than 2^32
    ((1, 2**31 + 11, 2), 2),  # more channels than the maximum grid size
    ((2**32 + 5, 1, 1), 1 << 23),  # channels-last, one channel
    ((70_000_001, 64, 1), 1 << 17),  # full vectors
    ((2, 2**31 + 24, 1), 2),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("problem, splits", HUGE)
def test_huge_tensors_at_their_ends(
    plain: Server, problem: tuple[int, int, int], splits: int, dtype: torch.dtype
) -> None:
    """Runs the last blocks of an inference forward and backward, on sparse tensors that allocate only the touched
    pages."""
    outer, channels, inner = problem
    total = outer * channels * inner
    x, grad = torch.randn(2, min(total, 200_000)).to(dtype)
    weight, bias, running_mean, running_var = torch.rand(4, min(channels, 2000)) + 1
    saved = torch.zeros(len(bias))
    how = How(block=64, splits=splits, last_blocks=3)
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
        # Everything written, one work tile in size, lies at the end of the tensor and is right.
        assert int(written.sum()) * got.element_size() == run.launches[0].written[name] > 0
        assert bool(known[written].all())
        error = (got.double() - want.double()).abs()
        assert bool((error <= torch.finfo(dtype).eps * want.abs() + 1e-5)[written].all())
