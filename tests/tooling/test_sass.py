"""The kernels' main loops as machine code (bench/tools/sass.py).

The slow tests compile the kernels of bfloat16 once for sm_90 (`make sass` checks those of every dtype by the same
rules); skipped, with the reason, without nvcc or nvdisasm.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.tools import device_code, sass
from bench.tools.registers import Usage

ARCH = "sm_90"
NAME = "_ZN3bnk17statistics_kernelIfLNS_6LayoutE0EEEvv"


def listing(text: str) -> list[str]:
    """What nvdisasm prints for one instruction or label per line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    code = [line if line.endswith(":") else f"        /*{16 * at:04x}*/   {line} ;" for at, line in enumerate(lines)]
    return [f".text.{NAME}:", *code]


# A full-vector loop with a skipped branch, then a mixed loop, in an outer loop; then a loop of shared memory alone.
LOOPS = """
.L_outer:
.L_full:
    LDG.E.128 R4, desc[UR4][R2.64]
    LDG.E.EF.128 R8, desc[UR4][R2.64+0x10]
    @P1 BRA `(.L_skip)
    STS.128 [R3], R4
.L_skip:
    @!P0 BRA P2, `(.L_full)
.L_mixed:
    LDG.E.128 R4, desc[UR4][R2.64]
    @P3 LDG.E.U16 R8, desc[UR4][R2.64]
    @P0 BRA `(.L_mixed)
    BRA.U UP0, `(.L_outer)
.L_shared:
    LDS.128 R4, [R3]
    @P0 BRA `(.L_shared)
    STL [R1], R4
    EXIT
"""


def read(text: str) -> sass.Kernel:
    (function,) = sass.parse_listing(listing(text))
    return sass.read_kernel(function, Usage(NAME, ARCH, 32, 0, 0, 0, 0))


def test_main_loops_are_found():
    kernel = read(LOOPS)
    full, mixed = kernel.loops
    assert (kernel.plain_name, kernel.local_accesses) == ("statistics_kernel", 1)
    assert (full.role, full.is_full, full.loads, full.accesses) == ("load, cache", True, 2, 3)
    assert (full.elements, full.instructions_per_element) == (2 * 4, 5 / 8)
    assert (mixed.role, mixed.is_full, mixed.loads, mixed.accesses) == ("load", False, 1, 2)
    assert [loop.is_full for loop in read(LOOPS.replace("STS.128", "STS.64")).loops] == [False, False]
    assert "| load, cache |    full |     3/3 |" in sass.render([kernel], {NAME: "name"})


def test_a_narrow_access_is_an_offence():
    text = "\n".join([".L_1:", *["LDG.E.128 R4, desc[UR4][R2.64]"] * 4, "{more}", "@P0 BRA `(.L_1)", "EXIT"])
    assert sass.offences(read(text.format(more="FADD R4, R4, R5"))) == []
    missing = "0 full-vector loops 'load', expected 1"
    assert sass.offences(read(text.format(more="LDG.E R8, desc[UR4][R2.64]"))) == [missing]
    assert sass.offences(read(text.format(more="LD.E.64 R8, [R2]"))) == [missing]


def test_a_listing_that_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="not understood"):
        sass.parse_listing([line.replace("EXIT ;", "EXIT") for line in listing(LOOPS)])
    with pytest.raises(ValueError, match=r"no label \.L_skip"):
        sass.parse_listing(listing(LOOPS.replace(".L_skip:", "")))
    with pytest.raises(ValueError, match="indirect branch BRX"):
        sass.parse_listing(listing("BRX R2"))


@pytest.fixture(scope="module")
def tools() -> tuple[Path, Path]:
    try:
        nvcc = device_code.find_nvcc()
        return nvcc, sass.find_disassembler(nvcc)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_main_loops_use_128_bit_accesses(tools: tuple[Path, Path]):
    """Full-vector loops in number, width and loads, nothing in local memory, instructions within the issue slots."""
    sources = [path for path in device_code.sources() if path.stem.endswith("_bf16")]
    kernels = sass.measure(sources, ARCH, jobs=min(2, os.cpu_count() or 1))
    names = device_code.demangle([kernel.name for kernel in kernels])
    assert [f"{names[kernel.name]}: {line}" for kernel in kernels for line in sass.offences(kernel)] == []
    # Two layouts, three of the persistent kernels; with and without an epilogue where a kernel has one.
    for name in sass.LOOPS:
        count = (3 if name.startswith("persistent") else 2) * (2 if name in device_code.EPILOGUES else 1)
        assert sum(kernel.plain_name == name for kernel in kernels) == count, name


# Kernels with one fault each, under the names of kernels of LOOPS.
PLANTED = """
namespace bnk {

template <typename T>
__global__ void normalize_kernel(const T* x, T* y, long n) {  // 32-bit stores
  for (long i = threadIdx.x; i < n; i += blockDim.x) {
    uint4 bits[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) bits[k] = reinterpret_cast<const uint4*>(x)[4 * i + k];
#pragma unroll
    for (int k = 0; k < 4; ++k) y[4 * (4 * i + k)] = __uint_as_float(bits[k].x ^ bits[k].y ^ bits[k].z ^ bits[k].w);
  }
}

template <typename T>
__global__ void grad_sums_kernel(const T* x, T* y, long n) {  // an indexed table: local memory
  T table[64];
#pragma unroll 1
  for (long i = threadIdx.x; i < n; i += blockDim.x) {
    const uint4 bits = reinterpret_cast<const uint4*>(x)[i];
    table[bits.x % 64] = __uint_as_float(bits.y ^ bits.z ^ bits.w);
  }
  y[threadIdx.x] = table[n % 64];
}

template __global__ void normalize_kernel<float>(const float*, float*, long);
template __global__ void grad_sums_kernel<float>(const float*, float*, long);

}  // namespace bnk
"""


@pytest.mark.slow
def test_planted_faults_are_found(tools: tuple[Path, Path], tmp_path: Path):
    nvcc, disassembler = tools
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    kernels = sass.read_kernels(device_code.compile_device_code(nvcc, source, ARCH), disassembler)
    found = {kernel.plain_name: "\n".join(sass.offences(kernel)) for kernel in kernels}
    assert "0 full-vector loops 'load, write', expected 1" in found["normalize_kernel"]
    assert "local memory" in found["grad_sums_kernel"]
    assert "1 loads per iteration" in found["grad_sums_kernel"]
