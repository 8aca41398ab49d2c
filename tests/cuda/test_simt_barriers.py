"""tests/support/simt/drop_barriers.py finds the calls that it drops (test_every_barrier_is_needed drops those of a
launch)."""

from __future__ import annotations

from pathlib import Path

from simt import drop_barriers


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
