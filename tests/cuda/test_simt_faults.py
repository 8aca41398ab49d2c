"""The host execution detects and names every kind of fault, planted in a small kernel.

Each kernel of tests/support/simt/planted.h first runs without its fault, in every build, so that a finding is due to
the fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from simt import build

SOURCE = Path(build.__file__).with_name("planted.h")
BUILDS = ("plain", "asan", "tsan", "portable")
SOUND = ("block_sum", "grid_sum", "cluster_sum", "scale", "race", "meeting")


@dataclass(frozen=True)
class Outcome:
    """The values that run_planted printed, by key, and the sanitizers' output."""

    values: dict[str, str]
    complaint: str
    code: int

    @property
    def sound(self) -> bool:
        return self.code == 0 and "sound" in self.values


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    build.programs([*(("run_planted", name) for name in BUILDS), ("convert16", "plain")])


def planted(kernel: str, name: str = "plain", *how: object) -> Outcome:
    """`how`: grid, block, seeds, schedule, co_resident blocks."""
    result = build.run(build.program("run_planted", name), kernel, *how)
    values: dict[str, str] = {}
    last = ""
    for line in result.stdout.decode().splitlines():
        if line.startswith(" "):  # execution continues after a fault
            values[last] += "\n" + line
        else:
            last, _, text = line.partition(": ")
            values[last] = text
    return Outcome(values, result.stderr.decode(), result.returncode)


def line_of(text: str) -> int:
    """The line number of a piece of planted.h that occurs once."""
    lines = [number for number, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line]
    assert len(lines) == 1, f"{text!r} is in lines {lines}"
    return lines[0]


# --- no false alarm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("kernel", SOUND)
def test_sound_kernels_pass(kernel: str, name: str) -> None:
    outcome = planted(kernel, name)
    assert outcome.sound, outcome


def test_more_threads_at_a_time_than_stacks_with_guard_pages() -> None:
    """All blocks of a whole GPU at once: 40,000 threads, each with a stack."""
    outcome = planted("meeting", "plain", 313, 128, 1)
    assert outcome.sound, outcome


@pytest.mark.parametrize("schedule", ["seeded", "in_order", "reverse", "stall_one"])
@pytest.mark.parametrize(
    "grid, block, co_resident", [(1, 32, 0), (1, 96, 0), (3, 128, 0), (5, 32, 2), (4, 32, 1), (6, 64, 3)]
)
def test_sound_kernels_pass_in_every_shape(grid: int, block: int, co_resident: int, schedule: str) -> None:
    for kernel in SOUND:
        if kernel == "grid_sum" and co_resident:
            continue  # its blocks wait for each other: tested below
        if kernel == "cluster_sum" and (grid % 2 or co_resident == 1):
            continue  # not launched as pairs: tested below
        outcome = planted(kernel, "plain", grid, block, 4, schedule, co_resident)
        assert outcome.sound, (kernel, outcome)


def test_bytes_are_counted() -> None:
    # 32 vectors and a tail of 3 floats, each read and written once.
    assert planted("scale").values["traffic"] == "x 524 0 y 0 524"
    # One shuffle's worth of threads reads its element in each of two rounds; y is not touched.
    assert planted("block_sum", "plain", 1, 32).values["traffic"] == "x 256 0 y 0 0"


def test_a_seed_is_one_order() -> None:
    first, again = (planted("block_sum/no_barrier") for _ in range(2))
    assert first.values == again.values
    assert "differs" in first.values


# --- faults that end a launch, in every build ------------------------------------------------------------------------

