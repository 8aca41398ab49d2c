"""A progress bar: tqdm if installed, else OneLine. Prints nothing if stderr is not a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType


class OneLine:
    """`[=====     ] 120/708 cpu offset_1e4  3 s`, rewritten in place, at most ten times a second."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._label = max(total, 1), 0, ""
        self._start = self._shown = time.monotonic()
        self._on = sys.stderr.isatty()

    def set_description_str(self, label: str, refresh: bool = True) -> None:
        self._label = label

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if self._on and (now - self._shown > 0.1 or self._done >= self._total):
            self._shown = now
            filled = "=" * (20 * self._done // self._total)
            seconds = now - self._start
            line = f"[{filled:20}] {self._done}/{self._total}  {seconds:.0f} s  {self._label}"
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + line[:width].ljust(width))
            sys.stderr.flush()

    def __enter__(self) -> OneLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._on:
            sys.stderr.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            sys.stderr.flush()


def bar(total: int) -> OneLine:
    """A progress bar as a context manager with tqdm's update() and set_description_str()."""
    try:
        from tqdm import tqdm
    except ImportError:
        return OneLine(total)
    # disable=None disables the bar if stderr is not a terminal.
    made: OneLine = tqdm(total=total, disable=None, leave=False, unit="case", dynamic_ncols=True)
    return made
