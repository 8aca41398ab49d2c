"""The ranks that one batch lies on, and the one thing that they do together: each gets the rows of all.

A gather, and not a sum: means and squares are joined by Chan's formula and not added (csrc/core/problem_sync.h), and
what is joined here in the order of the ranks has the same bits on each of them, whichever algorithm the backend sums
by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Ranks:
    """A process group of `size` ranks, and the layer, in words, that it exchanges for."""

    group: ProcessGroup
    size: int
    layer: str

    def gather(self, row: Tensor, x: Tensor, what: str) -> Tensor:
        """The rows of all ranks, (size, row.numel()), in their order: one collective, which is enqueued or waited for
        as the backend does it.

        Raises what the backend raises, with the layer named: a RuntimeError or one of its kind. `x`, `what`: the input
        and the part of its computation, for the message.
        """
        gather = _newest(dist, "all_gather_single", "all_gather_into_tensor")
        rows = row.new_empty(self.size, row.numel())
        try:
            gather(rows.view(-1), row, group=self.group)
        except RuntimeError as error:
            kind = type(error) if isinstance(error, dist.DistError) else RuntimeError
            raise kind(
                f"{self.layer}: {what} of an input of shape {tuple(x.shape)}: rank {dist.get_rank(self.group)} of the "
                f"{self.size} in process group '{self.group.group_name}' did not hear from all others. Each of them "
                "must run this layer, in training, as often as the others and in the same order, forward and backward; "
                f"one without data runs it on a batch of 0.\n{error}"
            ) from error
        return rows


def gather_traced(row: Tensor, group_name: str, size: int) -> Tensor:
    """Ranks.gather() as an operation that compilers see."""
    # Imported by those who compile alone: not every torch is built with the ops that it registers.
    from torch.distributed import _functional_collectives as collectives

    gather = _newest(collectives, "all_gather_single", "all_gather_tensor")
    rows: Tensor = gather(row, 0, group_name)
    return rows.view(size, -1)


def _newest(module: Any, name: str, older: str) -> Any:
    """A function that torch 2.13 has renamed: the old name is not there, or warns, where the new one is."""
    return getattr(module, name) if hasattr(module, name) else getattr(module, older)
