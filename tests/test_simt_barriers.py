"""No synchronisation of the kernels can be removed unseen: what tests/simt/drop_barriers.py tells, as a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from simt import drop_barriers
from simt.common import UNORDERED


@pytest.mark.slow
def test_every_dropped_barrier_is_seen() -> None:
    rows = drop_barriers.table()
    print("\n".join(f"{call}: {seen}" for call, seen in rows))
    assert rows[0] == (None, {"plain": "", "tsan": ""})
    assert len(rows) > 1
    for call, seen in rows[1:]:
        assert all(seen.values()), (call, seen)
        assert re.search(UNORDERED, seen["tsan"]), (call, seen)


def test_calls_are_found(tmp_path: Path) -> None:
    (tmp_path / "kernel.cuh").write_text(
        "  block_barrier();  // block_barrier() once\n  // block_barrier();\n  group_barrier(group, phase);\n"
        "  if (x) async_wait<1>(pipe);\n  await_nothing;\n"
    )
    (tmp_path / "primitives_cuda.cuh").write_text("BNK_DEVICE void block_barrier() { __syncthreads(); }\n")
    found = list(drop_barriers.calls(tmp_path))
    assert [(call.line, call.text) for call in found] == [
        (1, "block_barrier();"),
        (3, "group_barrier(group, phase);"),
        (4, "async_wait<1>(pipe);"),
    ]
