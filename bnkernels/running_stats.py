"""Training forwards that do not update the running statistics, for recomputation and for repeated forwards.

torch.utils.checkpoint runs a block in the forward and again in the backward, both times in training mode. Every
BatchNorm in it, torch's or this package's, then updates its running statistics twice: num_batches_tracked increases by
2, and the averages move by a factor of 1 - (1 - momentum)^2 instead of momentum. checkpoint_contexts() prevents the
second update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import ForwardMixin


def no_statistics_update(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager in which BatchNorms in training use the batch statistics but do not update their buffers.

        with bnk.no_statistics_update(model):
            loss = criterion(model(x), target)      # e.g. the second forward of sharpness-aware minimisation

    Works for BatchNorms of this package and of torch, eager and compiled. Inference does not change. It sets
    track_running_stats to False meanwhile, which affects other threads that run the model at the same time.
    """
    return _not_tracking(module for module in model.modules() if isinstance(module, _BatchNorm))


def checkpoint_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """A context_fn for torch.utils.checkpoint: the BatchNorms of a block update their statistics once, not twice.

        y = checkpoint(block, x, use_reentrant=False, context_fn=functools.partial(bnk.checkpoint_contexts, block))

    Applies to BatchNorms of this package only; torch's still update twice. torch's save their running statistics for
    the backward, and torch.utils.checkpoint would report them missing from the recomputation.

    torch accepts a context_fn with use_reentrant=False only, and not inside torch.compile, where none is needed: the
    compiled recomputation does not write the statistics.

    Returns:
        The context managers of the forward and of the recomputation.
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
