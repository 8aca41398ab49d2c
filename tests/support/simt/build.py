"""Compiles the programs of tests/support/simt in several builds, and caches them by the content of their sources.

    plain     optimised: many seeds
    asan      AddressSanitizer and UndefinedBehaviorSanitizer
    tsan      ThreadSanitizer
    portable  plain, with the stack switch that works on every machine

Needs a C++20 compiler ($CXX, else g++) and its sanitizer libraries, which come with g++ (Debian, Ubuntu: package g++;
Fedora: libasan, libubsan and libtsan in addition to gcc-c++). Binaries are stored in build/simt under a hash of
sources, flags and compiler and reused by later test runs; `make clean` removes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
OUTPUT = ROOT / "build" / "simt"

# -ffp-contract=off: a*b + c is rounded twice unless the source says fused_multiply_add, as in the CUDA build.
COMMON = ["-std=c++20", "-ffp-contract=off", "-g1", "-fno-omit-frame-pointer"]
BUILDS = {
    "plain": ["-O2", "-fPIC"],  # -fPIC: also linked into the fake CUDA device, a shared library
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread"],
    "portable": ["-O2", "-DSIMT_UCONTEXT"],
}
# Compiled without sanitizers in every build: its own memory is not under test, and it calls the sanitizers explicitly.
ENGINE = [
    "tests/support/simt/fiber.cpp",
    "tests/support/simt/buffers.cpp",
    "tests/support/simt/engine.cpp",
    "tests/support/simt/synchronisation.cpp",
]
PLAN = ["csrc/plan/partition.cpp", "csrc/plan/two_pass.cpp", "csrc/plan/persistent.cpp"]
# Element types. The kernels of each are compiled separately, because some programs need only one.
ELEMENTS = {"float64": "double", "float32": "float", "float16": "bnk::Half", "bfloat16": "bnk::BFloat16"}
KERNELS = "tests/support/simt/kernels.cpp"
PROGRAMS = {
    "convert16": ["tests/support/simt/convert16.cpp"],
    "check_quotient": ["tests/support/simt/check_quotient.cpp", "csrc/plan/partition.cpp"],
    "run_planted": ["tests/support/simt/run_planted.cpp"],
    **{f"run_kernels_{dtype}": ["tests/support/simt/run_kernels.cpp", *PLAN] for dtype in ELEMENTS},
}
# Environment of the programs. A race does not end a program, so one run reports all of them.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=0 history_size=4",
}


def program(name: str, build: str, root: Path = ROOT) -> Path:
    """The path of a program of PROGRAMS in a build of BUILDS, compiled from `root`'s csrc and tests/support/simt if
    needed.

    Raises RuntimeError with the compiler's output if it does not compile.
    """
    flags = BUILDS[build]
    headers = headers_of(root)
    unsanitized = ["-O2", *(flag for flag in flags if flag.startswith("-D"))]
    units = [(file, unsanitized) for file in ENGINE]
    # The engine comes first: the linker takes the first definition of an inline function that both sides instantiate,
    # which is then the uninstrumented one.
    units += [(file, flags) for file in PROGRAMS[name]]
    if (dtype := name.removeprefix("run_kernels_")) in ELEMENTS:
        units += [
            (KERNELS, [*flags, of(each)] if each == dtype else [*unsanitized, of(each), "-DSIMT_ABSENT"])
            for each in ELEMENTS
        ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda unit: compiled(root, *unit, headers), units))
    link = [flag for flag in flags if flag.startswith("-fsanitize")]
    return make(f"{name}-{build}", [*map(str, objects), *link], [path.name.encode() for path in objects])


def of(dtype: str) -> str:
    """The compiler flag that selects an element type's kernels."""
    return f"-DSIMT_ELEMENT={ELEMENTS[dtype]}"


def programs(wanted: Iterable[tuple[str, str]], root: Path = ROOT) -> dict[tuple[str, str], Path]:
    """Several programs, by name and build, with two compilers at once."""
    wanted = list(wanted)

    def one(pair: tuple[str, str]) -> Path:
        return program(pair[0], pair[1], root)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(wanted, pool.map(one, wanted)))


def run(executable: Path, *arguments: object, input: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs a program to its end. A run of more than a minute counts as hung."""
    started = [*command(executable), *map(str, arguments)]
    return subprocess.run(started, input=input, capture_output=True, env=os.environ | ENVIRONMENT, timeout=60)


@cache
def command(executable: Path) -> list[str]:
    """The command that starts a program.

    Older ThreadSanitizers cannot start where the kernel randomises addresses widely (vm.mmap_rnd_bits above 28, the
    default of newer distributions); there the program is started without address randomisation.
    """
    direct = [str(executable)]
    if not executable.name.endswith("-tsan"):
        return direct
    probe = subprocess.run(direct, stdin=subprocess.DEVNULL, capture_output=True)
    if b"unexpected memory mapping" not in probe.stderr:
        return direct
    return ["setarch", platform.machine(), "-R", *direct]


@cache
def _compiler() -> tuple[tuple[str, ...], bytes]:
    """The compiler command and its reported version."""
    command = tuple(shlex.split(os.environ.get("CXX", "g++")))
    try:
        return command, subprocess.run([*command, "--version"], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"tests/support/simt needs a C++20 compiler; {shlex.join(command)} does not run: {error}"
        ) from error


def headers_of(root: Path) -> list[bytes]:
    """Names and contents of all files that a source may include."""
    found = [
        *root.glob("csrc/**/*.h"),
        *root.glob("csrc/cuda/launch/*.h"),
        *root.glob("csrc/cuda/*.cuh"),
        *root.glob("tests/support/simt/*.h"),
    ]
    return [part for path in sorted(found) for part in (path.name.encode(), path.read_bytes())]


def compiled(root: Path, file: str, flags: list[str], headers: list[bytes]) -> Path:
    """An object file of `file`, a path relative to `root`."""
    source = root / file
    flags = [*COMMON, *flags]
    includes = [f"-I{root / 'tests' / 'support'}", f"-I{root / 'csrc'}"]
    contents = [*map(str.encode, flags), source.read_bytes(), *headers]
    return make(f"{source.stem}.o", [*flags, *includes, "-c", str(source)], contents)


def make(name: str, arguments: list[str], contents: list[bytes]) -> Path:
    """Runs the compiler, once per contents even if several processes ask concurrently."""
    compiler, version = _compiler()
    digest = hashlib.sha256()
    for content in (name.encode(), version, *contents):
        digest.update(len(content).to_bytes(8, "little") + content)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    target = OUTPUT / f"{digest.hexdigest()[:20]}-{name}"
    if target.exists():
        return target
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = Path(f"{target}.partial")
            result = subprocess.run([*compiler, *arguments, "-o", str(partial)], capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{shlex.join([*compiler, *arguments])}\n{result.stderr}")
            partial.rename(target)
    return target
