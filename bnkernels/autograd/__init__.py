"""batch_norm as a differentiable function of x, weight and bias: reverse and forward mode, any order, vmap.

fused_batch_norm is the same with an addition, a ReLU or both behind it; sync_batch_norm for a batch that lies on
several ranks: reverse mode, any order.
"""

from .functions import batch_norm
from .fused import fused_batch_norm
from .synchronised import sync_batch_norm

__all__ = ["batch_norm", "fused_batch_norm", "sync_batch_norm"]
