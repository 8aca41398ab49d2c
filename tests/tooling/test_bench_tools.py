"""The harness's tools: the report on registers, the hardware counters, the driver for compute-sanitizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bnkernels
import build_support
from bench.cases import Case
from bench.providers import OURS
from bench.shapes import LayerShape
from bench.tools import device_code, ncu, registers, sanitize
from bnkernels.testing import EPILOGUES

ROOT = Path(__file__).resolve().parents[2]


# ---- ptxas

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3bnk5spillEPKfPfi' for 'sm_75'
ptxas info    : Function properties for _ZN3bnk5spillEPKfPfi
    552 bytes stack frame, 588 bytes spill stores, 596 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 552 bytes cumulative stack size, 372 bytes cmem[0]
ptxas info    : Compile time = 36.716 ms
ptxas info    : Compiling entry function '_ZN3bnk5scaleIfLi4ELNS_6LayoutE0EEEvPKT_PS2_lf' for 'sm_75'
ptxas info    : Function properties for _ZN3bnk5scaleIfLi4ELNS_6LayoutE0EEEvPKT_PS2_lf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 1024 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 8.438 ms
ptxas info    : Compiling entry function 'plain' for 'sm_120a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 1.902 ms
ptxas info    : Function properties for helper
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_ptxas_report_is_parsed():
    spill, scale, plain = registers.parse_ptxas(PTXAS)
    assert spill == registers.Usage("_ZN3bnk5spillEPKfPfi", "sm_75", 64, 552, 588, 596, 0)
    assert (scale.registers, scale.shared_bytes, scale.in_registers) == (24, 1024, True)
    assert (plain.kernel, plain.arch, plain.registers, plain.shared_bytes) == ("plain", "sm_120a", 10, 0)
    assert not spill.in_registers


def test_a_cut_ptxas_report_is_refused():
    with pytest.raises(ValueError, match="no register count for _ZN3bnk5spill"):
        registers.parse_ptxas(PTXAS.split("ptxas info    : Used 64")[0])
    with pytest.raises(ValueError, match="figures without a kernel"):
        registers.parse_ptxas("ptxas info    : Used 10 registers, used 0 barriers")


def test_spills_are_found_unless_allowed(monkeypatch: pytest.MonkeyPatch):
    usages = registers.parse_ptxas(PTXAS)
    assert len(registers.offenders(usages)) == 1
    assert "spill" in registers.offenders(usages)[0]
    assert registers.offenders(usages[1:]) == []
    monkeypatch.setitem(registers.ALLOWED, "spill", "a test says so")
    assert registers.offenders(usages) == []
    text = registers.render(usages, ["sm_75", "sm_120a"])
    assert "**stack 552 B, spills 1184 B**" in text
    assert len(text.splitlines()) == 2 + 3


def test_kernel_names_are_shortened():
    assert device_code.shorten("void bnk::scale<float, 4, (bnk::Layout)0>(float const*, float*)") == (
        "scale<float, 4, (Layout)0>"
    )
    assert device_code.shorten("bnk::finish(bnk::Params)") == "finish"
    assert device_code.shorten("plain") == "plain"


def test_epilogues_in_kernel_names():
    for kernel, words in device_code.EPILOGUES.items():
        full = f"void bnk::{kernel}<bnk::Half, (bnk::Layout)1, %s>(bnk::Params)"
        assert device_code.shorten(full % "false") == f"{kernel}<Half, (Layout)1>"
        assert device_code.shorten(full % "true") == f"{kernel}<Half, (Layout)1> {words}"
    assert device_code.shorten("void bnk::other_kernel<float, true>(int)") == "other_kernel<float, true>"


def test_device_code_is_compiled_as_setup_does():
    """The flags of setup.py that change machine code are the ones that the reports are made with."""
    given = re.search(r'flags\["nvcc"\] = \[(.*)\]', (ROOT / "setup.py").read_text())
    assert given is not None
    flags = re.findall(r'"([^"]+)"', given[1].split('"-Xcompiler"')[0])
    assert set(flags) - {"-lineinfo"} == set(device_code.CODE_FLAGS)
    assert device_code.ARCHS == ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    assert len(device_code.ARCHS) == len(build_support.SUPPORTED_ARCHS)


# ---- ncu

NCU = """\
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Context","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","","byte","byte","ns"
"0","7","void lgamma_kernel_vectorized<float>(...)","1","32","0","1000"
"1","7","void bnk::statistics(bnk::Params)","1","1,000,000","500","2000"
"2","7","void bnk::normalize(bnk::Params)","1","1,000,100","800,000","3000"
"3","7","void lgamma_kernel_vectorized<float>(...)","1","32","0","1000"
"4","7","void reduce_kernel(...)","1","200,000,000","199,500","9000"
==PROF== Disconnected from process 7
"""


def test_ncu_report_is_parsed():
    kernels = ncu.parse_csv(NCU)
    assert len(kernels) == 5
    (call,) = ncu.split_calls(kernels)
    assert [kernel.name.split("(")[0] for kernel in call.kernels] == ["void bnk::statistics", "void bnk::normalize"]
    assert call.read_bytes == 2_000_100
    assert call.written_bytes == 500 + 800_000 + 199_500  # what L2 still held is counted where it was evicted
    text = ncu.render([(Case(LayerShape(10, 10, 10), 250, "nchw", "fp32"), "forward", OURS)], [call])
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == ["250x10x10x10 nchw fp32", "forward", "ours", "2", "2.0", "2.0", "1.0", "1.500", "5"]
    with pytest.raises(ValueError, match="got 1"):
        ncu.render([], [call])


def test_ncu_report_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no table"):
        ncu.parse_csv("==ERROR== nothing was profiled")
    with pytest.raises(ValueError, match="no column dram__bytes_write"):
        ncu.parse_csv(NCU.replace("dram__bytes_write.sum", "other"))
    kernels = ncu.parse_csv(NCU)
    with pytest.raises(ValueError, match="before the first marker"):
        ncu.split_calls(kernels[1:])
    with pytest.raises(ValueError, match="1 of them empty"):
        ncu.split_calls(kernels[:4])


# ---- the driver for compute-sanitizer


def test_sanitizer_driver_covers_the_variants():
    cases = list(sanitize.cases())
    assert {(case.dtype, case.parameters) for case in cases} == set(sanitize.DTYPE_PAIRS)
    assert {case.layout for case in cases} == set(sanitize.KERNEL_LAYOUTS)
    assert {case.shape for case in cases} == set(sanitize.SHAPES)
    plain = {(case.dtype, case.parameters, case.layout, case.training) for case in cases if not case.epilogue}
    for epilogue in EPILOGUES[1:]:
        fused = {(c.dtype, c.parameters, c.layout, c.training) for c in cases if c.epilogue == epilogue}
        assert fused == plain, epilogue
    assert len({str(case) for case in cases}) == len(cases)
    assert sanitize.main(["--device", "cpu", "--quick"]) == 0


def test_sanitizer_driver_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys):
    right = bnkernels.batch_norm
    monkeypatch.setattr(bnkernels, "batch_norm", lambda *arguments, **more: right(*arguments, **more) * 1.001)
    monkeypatch.setattr(sanitize, "SHAPES", sanitize.SHAPES[:5])
    assert sanitize.main(["--device", "cpu", "--quick"]) == 1
    assert "float32" in capsys.readouterr().out
