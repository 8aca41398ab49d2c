"""Random sequences of calls (tests/support/sequences.py): no launch depends on the state that an earlier one left.

A single case starts with fresh memory. Sequences found a bug that single cases miss: the meaning of a barrier word
changed from one launch to the next, so that a batch was not counted and the next launch hung.
"""

from __future__ import annotations

import pytest
import sequences
import torch
from hardware import LARGE
from interpreter import in_subprocess

# Multiprocessors, largest cluster, sequences: a MIG slice, GPUs without clusters, a whole Hopper GPU.
DEVICES = ((8, 8, 10), (8, 0, 10), (32, 0, 4), (132, 8, 3))


@pytest.mark.cuda
@pytest.mark.parametrize("first", range(0, 10, 5))
def test_sequences(first: int) -> None:
    """Runs on the available device."""
    sequences.run(first, 5)


@pytest.mark.cuda
@LARGE
@pytest.mark.parametrize("first", range(3))
def test_sequences_of_real_layers(first: int) -> None:
    sequences.run(first, 1, large=True)
    torch.cuda.empty_cache()


@pytest.mark.cuda
@pytest.mark.fake_cuda
@pytest.mark.parametrize("number", range(len(DEVICES)), ids=lambda number: "x".join(map(str, DEVICES[number][:2])))
def test_sequences_on_other_devices(number: int) -> None:
    """Runs on fake CUDA devices of other sizes, with and without clusters, each with its own seeds."""
    multiprocessors, max_cluster, count = DEVICES[number]
    done = in_subprocess(
        "import fake_cuda; fake_cuda.attach(); import sequences\n"
        f"raise SystemExit(sequences.main(['--first', '{1000 + 10 * number}', '--count', '{count}']))",
        FAKE_CUDA_MULTIPROCESSORS=str(multiprocessors),
        FAKE_CUDA_MAX_CLUSTER=str(max_cluster),
    )
    assert done.returncode == 0, done.stderr
    # The sequences must contain grid-level barriers and launches of other kinds that count batches.
    kinds = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()[1:]]
    assert any("grid" in kind for kind in kinds), done.stdout
    assert any("cumulative" in kind and "grid" not in kind for kind in kinds), done.stdout
    assert any(" cluster" in kind for kind in kinds) == (max_cluster > 0), done.stdout
