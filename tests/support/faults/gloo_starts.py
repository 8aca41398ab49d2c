"""Starts groups of gloo processes that train a few steps under DDP, one group at a time, and checks that all come up.

    PYTHONPATH=.:tests/support python -m faults.gloo_starts --count 200

Each group has new processes, a new store and a new model with SyncBatchNorm (test_distributed.py). If one does not
answer in time, its stacks are printed (processes.py), and the next group starts. Exit code 1: some did not answer.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from collections.abc import Sequence

import processes
import torch.distributed as dist
from distributed_training import batches, of_this_rank, small

import bnkernels as bnk


def train(steps: int) -> list[float]:
    """Losses of `steps` steps on this rank."""
    model = bnk.DistributedDataParallel(bnk.SyncBatchNorm.convert_sync_batchnorm(small().double()))
    losses = of_this_rank(model, batches(steps, 8))
    dist.barrier()
    return losses


def start(count: int, size: int = 2, steps: int = 2, deadline: float = 60.0) -> list[str]:
    """The reports of those of `count` groups of `size` processes that did not answer."""
    processes.PRELOADED += ["distributed_training", "faults.gloo_starts"]
    failed: list[str] = []
    expected: list[list[float]] = []
    for number in range(count):
        # Dumps this process's stacks if it hangs.
        faulthandler.dump_traceback_later(3 * deadline, exit=True)
        pool = processes.Pool(size, "gloo")
        try:
            losses = pool.run(train, steps, deadline=deadline)
            expected = expected or losses
            assert losses == expected, f"losses {losses}, in the first group {expected}"
        except AssertionError as error:
            failed.append(f"start {number}: {error}")
        finally:
            pool.close()
            faulthandler.cancel_dump_traceback_later()
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description="Starts groups of gloo processes, and sees each of them train.")
    parse.add_argument("--count", type=int, default=200)
    parse.add_argument("--size", type=int, default=2, metavar="PROCESSES")
    parse.add_argument("--deadline", type=float, default=60.0, metavar="SECONDS")
    options = parse.parse_args(arguments)
    began = time.monotonic()
    failed = start(options.count, options.size, deadline=options.deadline)
    seconds = time.monotonic() - began
    print(f"{options.count} starts of {options.size} processes in {seconds:.0f} s, {len(failed)} failed")
    print("\n\n".join(failed), end="\n" * bool(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
