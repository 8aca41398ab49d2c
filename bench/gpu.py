"""Everything that needs a GPU, in two stages, without network: for a GPU that is available for minutes.

    bash bench/gpu.sh first       the most valuable steps: correctness, speed, bytes moved
    bash bench/gpu.sh second      compute-sanitizer, the other tests, the other figures

    RESULTS=DIR       write the results to DIR/first and DIR/second (default: bench/results/gpu-<date>)
    PYTHON=python3    must have torch, setuptools, ninja, pytest, hypothesis; pytest-xdist and pytest-timeout are used
    STEPS="a b"       run only these steps of bench/stages.py
    TOTAL=N           seconds for the stage (default: 240 and 400); a step that does not fit is cut off and reported
    SIZE=tiny         run every step on the smallest problems, to test the script
    MAX_JOBS=N        parallel compilers (default: the number of cores)

summary.md is updated after every step, log.txt as output arrives, and the JSON of the bench after every case: a stage
that is killed leaves all results up to then. A step that fails does not stop the others; a step whose requirements are
missing is skipped with the reason. Exit status: 0 if no step failed, 1 if one did, 130 if interrupted.

A library built elsewhere for this Python and torch is used without a build. Build it with
`STEPS=build bash bench/gpu.sh first`, with TORCH_CUDA_ARCH_LIST set if that machine has no GPU, and copy
bnkernels/_C.*.so and bnkernels/_C.built.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import FrameType

from .files import replace_text
from .markdown import table
from .stages import SIZES, STAGES, Facts, Step

ROOT = Path(__file__).resolve().parent.parent
BUILD_FOLDER = ROOT / "build" / "gpu"
LIBRARY = ROOT / "bnkernels" / f"_C{EXTENSION_SUFFIXES[0]}"
BUILT = ROOT / "bnkernels" / "_C.built"  # digests of the sources and of the library
FAKE_CUDA = "BNKERNELS_FAKE_CUDA"  # set if tests/support/fake_cuda emulates the GPU
SKIPPED = 77  # exit status of a step that cannot run here; the last line of its output is the reason
GRACE = 10  # seconds from the interrupt of a step to its kill
CUT_OFF = (124, 137, -signal.SIGKILL)  # exit statuses of `timeout`; SIGKILL also ends timeout itself
INTERRUPTED = 130

PROBE = """
import json
facts = {}
try:
    import torch
    if torch.version.cuda is None:
        facts["why"] = f"torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        facts["why"] = "torch sees no GPU"
    else:
        facts["gpu"] = torch.cuda.get_device_name()
        facts["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
    import bnkernels
    facts["archs"] = bnkernels.build_info()["arch_list"] or ""
except Exception as error:
    facts.setdefault("why", f"{type(error).__name__}: {error}".splitlines()[0])
print(json.dumps(facts))
"""


def digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def build_mark() -> str:
    """Digests of the sources and of the present library."""
    sources = sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())
    own = [file for file in [LIBRARY] if file.exists()]
    return f"{digest([*sources, ROOT / 'setup.py', ROOT / 'build_support.py'])} {digest(own)}\n"


def probe(environment: dict[str, str]) -> Facts:
    """Runs PROBE in a child process, so that this process has no context on the GPU."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        found = {"why": f"the probe of the GPU failed: {type(error).__name__}"}
    current = BUILT.exists() and BUILT.read_text() == build_mark()
    return Facts(**found, current=current, fake_cuda=FAKE_CUDA in environment)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def words_of(facts: Facts, size: str, results: Path) -> dict[str, str]:
    """The values of the {names} in the programs of steps."""
    python = [sys.executable, *(["-m", "fake_cuda.run"] if facts.fake_cuda else [])]
    words = {
        **SIZES[size],
        "python": shlex.join(python),
        "results": shlex.quote(str(results)),
        "build": shlex.quote(str(BUILD_FOLDER)),
        "arch": facts.arch,
        # Instruments only the kernels of the package (namespace bnk).
        "sanitizer": "--error-exitcode 9 --kernel-name kns=bnk",
        # A timeout in a kernel ends the process; pytest-xdist starts another for the remaining tests.
        "pytest": "--timeout 60 --timeout-method thread" if _has("pytest_timeout") else "",
    }
    if not _has("xdist"):
        words |= {"workers4": "", "workers8": ""}
    return words


@dataclass
class Summary:
    """Rows of summary.md; the file on disk is always up to date."""

    file: Path
    title: str
    rows: list[list[str]] = field(default_factory=list)

    def add(self, name: str, status: str, seconds: float, note: str) -> None:
        self.rows.append([name, status, f"{seconds:.0f}", note])
        self.write()
        print(f"   {status} after {seconds:.0f} s: {note}", flush=True)

    def write(self, running: str = "") -> None:
        last = [[running, "running", "", ""]] if running else []
        rows = table(["step", "status", "s", "output"], [*self.rows, *last], left=4)
        replace_text(self.file, f"{self.title}\n\n{rows}\n")


def _last_line(log: Path, offset: int, pattern: str) -> str:
    with log.open("rb") as file:
        file.seek(offset)
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    found = [line.strip() for line in lines if re.search(pattern, line)] or [line for line in lines if line.strip()]
    return found[-1].strip("= ").replace("|", "/")[:200] if found else "no output"


def run_step(
    step: Step, command: Sequence[str], limit: int, log: Path, environment: dict[str, str]
) -> tuple[str, float, str]:
    """Status, seconds and note. KeyboardInterrupt, after ending the step, if this process is interrupted."""
    timed = ["timeout", "-s", "INT", f"--kill-after={GRACE}", str(limit), *command]
    begin = time.monotonic()
    with log.open("ab") as output:
        output.write(f"===== {step.name}: {shlex.join(command)}\n".encode())
        output.flush()
        offset = output.tell()
        process = subprocess.Popen(
            timed, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # timeout forwards it, and kills the step after GRACE
            process.wait()
            raise
    seconds = time.monotonic() - begin
    said = _last_line(log, offset, step.shown)
    if status == SKIPPED:
        return "skipped", seconds, _last_line(log, offset, r"\S")
    if status == 0:
        return "passed", seconds, said
    reason = f"cut off after {limit} s" if status in CUT_OFF and seconds >= limit else f"exit status {status}"
    return "FAILED", seconds, f"{reason}; {said}"


def run_stage(
    steps: Sequence[Step],
    total: int,
    facts: Facts,
    words: dict[str, str],
    environment: dict[str, str],
    summary: Summary,
) -> int:
    """Exit status. total: seconds left for the steps."""
    end = time.monotonic() + total
    log = summary.file.with_name("log.txt")
    log.write_bytes(b"")
    summary.write()
    failed = False
    for step in steps:
        print(f"== {step.name}", flush=True)
        reason = step.needs(facts)
        if reason is not None:
            summary.add(step.name, "skipped", 0, reason)
            continue
        limit = min(step.limit, int(end - time.monotonic()) - GRACE)
        if limit < 5:
            summary.add(step.name, "FAILED", 0, "no time left")
            failed = True
            continue
        summary.write(running=step.name)
        begin = time.monotonic()
        try:
            outcome, seconds, note = run_step(step, shlex.split(step.program.format(**words)), limit, log, environment)
        except KeyboardInterrupt:
            summary.add(step.name, "FAILED", time.monotonic() - begin, "interrupted; the following steps did not run")
            return INTERRUPTED
        summary.add(step.name, outcome, seconds, note)
        failed = failed or outcome == "FAILED"
        if step.name == "build" and outcome == "passed":
            BUILT.write_text(build_mark())
    return 1 if failed else 0


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def title(stage: str, size: str, facts: Facts) -> str:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    where = f"{facts.gpu}{driver and f', driver {driver}'}" if facts.gpu else "no GPU"
    changed = ", with uncommitted changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    commit = (_output("git", "rev-parse", "HEAD") or "unknown") + changed
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return f"# The {stage} stage on {where}\n\n{when}, commit {commit}, {os.cpu_count()} cores, SIZE={size}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def take_interrupts() -> None:
    """SIGINT and SIGTERM end the running step and the stage, even if the parent process ignores them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def main(arguments: Sequence[str]) -> int:
    begin = time.monotonic()
    take_interrupts()
    size = os.environ.get("SIZE") or "full"
    if len(arguments) != 1 or arguments[0] not in STAGES or size not in SIZES:
        print(f"usage: bash bench/gpu.sh {'|'.join(STAGES)}, with SIZE={'|'.join(SIZES)}", file=sys.stderr)
        return 2
    stage = arguments[0]
    total, steps = STAGES[stage]
    if os.environ.get("STEPS"):
        wanted = os.environ["STEPS"].split()
        if unknown := set(wanted) - {step.name for step in steps}:
            print(f"no step {', '.join(unknown)} in {stage}: {', '.join(step.name for step in steps)}", file=sys.stderr)
            return 2
        steps = tuple(step for step in steps if step.name in wanted)
    results = (
        Path(os.environ.get("RESULTS") or ROOT / "bench" / "results" / f"gpu-{datetime.date.today()}").absolute()
        / stage
    )
    for folder in (results, BUILD_FOLDER):
        folder.mkdir(parents=True, exist_ok=True)

    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    path = [
        str(ROOT),
        *([str(ROOT / "tests" / "support")] if FAKE_CUDA in environment else []),
        environment.get("PYTHONPATH", ""),
    ]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    facts = probe(environment)
    if not facts.gpu:  # without a GPU, one architecture is enough to compile the kernels
        environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    summary = Summary(results / "summary.md", title(stage, size, facts))
    left = int(os.environ.get("TOTAL") or total) - int(time.monotonic() - begin)
    status = run_stage(steps, left, facts, words_of(facts, size, results), environment, summary)
    print(f"\n{summary.file.read_text()}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