FAULTS = {
    "scale/reads_before": (
        r"out of bounds: read of 4 bytes at byte -4 of 'x', which has 524; block 0 thread 0, planted\.h:(\d+)",
        "load(params.x - 1)",
    ),
    "scale/reads_far": (
        r"out of bounds: read of 4 bytes at byte 4000000 of 'x', which has 524; block 0 thread 0, planted\.h:(\d+)",
        "load(params.x + 1000000)",
    ),
    "scale/tail_too_long": (
        r"out of bounds: read of 4 bytes at byte 524 of 'x', which has 524; block 0 thread 3, planted\.h:(\d+)",
        "2 * bnk::load(params.x + i)",
    ),
    "scale/writes_far": (
        r"out of bounds: write of 4 bytes at byte 4000 of 'y', which has 524; block 0 thread 0, planted\.h:(\d+)",
        "store(params.y + 1000",
    ),
    "scale/misaligned": (
        r"misaligned: read of 16 bytes at byte 52 of 'x', 4 past a multiple of 16; block 0 thread 3, planted\.h:(\d+)",
        "load_vector(params.x + 4 * i + shift)",
    ),
    "scale/no_such_memory": (
        r"read of 4 bytes at 0x0, which is in no buffer; block 0 thread 0, planted\.h:(\d+)",
        "static_cast<const float*>(nullptr)",
    ),
    "block_sum/too_much_shared": (
        r"too much shared memory: 49152 bytes for 'more' on top of 256, of 49152; block \d thread .*, planted\.h:(\d+)",
        "BNK_SHARED(double, more",
    ),
    "grid_sum/no_arrival": (
        r"deadlock: no thread can move\n  block 0 thread 0: waiting for 1 more of a group, planted\.h:(\d+)\n"
        r"  block 0 thread 1\.\.63: returned\n  block 1 thread 0: waiting for 1 more of a group, .*\n.*: returned$",
        "simt::wait_for",
    ),
    "grid_sum/waits_for_too_many": (
        r"deadlock: no thread can move\n  block 0 thread 0: waiting for 1 more of a group, planted\.h:(\d+)\n",
        "simt::wait_for",
    ),
    "cluster_sum/no_barrier": (
        r"shared memory of a block that may not have started; block \d thread 0, planted\.h:(\d+)",
        "bnk::load_dsmem(",
    ),
    "cluster_sum/no_such_block": (
        r"shared memory of block 2 of a cluster of 2; block \d thread 0, planted\.h:(\d+)",
        "bnk::load_dsmem(",
    ),
    "cluster_sum/no_such_array": (
        r"an address in no array of shared memory, for that of another block; block \d thread 0, planted\.h:(\d+)",
        "bnk::load_dsmem(",
    ),
    "cluster_sum/two_barriers": (
        r"divergent barrier: others of the cluster wait at another one; block \d thread \d+, planted\.h:\d+",
        None,
    ),
    "cluster_sum/early_return": (
        r"divergent barrier: (a thread returned while others of its cluster|other threads of the cluster)",
        None,
    ),
    "meeting/two_barriers": (
        r"divergent barrier: others of the block wait at another one; .*\n  block \d thread .*at block_barrier, "
        r"planted\.h:\d+",
        None,
    ),
    "meeting/barrier_in_branch": (
        r"divergent barrier: others of the block wait at another one; .* thread \d+, planted\.h:\d+\n",
        None,
    ),
    "meeting/early_return": (r"divergent barrier: (a thread returned while others|other threads of the block)", None),
    "meeting/late_return": (r"divergent (barrier|shuffle): .*(returned)", None),
    "meeting/lane_missing": (r"divergent shuffle: .*(at a barrier)", None),
    "meeting/lane_at_barrier": (r"divergent shuffle: .*(at a barrier)", None),
    "meeting/two_shuffles": (r"divergent shuffle: another lane waits at another one; .* planted\.h:\d+", None),
    "meeting/lane_returned": (r"divergent shuffle: (a|another) lane (has )?returned", None),
}


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("kernel", FAULTS)
def test_the_engine_names_the_fault(kernel: str, name: str) -> None:
    pattern, where = FAULTS[kernel]
    outcome = planted(kernel, name)
    found = re.match(pattern, outcome.values.get("fault", ""))
    assert found, outcome
    if where:
        assert int(found[1]) == line_of(where)
    # The launch was unwound: the sanitizers report neither a leak nor a race with its end.
    assert outcome.complaint == ""
    assert outcome.code == 1


@pytest.mark.parametrize("schedule", ["seeded", "in_order", "reverse", "stall_one"])
def test_blocks_that_wait_for_each_other_must_be_co_resident(schedule: str) -> None:
    assert planted("grid_sum", "plain", 3, 64, 4, schedule, 3).sound
    fault = planted("grid_sum", "plain", 3, 64, 4, schedule, 2).values["fault"]
    assert fault.startswith("deadlock") and re.search("waiting for (1 more|rank 0) of a group", fault)


def test_invalid_launches() -> None:
    for grid, block in ((0, 32), (1, 0), (1, 48), (1, 1056)):
        assert planted("meeting", "plain", grid, block).values["fault"].startswith("invalid launch")
    # Pairs of blocks, of a grid of three, and with room for one block.
    for grid, co_resident in ((3, 0), (4, 1)):
        fault = planted("cluster_sum", "plain", grid, 32, 4, "seeded", co_resident).values["fault"]
        assert fault.startswith("invalid launch") and "clusters of 2" in fault


def test_a_block_that_ends_is_read() -> None:
    """The results show nothing. The engine detects it in schedules where it happens, ThreadSanitizer always."""
    values = planted("cluster_sum/no_barrier_at_end", "plain", 2, 64, 40).values
    line = line_of("bnk::load_dsmem(")
    assert re.match(rf"shared memory of a block that ends; block \d thread 0, planted\.h:{line}", values["fault"])
    outcome = planted("cluster_sum/no_barrier_at_end", "tsan", 2, 64, 1)
    assert "data race" in outcome.complaint or "a block that ends" in outcome.values.get("fault", "")


# --- faults that the results show ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "asan"])
@pytest.mark.parametrize("kernel", ["block_sum/no_barrier", "block_sum/no_second_barrier", "grid_sum/no_wait"])
def test_missing_synchronisation_changes_bits_with_the_seed(kernel: str, name: str) -> None:
    outcome = planted(kernel, name)
    assert int(outcome.values["differs"]) < 20
    assert outcome.code == 1


