"""The collective of synchronised BatchNorm: an all-gather of one row of per-channel values per rank.

An all-gather and not an all-reduce: means and squared deviations are combined by Chan's formula, not added
(csrc/core/problem_sync.h). Every rank combines the rows in rank order, so all ranks get bitwise equal results,
whichever reduction algorithm the backend would use.
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
    """A process group of `size` ranks. layer describes the layer that uses it, for error messages."""

    group: ProcessGroup
    size: int
    layer: str

    def gather(self, row: Tensor, x: Tensor, what: str) -> Tensor:
        """All-gathers a row.

        One collective. Whether the host waits for it depends on the backend, as for any torch.distributed collective.

        Args:
            row: this rank's values, of the same size and dtype on every rank.
            x, what: the input and the step of the computation, for the error message.

        Returns:
            The rows in rank order, (size, row.numel()).

        Raises:
            RuntimeError: the backend's error or a subclass, with the name of the layer.
        """
        gather = _first_available(dist, "all_gather_single", "all_gather_into_tensor")
        rows = row.new_empty(self.size, row.numel())
        try:
            gather(rows.view(-1), row, group=self.group)
        except RuntimeError as error:
            kind = type(error) if isinstance(error, dist.DistError) else RuntimeError
            raise kind(
                f"{self.layer}: the collective of {what} failed or timed out for an input of shape {tuple(x.shape)} on "
                f"rank {dist.get_rank(self.group)} of {self.size} of process group '{self.group.group_name}'. Every "
                "rank must call this layer in training mode the same number of times and in the same order, forward "
                f"and backward; a rank without data passes an empty batch.\n{error}"
            ) from error
        return rows


def gather_traced(row: Tensor, group_name: str, size: int) -> Tensor:
    """Ranks.gather() as a functional collective, which torch.compile can trace."""
    # Imported lazily: some builds of torch lack the ops that this module registers.
    from torch.distributed import _functional_collectives as collectives

    gather = _first_available(collectives, "all_gather_single", "all_gather_tensor")
    rows: Tensor = gather(row, 0, group_name)
    return rows.view(size, -1)


def _first_available(module: Any, name: str, old_name: str) -> Any:
    """A function that torch 2.13 renamed. The old name may be missing or deprecated in versions with the new one."""
    return getattr(module, name) if hasattr(module, name) else getattr(module, old_name)
