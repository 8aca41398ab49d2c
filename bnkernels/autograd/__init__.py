"""batch_norm as a differentiable function of x, weight and bias: reverse and forward mode, any order, vmap.

sync_batch_norm is the same for a batch that lies on several ranks: reverse mode, any order.
"""

from .functions import batch_norm
from .synchronised import sync_batch_norm

__all__ = ["batch_norm", "sync_batch_norm"]
