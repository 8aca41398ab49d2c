"""Forwards in training that leave the running statistics as they are: of recomputation, and of whatever runs twice.

torch.utils.checkpoint runs a block in the forward and once more in the backward. A BatchNorm in it is in training both
times, so torch's and this package's alike update their running statistics twice: two batches are counted, and the
averages have moved by 1 - (1 - momentum)^2 of the way. With checkpoint_contexts() there is one update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import ForwardMixin


def no_statistics_update(model: nn.Module) -> AbstractContextManager[None]:
    """Within it, the BatchNorms of a model that are in training normalise by the batch and leave their buffers alone.

        with bnk.no_statistics_update(model):
            loss = criterion(model(x), target)      # e.g. the second forward of sharpness-aware minimisation

    This package's BatchNorms and torch's, eager and compiled; inference does not change. It is their flag
    track_running_stats that is down meanwhile, so whatever else runs the model at that time sees it too.
    """
    return _not_tracking(module for module in model.modules() if isinstance(module, _BatchNorm))


def checkpoint_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch.utils.checkpoint: the BatchNorms of a block update their statistics in its first forward alone.

        y = checkpoint(block, x, use_reentrant=False, context_fn=functools.partial(bnk.checkpoint_contexts, block))

    Only this package's: torch's save their running statistics for the backward, and torch.utils.checkpoint would miss
    them in the recomputation. They update twice, as ever.

    Returns:
        The contexts of the forward and of its recomputation, as a context_fn has to.

    torch takes a context_fn with use_reentrant=False only, and not within torch.compile. It needs none there: what is
    recomputed is the result, and the statistics are written once.
    """
    return nullcontext(), _not_tracking(module for module in block.modules() if isinstance(module, ForwardMixin))


@contextmanager
def _not_tracking(batch_norms: Iterable[_BatchNorm]) -> Iterator[None]:
    running_stats = [module for module in batch_norms if module.track_running_stats]
    try:
        for module in running_stats:
            module.track_running_stats = False
        yield
    finally:
        for module in running_stats:
            module.track_running_stats = True
