"""batch_norm as a differentiable function of x, weight and bias: reverse and forward mode, any order, vmap."""

from .functions import batch_norm

__all__ = ["batch_norm"]
