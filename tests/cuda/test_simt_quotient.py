"""Row numbers by multiplication with a reciprocal (quotient, in csrc/cuda/device/vector_access.cuh) are exact for every
divisor.

A quotient that is one too small assigns a vector to the previous row, which does not contain it: its elements are
skipped, and no sanitizer sees an invalid access. This happens for a few divisors only, 49 vectors per row among them
(14 x 14 in float32), so hand-picked shapes miss it.
"""

from __future__ import annotations

import pytest
from simt import build
from simt.common import INEXACT_ROWS, judge, make
from simt.persistent_cases import plan
from simt.server import How, Server

pytest_plugins = ["simt.fixtures"]


def test_all_divisors() -> None:
    done = build.run(build.program("check_quotient", "plain"), 4096)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("pair", [("float32", "float32"), ("bfloat16", "float32")], ids=lambda pair: pair[0])
@pytest.mark.parametrize("row", INEXACT_ROWS)
def test_rows_of_such_lengths(plain: Server, row: int, pair: tuple[str, str]) -> None:
    """Both paths, with splits that begin at every position in a row."""
    elements = row * (4 if pair[0] == "float32" else 8)
    inputs = make((3, 2, elements), pair)
    for splits in (1, 2, 7):
        how = How(block=32, splits=splits)
        judge(inputs, plain.call(inputs, how, channels_last=False), how)
    for group_size in (1, 2, 5):
        how = How(persistent=plan("channels_first", (3, 2, elements), pair[0], group_size, 2, cached_vectors=2))
        judge(inputs, plain.call(inputs, how, channels_last=False), how)


def test_images_of_14_by_14(plain: Server) -> None:
    """The shape that revealed the bug, with the plan of a device."""
    inputs = make((2, 3, 14, 14), ("float32", "float32"))
    for device in ((1, 1024), (16, 1536), (132, 2048)):
        judge(inputs, plain.call(inputs, How(device=device, at_a_time=8), channels_last=False), device)
