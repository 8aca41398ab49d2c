"""The build: the decisions of build_support.py, with scripts in place of nvcc; its output; the extension; the sdist."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import bnkernels
import build_support
from build_support import BuildError, CudaBuild

ROOT = Path(__file__).resolve().parents[2]

NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo '#$ _SPACE_= ' >&2; echo '#$ TOP={top}' >&2;;
  --version) echo 'Cuda compilation tools, release {version}, V{version}.88';;
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\ncompute_103\\n';;
  *) exit 1;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA 13.0 toolkit: a folder with bin/nvcc, which reports its root as nvcc does."""
    root = tmp_path / "cuda-13.0"
    script(root / "bin" / "nvcc", NVCC.format(top=f"{root}/bin/..", version="13.0"))
    return root


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


def no_gpu() -> list[build_support.Capability]:
    return []


# The toolkit's root


def test_root_of_nvcc_in_its_place(toolkit: Path, nowhere: Path) -> None:
    assert build_support.find_cuda_root({"PATH": str(toolkit / "bin")}, nowhere) == toolkit


def test_root_of_a_link(toolkit: Path, tmp_path: Path, nowhere: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    assert build_support.find_cuda_root({"PATH": str(tmp_path / "bin")}, nowhere) == toolkit


def test_root_of_a_wrapper(toolkit: Path, tmp_path: Path, nowhere: Path) -> None:
    """A script on PATH that calls nvcc: its parent folder is not the toolkit's root."""
    script(tmp_path / "local" / "bin" / "nvcc", f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    assert build_support.find_cuda_root({"PATH": str(tmp_path / "local" / "bin")}, nowhere) == toolkit


def test_cuda_home_comes_first(toolkit: Path, tmp_path: Path, nowhere: Path) -> None:
    other = tmp_path / "other"
    script(other / "bin" / "nvcc", NVCC.format(top=other, version="12.8"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        assert build_support.find_cuda_root({name: str(other), "PATH": str(toolkit / "bin")}, nowhere) == other


def test_cuda_home_without_nvcc_is_reported_and_skipped(
    toolkit: Path, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"CUDA_HOME": str(nowhere), "PATH": str(toolkit / "bin")}
    assert build_support.find_cuda_root(environ, nowhere) == toolkit
    assert f"ignoring CUDA_HOME={nowhere}, which has no bin/nvcc" in capsys.readouterr().out


def test_root_in_the_standard_place(toolkit: Path, nowhere: Path) -> None:
    assert build_support.find_cuda_root({"PATH": ""}, standard=toolkit) == toolkit
    assert build_support.find_cuda_root({"PATH": ""}, standard=nowhere) is None


def test_an_invalid_root_is_an_error(tmp_path: Path, nowhere: Path) -> None:
    nvcc = script(tmp_path / "bin" / "nvcc", NVCC.format(top=nowhere, version="13.0"))
    with pytest.raises(BuildError, match=r"which has no bin/nvcc; set CUDA_HOME"):
        build_support.root_of_nvcc(nvcc)


def test_an_nvcc_that_fails_is_an_error(tmp_path: Path) -> None:
    nvcc = script(tmp_path / "bin" / "nvcc", "#!/bin/sh\necho broken >&2\nexit 7\n")
    with pytest.raises(BuildError, match=r"failed with exit code 7:\nbroken"):
        build_support.root_of_nvcc(nvcc)
    with pytest.raises(BuildError, match="cannot run"):
        build_support.root_of_nvcc(tmp_path / "missing")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_root_of_the_nvcc_here() -> None:
    root = build_support.root_of_nvcc(Path(shutil.which("nvcc") or ""))
    assert (root / "bin" / "nvcc").exists() and (root / "include" / "cuda_runtime.h").exists()
    assert set(build_support.known_archs(root)) >= {(9, 0)}


# Versions and architectures


def test_version_and_archs_of_the_toolkit(toolkit: Path) -> None:
    assert build_support.toolkit_version(toolkit) == "13.0"
    assert build_support.known_archs(toolkit) == [(7, 5), (8, 0), (9, 0), (10, 0), (10, 3)]


def test_same_major_passes() -> None:
    build_support.check_cuda_major("2.15.0", "13.2", "13.0", Path("/cuda"))


def test_other_major_names_both_and_the_fix() -> None:
    with pytest.raises(BuildError) as raised:
        build_support.check_cuda_major("2.15.0+cu132", "13.2", "12.8", Path("/opt/cuda"))
    message = str(raised.value)
    for part in ("2.15.0+cu132", "CUDA 13.2", "CUDA 12.8", "/opt/cuda", "CUDA_HOME", "FORCE_CUDA=0"):
        assert part in message


KNOWN = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]


@pytest.mark.parametrize(
    ("known", "present", "expected"),
    [
        (KNOWN, [], "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        (KNOWN[:5], [], "7.5;8.0;8.6;8.9;9.0+PTX"),
        (KNOWN, [(9, 0)], "9.0+PTX"),
        (KNOWN, [(9, 0), (8, 0), (9, 0)], "8.0;9.0+PTX"),
        (KNOWN, [(12, 1)], "12.1+PTX"),
        (KNOWN[:5], [(10, 0)], "9.0+PTX"),  # newer than nvcc supports: PTX covers it
        ([(13, 0)], [], "13.0+PTX"),
    ],
)
def test_default_arch_list(
    known: list[build_support.Capability], present: list[build_support.Capability], expected: str
) -> None:
    assert build_support.default_arch_list(known, present) == expected


# CUDA or not


def test_cuda_is_built_without_a_gpu(toolkit: Path, nowhere: Path) -> None:
    plan = build_support.plan_cuda({"PATH": str(toolkit / "bin")}, "2.15.0", "13.2", no_gpu, nowhere)
    assert plan == CudaBuild(toolkit, "13.0", "7.5;8.0;9.0;10.0+PTX")


def test_the_given_arch_list_is_taken_and_no_gpu_asked_for(toolkit: Path, nowhere: Path) -> None:
    def ask() -> list[build_support.Capability]:
        raise AssertionError("asked for GPUs")

    environ = {"PATH": str(toolkit / "bin"), "TORCH_CUDA_ARCH_LIST": "8.6;9.0+PTX"}
    plan = build_support.plan_cuda(environ, "2.15.0", "13.2", ask, nowhere)
    assert plan is not None and plan.arch_list == "8.6;9.0+PTX"


def test_cpu_only(toolkit: Path, nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = {"PATH": str(toolkit / "bin")}
    assert build_support.plan_cuda(path, "2.13.0+cpu", None, no_gpu, nowhere) is None
    assert build_support.plan_cuda({**path, "FORCE_CUDA": "0"}, "2.15.0", "13.2", no_gpu, nowhere) is None
    assert capsys.readouterr().out == ""
    assert build_support.plan_cuda({"PATH": ""}, "2.15.0", "13.2", no_gpu, nowhere) is None
    assert "no nvcc was found: building for the CPU only" in capsys.readouterr().out


def test_forced_cuda_that_cannot_be_is_an_error(toolkit: Path, nowhere: Path) -> None:
    with pytest.raises(BuildError, match=r"torch 2\.13\.0\+cpu is built without CUDA"):
        build_support.plan_cuda({"PATH": str(toolkit / "bin"), "FORCE_CUDA": "1"}, "2.13.0+cpu", None, no_gpu, nowhere)
    with pytest.raises(BuildError, match=r"no nvcc was found: install the CUDA 13 toolkit"):
        build_support.plan_cuda({"PATH": "", "FORCE_CUDA": "1"}, "2.15.0", "13.2", no_gpu, nowhere)


def test_forced_cpu_does_not_look_at_a_toolkit_that_does_not_fit(toolkit: Path, nowhere: Path) -> None:
    path = {"PATH": str(toolkit / "bin")}
    with pytest.raises(BuildError, match="CUDA versions differ"):
        build_support.plan_cuda(path, "2.11.0", "12.8", no_gpu, nowhere)
    assert build_support.plan_cuda({**path, "FORCE_CUDA": "0"}, "2.11.0", "12.8", no_gpu, nowhere) is None


@pytest.mark.parametrize(
    ("value", "expected"), [("", None), ("auto", None), ("1", True), ("ON", True), ("0", False), ("off", False)]
)
def test_force_cuda(value: str, expected: bool | None) -> None:
    assert build_support.wants_cuda({"FORCE_CUDA": value}) is expected


def test_force_cuda_of_another_kind_is_an_error() -> None:
    with pytest.raises(BuildError, match="expected FORCE_CUDA to be 1"):
        build_support.wants_cuda({"FORCE_CUDA": "maybe"})


# Output during compilation


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[3/9] c++ -MMD -MF /a/x.o.d -I/t/csrc/api -c -c /a b/csrc/ops.cpp -o /a/x.o -O3", "[3/9] 1:05 ops.cpp"),
        ("[3/9] nvcc -c -c '/a b/csrc/cuda/x.cu' -o '/a b/x.o' -O3", "[3/9] 1:05 cuda/x.cu"),
        ("FAILED: /a/csrc/x.o ", None),
        ("c++ -c -c /a/csrc/ops.cpp -o /a/x.o", None),
        ("csrc/torch/ops.cpp:3:1: error: [1/2] expected ';' -c csrc/x.cpp -o x", None),
    ],
)
def test_progress_line(line: str, expected: str | None) -> None:
    assert build_support.progress_line(line, 65.9) == expected


NINJA = """\
ninja: Entering directory
[1/2] c++ -c /a/csrc/plan/partition.cpp -o /a/partition.o
FAILED: /a/csrc/ops.o
c++ -c /a/csrc/ops.cpp -o /a/ops.o
/a/csrc/ops.cpp:1:1: error: no
"""


def test_errors_are_shown_as_they_are() -> None:
    printed = io.StringIO()
    build_support.relay_ninja(io.StringIO(NINJA), printed, None, None)
    lines = NINJA.splitlines()
    assert printed.getvalue().splitlines() == [lines[0], "[1/2] 0:00 plan/partition.cpp", *lines[2:]]


def test_a_log_gets_all_and_the_terminal_the_progress() -> None:
    printed, terminal, log = io.StringIO(), io.StringIO(), io.StringIO()
    build_support.relay_ninja(io.StringIO(NINJA), printed, terminal, log)
    assert log.getvalue() == NINJA
    assert printed.getvalue() == "[1/2] 0:00 plan/partition.cpp\n"
    assert terminal.getvalue() == "\r\033[K  [1/2] 0:00 plan/partition.cpp\n"


def test_the_terminal_is_written_to_where_a_front_end_hides_the_output(tmp_path: Path) -> None:
    terminal = tmp_path / "tty"
    hidden = {"_PYPROJECT_HOOKS_BUILD_BACKEND": "setuptools.build_meta"}
    assert build_support.hidden_terminal({}, str(terminal)) is None
    assert build_support.hidden_terminal(hidden, str(tmp_path / "none" / "tty")) is None
    opened = build_support.hidden_terminal(hidden, str(terminal))
    assert opened is not None and opened.name == str(terminal)
    opened.close()


# Writes the files that ninja and the linker expect.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -o|-MF) : > "$2";; esac
  shift
done
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the repository's files, because a build writes into its working folder."""
    copy = tmp_path / "source"
    left_out = shutil.ignore_patterns(".git", ".venv*", "build", "out", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


@pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux's rule for a session's controlling terminal")
def test_a_build_shows_what_it_compiles(source: Path, tmp_path: Path) -> None:
    """Run as pip runs it: the terminal shows the progress, and every source is compiled in exactly one translation
    unit."""
    compiler = script(tmp_path / "bin" / "c++", COMPILER)
    environ = {
        **os.environ,
        "CXX": str(compiler),
        "FORCE_CUDA": "0",
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",
        "_PYPROJECT_HOOKS_BUILD_BACKEND": "setuptools.build_meta",
    }
    master, terminal = os.openpty()
    # The first terminal that a session leader opens becomes the session's controlling terminal.
    command = [
        "sh",
        "-c",
        'exec 3<>"$0"; exec "$@"',
        os.ttyname(terminal),
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
    ]
    done = subprocess.run(
        command,
        cwd=source,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    os.set_blocking(master, False)
    shown = os.read(master, 1 << 16).decode()
    os.close(terminal)
    os.close(master)
    compiled = re.findall(r"^\[\d+/(\d+)\] \d:\d\d (\S+)$", done.stdout, re.MULTILINE)
    files = [file for _, file in compiled]
    assert {int(count) for count, _ in compiled} == {len(files)}
    assert re.findall(r"\[\d+/\d+\] \d:\d\d (\S+)\r", shown) == files
    assert max(len(line) for line in done.stdout.splitlines()) < 200

    csrc = source / "csrc"
    included = [
        f"torch/{name}"
        for file in files
        for name in re.findall(r'^#include "(.*\.cpp)"', (csrc / file).read_text(), re.MULTILINE)
    ]
    wanted = [str(path.relative_to(csrc)) for path in csrc.rglob("*.cpp") if "cuda" not in path.parts[-3:-1]]
    assert sorted(files + included) == sorted(wanted)


# The built extension


def test_build_info_describes_this_build() -> None:
    info = bnkernels.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["with_cuda"] == (info["cuda"] is not None) == bool(info["arch_list"])
    if info["with_cuda"]:
        assert torch.version.cuda is not None
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert info["compiler"]
    assert info["simd"] in {"avx512_bf16", "avx512", "avx2", "baseline"}


def extension_file() -> Path:
    files = list(Path(bnkernels.__file__).parent.glob("_C*.so"))
    assert len(files) == 1, files
    return files[0]


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="torch is not built with OpenMP"
)
def test_parallel_on_the_openmp_runtime_of_torch() -> None:
    """Compiled with OpenMP (otherwise at::parallel_for would silently be serial), yet no second runtime is loaded."""
    assert b"GOMP_parallel" in extension_file().read_bytes()
    loaded = subprocess.run(
        [sys.executable, "-c", "import bnkernels; bnkernels.build_info(); print(open('/proc/self/maps').read())"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    runtimes = {line.split()[-1] for line in loaded.splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1, runtimes


def test_sdist_holds_what_a_build_needs(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist")],
        cwd=source,
        env={**os.environ, "FORCE_CUDA": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    native = {path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"}}
    python = set((ROOT / "bnkernels").rglob("*.py"))
    needed = {str(path.relative_to(ROOT)) for path in native | python}
    needed |= {"setup.py", "build_support.py", "pyproject.toml", "LICENSE", "README.md", "bnkernels/py.typed"}
    assert needed - held == set()


def test_units_include_every_file_with_torch_headers() -> None:
    """A file that no unit includes would be missing from the library."""
    csrc = Path(build_support.__file__).parent / "csrc"
    included = {
        name
        for unit in csrc.glob("torch/*_unit.cpp")
        for name in re.findall(r'#include "(\w+\.cpp)"', unit.read_text())
    }
    compiled = {path.name for path in csrc.glob("torch/*_unit.cpp")}
    assert included | compiled == {path.name for path in csrc.glob("torch/*.cpp")} and not included & compiled
