"""The cache of large CPU results (csrc/cpu/result_cache.h): blocks are reused, bounded, reclaimable by the system, and
never in use twice. Settings are read once per process, so most tests run in their own interpreter."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from interpreter import in_subprocess
from torch.profiler import ProfilerActivity, profile

import bnkernels as bnk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="results are cached on Linux only")

MIB = 1 << 20

STEP = """
import os, resource, threading, torch, bnkernels as bnk
torch.set_num_threads(1)
layer = bnk.BatchNorm2d(64)

def step(n=8):
    x = torch.randn(n, 64, 56, 56, requires_grad=True)         # n * 0.77 MiB
    grad = torch.randn_like(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = layer(x)
    dx = torch.autograd.grad(y, x, grad)[0]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, y, dx
"""


def answer_of(code: str, **environment: str) -> str:
    answer = in_subprocess(STEP + code, **environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_a_step_on_cached_memory_has_no_page_faults() -> None:
    """Two results of 6 MiB are 3136 pages. Checked with small and with huge pages."""
    code = "faults = [step()[0] for _ in range(8)]; print(max(faults[3:]))"
    for huge_pages in ("0", "1"):
        assert int(answer_of(code, BNKERNELS_CPU_HUGE_PAGES=huge_pages)) < 100


def test_reused_and_released_blocks_are_no_longer_counted() -> None:
    """With a limit that one step's two results exactly fill, steps cause no page faults, with or without
    empty_cache().
    """
    code = """
for _ in range(3):
    faults = [step()[0] for _ in range(8)]
    print(max(faults[3:]), bnk.empty_cache())
"""
    rounds = [tuple(map(int, line.split())) for line in answer_of(code, BNKERNELS_CPU_CACHE_MB="13").splitlines()]
    assert len(rounds) == 3
    for faults, cached in rounds:
        assert faults < 100
        assert cached == 13 * MIB


def test_alternating_result_sizes_take_no_more_than_both() -> None:
    """A small result must not reuse a large block: the next large result would then need fresh memory, every time."""
    code = """
def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")

zero, one = torch.zeros(64), torch.ones(64)
large, small = torch.ones(2**17, 64), torch.ones(2**12, 64)  # 32 MiB and 1 MiB

def alternate():
    bnk.batch_norm(large, zero, one)
    held = [bnk.batch_norm(small, zero, one) for _ in range(3)]

alternate()
before = mapped()
for _ in range(8):
    alternate()
print(mapped() - before, bnk.empty_cache())
"""
    grown, cached = map(int, answer_of(code).split())
    assert grown < 16 * MIB
    assert cached == (32 + 3) * MIB


@pytest.mark.parametrize("limit", [0, 13, 1024])
def test_the_cache_respects_its_limit(limit: int) -> None:
    """empty_cache() returns the number of cached bytes: of four results of 6.125 MiB as many as fit, then 0."""
    code = "held = [step()[1:] for _ in range(2)]; del held; print(bnk.empty_cache(), bnk.empty_cache())"
    cached, after = map(int, answer_of(code, BNKERNELS_CPU_CACHE_MB=str(limit)).split())
    size = 8 * 64 * 56 * 56 * 4
    blocks = min(4, limit * MIB // size)
    assert blocks * size <= cached <= min(limit * MIB, blocks * size * 9 // 8)
    assert after == 0


def test_empty_cache_returns_memory() -> None:
    """Resident memory falls by the returned number of bytes."""
    code = """
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

y, dx = step(64)[1:]
del y, dx
before = resident()
cached = bnk.empty_cache()
print(cached, before - resident())
"""
    cached, fallen = map(int, answer_of(code).split())
    assert cached >= 2 * 64 * 64 * 56 * 56 * 4
    assert fallen == pytest.approx(cached, rel=0.1)


def test_cached_memory_is_reclaimable() -> None:
    """All cached blocks except the 64 MiB freed last are marked as reclaimable (LazyFree in smaps)."""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this kernel does not report reclaimable memory: no /proc/self/smaps_rollup")
    code = """
y, dx = step(128)[1:]
del y, dx
fields = (line.split() for line in open("/proc/self/smaps_rollup"))
print(next(int(f[1]) for f in fields if f[0] == "LazyFree:") * 1024)
"""
    assert int(answer_of(code)) >= 128 * 64 * 56 * 56 * 4


@pytest.mark.parametrize("value", ["-1", "many", "1.5", "99999999999999999999"])
def test_a_wrong_limit_is_refused(value: str) -> None:
    answer = in_subprocess(STEP + "step()", BNKERNELS_CPU_CACHE_MB=value)
    assert answer.returncode != 0
    assert f"BNKERNELS_CPU_CACHE_MB={value}: expected a whole number from 0 to " in answer.stderr


def test_huge_pages_change_nothing_and_are_validated() -> None:
    code = (
        "import torch, hashlib\nfrom bnkernels import _ops as ops\n"
        "x = torch.randn(2, 8, 512, 512, generator=torch.Generator().manual_seed(0))\n"
        "y, *_ = ops.forward_train(x, None, None, None, None, None, 0.1, 1e-5)\n"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    answers = {value: in_subprocess(code, BNKERNELS_CPU_HUGE_PAGES=value) for value in ("0", "1", "", "2")}
    assert answers["0"].stdout == answers["1"].stdout == answers[""].stdout != ""
    assert answers["2"].returncode != 0
    assert "BNKERNELS_CPU_HUGE_PAGES=2: expected a whole number from 0 to 1" in answers["2"].stderr


def test_filled_fresh_memory_comes_from_torch() -> None:
    """Where torch fills fresh memory (deterministic mode), so that unwritten elements show, results use torch's
    allocator."""
    code = """
from bnkernels.testing import poisoned_allocations
with poisoned_allocations():
    held = step()[1:]
del held
print(bnk.empty_cache())
"""
    assert answer_of(code) == "0"


def test_a_forked_process_goes_on() -> None:
    """Forks while another thread allocates and frees: the child continues with its own copy of the cache.

    The mutex is seldom locked at the fork; the next test covers that case.
    """
    code = """
import signal
stop = False
zero, one = torch.zeros(1024), torch.ones(1024)
x = torch.randn(25_000, 1024)  # drawn before the fork: torch's generator has a mutex of its own
def hammer():
    while not stop:
        bnk.batch_norm(x, zero, one).set_()

# Run every operation once: its first call takes glibc's atexit() lock, which would be locked in a forked child.
bnk.batch_norm(x[:1024], zero, one).set_()
thread = threading.Thread(target=hammer)
thread.start()
codes = []
for _ in range(40):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        bnk.batch_norm(x[:1024], zero, one)
        os._exit(0)
    codes.append(os.waitpid(child, 0)[1])
    if codes[-1]:
        break
stop = True
thread.join()
print(set(codes))
"""
    assert answer_of(code, BNKERNELS_CPU_HUGE_PAGES="0") == "{0}"


def test_a_process_forked_while_the_memory_is_locked_goes_on() -> None:
    """Without the pthread_atfork handlers, the child would wait for a thread that it does not have.

    The mutex is locked during madvise() of a large block. A signal that arrives meanwhile, whose handler is libc's
    sleep(), makes the thread hold the lock for as many seconds as the signal's number. How long fork() waits for the
    lock shows whether that happened; if the signal came too early or too late, fork() does not wait.
    """
    code = """
import ctypes, signal, time
zero, one = torch.zeros(1024), torch.ones(1024)
x = torch.ones(25_000, 1024)
libc = ctypes.CDLL(None)
libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
libc.signal(signal.SIGHUP, ctypes.cast(libc.sleep, ctypes.c_void_p))
assert signal.SIGHUP == 1

def give_back(y):
    global about_to
    about_to = True
    y.set_()  # releases the GIL

give_back(bnk.batch_norm(x[:1024], zero, one))  # run once: see test_a_forked_process_goes_on
for _ in range(20):
    about_to = False
    thread = threading.Thread(target=give_back, args=(bnk.batch_norm(x, zero, one),))
    thread.start()
    while not about_to:
        pass
    signal.pthread_kill(thread.ident, signal.SIGHUP)
    time.sleep(0.05)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        bnk.batch_norm(x[:1024], zero, one)
        os._exit(0)
    waited = time.monotonic() - started > 0.5
    code = os.waitpid(child, 0)[1]
    thread.join()
    if code or waited:
        break
print(code, waited)
"""
    code_of_child, waited = answer_of(code, BNKERNELS_CPU_HUGE_PAGES="0").split()
    assert code_of_child == "0"
    if waited != "True":
        pytest.skip("no signal arrived while the memory was locked")


def test_results_may_outlive_the_interpreter() -> None:
    assert answer_of("y, dx = step()[1:]; torch.held = y; print(y.numel())") == str(8 * 64 * 56 * 56)


def test_no_two_results_share_memory() -> None:
    """Threads allocate, hold and free results of many sizes; each result still holds its own values when it is
    freed.
    """
    wrong: list[str] = []

    def work(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        zero, one = torch.zeros(16), torch.ones(16)
        held: list[tuple[torch.Tensor, float]] = []
        for turn in range(200):
            rows = int(torch.randint(2_000, 60_000, (), generator=random))
            value = float(1000 * seed + turn)
            y = bnk.batch_norm(torch.full((rows, 16), value), zero, one, training=False, eps=0.0)
            held.append((y, value))
            if len(held) > 4:
                old, expected = held.pop(int(torch.randint(0, 5, (), generator=random)))
                if not bool((old == expected).all()):
                    wrong.append(f"seed {seed}, turn {turn}: {old.unique()[:3].tolist()}, expected {expected}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert wrong == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_result_is_a_tensor_like_any_other(layout: torch.memory_format) -> None:
    """It can be resized, shared with other processes, pickled and viewed by numpy, like a tensor of torch's
    allocator.
    """
    x = torch.randn(4, 32, 48, 48).contiguous(memory_format=layout)
    y = bnk.BatchNorm2d(32)(x).detach()
    expected = y.clone()
    assert y.is_contiguous(memory_format=layout) and y.data_ptr() % 64 == 0
    array = y.numpy()
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
    assert y.share_memory_().is_shared() and torch.equal(y, expected)
    y = bnk.BatchNorm2d(32)(x).detach()
    y.untyped_storage().resize_(2 * y.untyped_storage().nbytes())
    assert torch.equal(y, expected)
    del y
    assert array.shape == x.shape


def test_torchs_memory_profiler_sees_it() -> None:
    x = torch.randn(16, 64, 28, 28)
    layer = bnk.BatchNorm2d(64).eval()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        y = layer(x)
        del y
    ops = {event.key: event for event in profiler.key_averages()}
    assert ops["bnkernels::batch_norm_eval"].cpu_memory_usage >= 4 * x.numel()


MALLOC_DEBUG = next((str(path) for path in Path("/lib").glob("*-linux-gnu/libc_malloc_debug.so.0")), None)


@pytest.mark.skipif(MALLOC_DEBUG is None, reason="glibc's libc_malloc_debug.so.0 is not installed")
def test_scratch_is_never_overrun() -> None:
    """glibc checks each block when it is freed. Covers every number of splits up to 33."""
    code = """
for threads in (1, 2):
    torch.set_num_threads(threads)
    for splits in range(1, 34):
        for channels in (64, 72, 100):
            x = torch.randn(128 * splits, channels, requires_grad=True)
            bnk.batch_norm(x, None, None, training=True).sum().backward()
"""
    answer_of(code, LD_PRELOAD=str(MALLOC_DEBUG), GLIBC_TUNABLES="glibc.malloc.check=3")
