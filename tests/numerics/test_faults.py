"""Failures around a call: out of memory, many threads, many calls, processes that start together."""

from __future__ import annotations

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from faults import allocations, gloo_starts
from interpreter import in_subprocess
from processes import Broken, Pool

import bnkernels as bnk
from bnkernels.check.runner import call
from bnkernels.testing import Case, make_epilogue, same_bits

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses LD_PRELOAD or /proc, needs Linux")


@linux
def test_every_allocation_failure() -> None:
    """A call whose allocation fails raises, changes nothing, and works when repeated; freeing never fails."""
    done = in_subprocess(
        "from faults import allocations; raise SystemExit(allocations.main())",
        LD_PRELOAD=str(allocations.library()),
        OMP_WAIT_POLICY="passive",
    )
    assert done.returncode == 0, done.stderr
    made, raised = (sum(map(int, re.findall(rf"(\d+) {what}", done.stdout))) for what in ("allocations", "exceptions"))
    # Some failures raise no exception: a result that the result cache cannot hold is allocated by torch.
    assert made > raised > 800
    assert int(re.findall(r"(\d+) allocations, +0 exceptions  freeing", done.stdout)[0]) > 0


CASES = [
    Case("cauchy", (8, 16, 14, 14)),
    Case("cauchy", (8, 16, 14, 14), "bfloat16", "float32", "channels_last", epilogue="relu"),
    Case("offset_1e4", (300, 600), "float64"),
    Case("normal", (4, 64, 40, 40), epilogue="add+relu"),
    Case("normal", (4, 64, 40, 40), "float16", training=False),
]


def test_concurrent_calls_give_the_bits_of_one_thread() -> None:
    """Eight threads run forward and backward in different orders over shared inputs. Large inputs use several OpenMP
    threads and share the result cache."""
    inputs = [(case.inputs(), case.epilogue) for case in CASES]
    given = [(i, make_epilogue(name, i)) for i, name in inputs]
    expected = [call(bnk.batch_norm, *pair) for pair in given]
    wrong: list[str] = []
    started = threading.Barrier(8)

    def work(seed: int) -> None:
        order = torch.randperm(4 * len(CASES), generator=torch.Generator().manual_seed(seed)) % len(CASES)
        started.wait()
        for number in order.tolist():
            outputs = call(bnk.batch_norm, *given[number])
            for name, tensor in vars(expected[number]).items():
                if not same_bits(getattr(outputs, name), tensor):
                    wrong.append(f"{CASES[number]}: {name}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert wrong == []


@linux
def test_memory_does_not_grow() -> None:
    """Resident memory after 20,000 further calls: forwards, backwards, calls that raise, and cached results."""
    done = in_subprocess("""
import os, torch, bnkernels as bnk
torch.set_num_threads(1)
plain, fused = bnk.BatchNorm2d(8), bnk.BatchNormAct2d(8)
small, large = (torch.randn(n, 8, 6, 6, requires_grad=True) for n in (4, 300))  # results of the large are cached
ones = {x: torch.ones_like(x) for x in (small, large)}

def step(x):
    for layer in (plain, fused):
        torch.autograd.grad(layer(x), [x, *layer.parameters()], ones[x])
    try:
        bnk.batch_norm(x, plain.running_mean[:3], plain.running_var, training=True)
    except RuntimeError:
        return
        raise SystemExit("did not raise")

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

def steps(count):
    for number in range(count):
        step(large if number % 20 == 0 else small)

steps(1000)
before = resident()
steps(4000)  # five calls each
print(resident() - before)
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 20, f"grew by {int(done.stdout) / 20_000:.0f} bytes per call"


def test_process_groups_start() -> None:
    """Newly started groups of gloo processes initialize and train (faults/gloo_starts.py starts hundreds)."""
    assert gloo_starts.start(2) == []


def hang() -> None:
    threading.Event().wait()


@linux
def test_hanging_group_reports_stacks() -> None:
    """The error names the line where a process hangs, and what its threads wait for in the kernel."""
    pool = Pool(1, "gloo")
    pool.run(abs, 0)
    with pytest.raises(Broken, match=r"no answer in 1 s(.|\n)*test_faults.py\", line \d+ in hang") as raised:
        pool.run(hang, deadline=1.0)
    assert "threads, and what they wait for" in str(raised.value)
    assert pool._folder is not None and not Path(pool._folder).exists()
