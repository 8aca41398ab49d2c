"""batch_norm as a differentiable function of x, weight, bias and a residual: reverse and forward mode, any order, vmap.

sync_batch_norm is the same for a batch that lies on several ranks: reverse mode, any order.
"""

from .functions import Spec, batch_norm
from .synchronised import sync_batch_norm

__all__ = ["Spec", "batch_norm", "sync_batch_norm"]