def test_a_stalled_block_shows_a_missing_wait() -> None:
    assert "wrong" in planted("grid_sum/no_wait", "plain", 2, 64, 8, "stall_one").values


@pytest.mark.parametrize("kernel", ["block_sum/reads_unwritten", "scale/no_tail"])
def test_unwritten_memory_is_nan(kernel: str) -> None:
    outcome = planted(kernel)
    assert outcome.values["wrong"] == "0"  # from the first seed on: poison does not depend on the schedule
    assert "differs" not in outcome.values


def test_writing_an_input_is_counted() -> None:
    assert planted("scale/writes_input").values["traffic"] == "x 524 4 y 0 524"


# --- faults that the sanitizers see ----------------------------------------------------------------------------------

RACES = {
    "block_sum/no_barrier": "total += slots[other]",
    "block_sum/no_second_barrier": "slots[warp] = value",
    "grid_sum/no_wait": "total += bnk::load(params.partial + block)",
    "race/shared": "cell[kFault == Race::kShared ? 0 : thread] = 1",
    "race/shared_read_write": "if (thread == 0) cell[1] = 1",
    "race/shuffle_as_barrier": "thread < 32 ? cell[thread ^ 1]",
    "race/global_across_blocks": "kFault == Race::kGlobalAcrossBlocks ? 0 : block",
    "race/global_vector": "store_vector(params.y, bnk::Vector<float>",
}


@pytest.mark.parametrize("kernel", RACES)
def test_thread_sanitizer_names_the_race(kernel: str) -> None:
    outcome = planted(kernel, "tsan", 2, 64, 4)
    assert outcome.code == 66, outcome
    assert "WARNING: ThreadSanitizer: data race" in outcome.complaint
    assert f"planted.h:{line_of(RACES[kernel])}" in outcome.complaint


@pytest.mark.parametrize("kernel", [name for name in RACES if name.startswith("race/")])
def test_no_bit_shows_these_races(kernel: str) -> None:
    """These races need the ThreadSanitizer build."""
    assert planted(kernel).sound


def test_memory_past_the_primitives_faults() -> None:
    """A plain x[i] on a device address: no access can go uncounted."""
    assert planted("scale/past_the_primitives").code < 0
    outcome = planted("scale/past_the_primitives", "asan")
    assert "AddressSanitizer: SEGV" in outcome.complaint
    assert f"planted.h:{line_of('params.y[0] = params.x[0]')}" in outcome.complaint


def test_shared_memory_out_of_bounds() -> None:
    """The engine detects it when the block ends; AddressSanitizer, or UBSan for an index, detects it at the access."""
    for name in ("plain", "tsan"):
        assert re.match(
            r"shared memory written outside 'slots'; block \d",
            planted("block_sum/writes_outside", name).values["fault"],
        )
    outcome = planted("block_sum/writes_outside", "asan")
    assert "AddressSanitizer: use-after-poison" in outcome.complaint
    assert f"planted.h:{line_of('*(slots + 32')}" in outcome.complaint
    outcome = planted("block_sum/index_outside", "asan")
    assert re.search(
        rf"planted\.h:{line_of('slots[warp + 32]')}:\d+: runtime error: index \d+ out of bounds", outcome.complaint
    )


# --- the 16-bit formats ----------------------------------------------------------------------------------------------


def convert(conversion: str, values: torch.Tensor, to: type) -> torch.Tensor:
    result = build.run(build.program("convert16", "plain"), conversion, input=values.numpy().tobytes())
    return torch.from_numpy(np.frombuffer(result.stdout, dtype=to).copy())


@pytest.mark.parametrize("name, dtype", [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_widening_is_exact(name: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    ours = convert(f"float_from_{name}", every, np.float32)
    assert torch.equal(ours.nan_to_num(nan=7e37), every.view(dtype).float().nan_to_num(nan=7e37))
    assert torch.equal(ours.signbit(), every.view(dtype).signbit())


@pytest.mark.parametrize("name, dtype", [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_narrowing_rounds_to_nearest_even(name: str, dtype: torch.dtype) -> None:
    """Every value of the format, every midpoint of neighbours, the adjacent floats, and random bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middles = (every[1:].double() + every[:-1].double()).mul(0.5).float()
    exact = torch.cat([every, middles])
    # The tie between the last finite value and the next power of two, which rounds to infinity.
    top = torch.tensor([65519.996, 65520.0, 65536.0, 3.3895314e38, 3.3961775e38, 3.4e38, torch.inf, torch.nan])
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    infinity = torch.full_like(exact, torch.inf)
    values = torch.cat(
        [exact, exact.nextafter(infinity), exact.nextafter(-infinity), top, -top, bits.view(torch.float32)]
    )
    ours = convert(f"{name}_from_float", values, np.int16)
    native = values.to(dtype)
    nan = native.isnan()
    assert torch.equal(ours[~nan], native[~nan].view(torch.int16))
    assert ours[nan].eq(0x7FFF).all()
