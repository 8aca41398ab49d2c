"""Differentiable batch_norm and sync_batch_norm.

batch_norm is differentiable with respect to x, weight, bias and residual, in reverse and forward mode, to any order,
and supports vmap. sync_batch_norm, for a batch distributed over several ranks, supports reverse mode, to any order.
"""

from .functions import Spec, batch_norm
from .synchronised import sync_batch_norm

__all__ = ["Spec", "batch_norm", "sync_batch_norm"]
