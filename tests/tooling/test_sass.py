"""The kernels as machine code (bench/sass.py); tests/tooling/test_sass_reading.py has the reading of it.

Compiles the kernels of bfloat16 once, for sm_90 (`make sass` holds those of every dtype to the same rules); skipped,
with the reason, without nvcc or nvdisasm.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import device_code, sass
from bench.sass_listing import find_disassembler
from bench.sass_paths import read_too_early

pytestmark = pytest.mark.slow

ARCH = "sm_90"


@pytest.fixture(scope="module")
def tools() -> tuple[Path, Path]:
    try:
        nvcc = device_code.find_nvcc()
        return nvcc, find_disassembler(nvcc)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kernels(tools: tuple[Path, Path]) -> list[sass.Kernel]:
    sources = [path for path in device_code.sources() if path.stem.endswith("_bf16")]
    return sass.measure(sources, ARCH, jobs=min(2, os.cpu_count() or 1))


def names_of(kernels: Sequence[sass.Kernel]) -> dict[str, str]:
    return device_code.demangle([kernel.name for kernel in kernels])


def test_every_kernel_is_looked_at(kernels: list[sass.Kernel]):
    counted = {name: sum(kernel.plain_name == name for kernel in kernels) for name in sass.LOOPS}
    # The layouts of their path: channels-first, channels-last, and packed where it is resident; plain and with an
    # epilogue, or behind one, where there are both.
    assert counted == {
        name: (3 if name.startswith("persistent") else 2) * (2 if name in device_code.EPILOGUES else 1)
        for name in sass.LOOPS
    }
    assert all(
        sum(bool(kernel.epilogue) for kernel in kernels if kernel.plain_name == name) == counted[name] / 2
        for name in device_code.EPILOGUES
    )
    for kernel in kernels:
        expected = (
            set() if kernel.plain_name not in sass.LOOPS else {True} if kernel.variant in sass.UNTOLD else {True, False}
        )
        assert {loop.is_whole for loop in kernel.loops} == expected, kernel.name


def test_only_what_is_named_cannot_be_told(kernels: list[sass.Kernel]):
    variants = {kernel.variant for kernel in kernels}
    assert {kernel.variant for kernel in kernels if kernel.unknown} == sass.UNTOLD & variants != set()


def test_no_kernel_uses_local_memory(kernels: list[sass.Kernel]):
    names = names_of(kernels)
    spilled = {
        names[kernel.name]: (kernel.usage, kernel.count(lambda each: each.is_local))
        for kernel in kernels
        if not kernel.usage.in_registers or kernel.count(lambda each: each.is_local)
    }
    assert spilled == {}


def test_main_loops_are_as_they_must_be(kernels: list[sass.Kernel]):
    """16-byte accesses alone, all of a turn's loads in flight together, no calls, nothing that could not be told."""
    names = names_of(kernels)
    elsewhere = ("local memory", "slots")  # tests of their own
    found = [
        f"{names[kernel.name]}: {line}"
        for kernel in kernels
        for line in sass.offences(kernel)
        if not any(word in line for word in elsewhere)
    ]
    assert found == []


# Where an element takes more instructions than there are issue slots while its bytes move. An entry that no longer
# holds fails the test as well.
OVER_BUDGET: set[str] = set()


def test_instructions_are_within_the_issue_slots(kernels: list[sass.Kernel]):
    assert pytest.approx(31.1, abs=0.1) == sass.SLOTS_PER_BYTE * 4  # forward, 16-bit elements: read and written once
    assert pytest.approx(46.7, abs=0.1) == sass.SLOTS_PER_BYTE * 6  # backward
    if shutil.which("c++filt") is None:
        pytest.skip("kernels are told apart by their demangled names: no c++filt")
    names = names_of(kernels)
    over = {names[kernel.name] for kernel in kernels if any("slots" in line for line in sass.offences(kernel))}
    assert over == OVER_BUDGET
    for kernel in kernels:  # and those are over by less than a tenth
        for loops in kernel.totals().values():
            assert sum(loop.instructions for loop in loops) < 1.1 * sum(loop.slots for loop in loops)


