"""How a BatchNorm would run on a GPU, in words and figures: bnkernels.explain(), python -m bnkernels.explain."""

from .explanation import Explanation, explain
from .model import LayerExplanation, ModelExplanation, explain_model

__all__ = ["Explanation", "LayerExplanation", "ModelExplanation", "explain", "explain_model"]