def test_main_loops_hold_the_arithmetic_of_their_formula(kernels: list[sass.Kernel]):
    """That the fast path is the turn it is meant to be: additions and multiplications an element are the source's."""
    formulas = {
        ("persistent_forward_kernel", "load, keep"): 1,  # sum += x
        ("persistent_forward_kernel", "kept"): 3,  # d = x - p; sum += d; squares += d * d
        ("persistent_forward_kernel", "kept, write"): 3,  # (x - mean) * invstd * weight + bias
        ("persistent_forward_kernel", "load, write"): 3,
        ("persistent_forward_kernel", "kept, add, write"): 4,  # + residual
        ("persistent_forward_kernel", "load, add, write"): 4,
        ("persistent_backward_kernel", "load, keep"): 3,  # sum += g; product += g * (x - mean)
        ("persistent_backward_kernel", "kept, write"): 4,  # (g - mean(g) - (x - mean) * slope) * scale
        ("persistent_backward_kernel", "load, write"): 4,
        ("normalize_kernel", "load, write"): 3,
        ("normalize_kernel", "load, add, write"): 4,
        ("grad_input_kernel", "load, write"): 4,
    }
    # Of grad_y alone: one tensor is loaded; behind a ReLU two, as in training.
    inference = ("grad_input_kernel", 1)
    checked = set()
    for kernel in kernels:
        for loop in kernel.loops:
            expected = formulas.get((kernel.plain_name, loop.role))
            if expected is None:
                continue
            checked.add((kernel.plain_name, loop.role))
            if (kernel.plain_name, loop.loads / (loop.stores or 1)) == inference:
                expected = 1
            choices = {expected, 1} if kernel.variant.startswith("grad_input") and kernel.epilogue else {expected}
            count = loop.path.count(lambda each: each.is_arithmetic)
            # Beside the elements': one in a tile's address.
            beyond = [count - each * loop.elements for each in choices]
            assert any(0 <= more <= 1 for more in beyond), (kernel.name, loop.role, count, loop.elements)
    assert checked == set(formulas)


def test_scheduling_words_are_read_right(kernels: list[sass.Kernel]):
    paths = [loop.path for kernel in kernels for loop in kernel.loops]
    assert sum(path.count(lambda each: each.is_load and each.bits == 128) for path in paths) > 125
    assert [early for path in paths for early in read_too_early(path)] == []


def test_tables_name_every_kernel(kernels: list[sass.Kernel]):
    names = names_of(kernels)
    assert len(sass.render_kernels(kernels, names).splitlines()) == 2 + len(kernels)
    rows = sass.render_loops(kernels, names).splitlines()[2:]
    loops = sum(len(kernel.loops) for kernel in kernels)
    sums = sum(len(part) > 1 for kernel in kernels for part in kernel.totals().values())
    # Resident kernels: three forward, whole windows kept or not and any kept; three backward, whole or any, kept; and
    # as many with an epilogue.
    assert len(rows) == loops + sums and sums == 2 * (3 * 3 + 3 * 2)


# Kernels with one fault each, under the names of kernels whose loops are held to something.
PLANTED = """
namespace bnk {

template <typename T>
__global__ void normalize_kernel(const T* x, T* y, long n) {  // its stores are 4 bytes wide
  for (long i = threadIdx.x; i < n; i += blockDim.x) {
    uint4 bits[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) bits[k] = reinterpret_cast<const uint4*>(x)[4 * i + k];
#pragma unroll
    for (int k = 0; k < 4; ++k) y[4 * (4 * i + k)] = __uint_as_float(bits[k].x ^ bits[k].y ^ bits[k].z ^ bits[k].w);
  }
}

template <typename T>
__global__ void statistics_kernel(const T* x, T* y, long n) {  // element by element
  T sum = 0;
  for (long i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  y[threadIdx.x] = sum;
}

template <typename T>
__global__ void grad_input_kernel(const T* x, T* y, long n) {  // waits for each load before the next
  for (long i = threadIdx.x; i < n; i += 4 * blockDim.x) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint4 bits = reinterpret_cast<const uint4*>(x)[i + k * blockDim.x];
      bits.x += bits.w;
      reinterpret_cast<volatile uint4*>(y)[i + k * blockDim.x].x = bits.x;
      reinterpret_cast<uint4*>(y)[i + k * blockDim.x] = bits;
    }
  }
}

template <typename T>
__global__ void grad_sums_kernel(const T* x, T* y, long n) {  // a table of its own, indexed: local memory
  T table[64];
  for (long i = threadIdx.x; i < n; i += blockDim.x) {
    const uint4 bits = reinterpret_cast<const uint4*>(x)[i];
    table[bits.x % 64] = __uint_as_float(bits.y ^ bits.z ^ bits.w);
  }
  y[threadIdx.x] = table[n % 64];
}

template __global__ void normalize_kernel<float>(const float*, float*, long);
template __global__ void statistics_kernel<float>(const float*, float*, long);
template __global__ void grad_input_kernel<float>(const float*, float*, long);
template __global__ void grad_sums_kernel<float>(const float*, float*, long);

}  // namespace bnk
"""


def test_planted_faults_are_found(tools: tuple[Path, Path], tmp_path: Path):
    nvcc, disassembler = tools
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    compiled = device_code.compile_device_code(nvcc, source, ARCH, ["-lineinfo"])
    found = {kernel.plain_name: "\n".join(sass.offences(kernel)) for kernel in sass.look_at(compiled, disassembler)}
    assert "narrow global accesses on the fast path" in found["normalize_kernel"]
    assert "no main loop 'load'" in found["statistics_kernel"]
    assert "1 loads in flight" in found["grad_input_kernel"]
    assert "local memory" in found["grad_sums_kernel"]
    assert "1 loads in flight" in found["grad_sums_kernel"]
