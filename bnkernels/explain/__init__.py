"""Prints the execution plan of a BatchNorm on a GPU: bnkernels.explain(), python -m bnkernels.explain."""

from .explanation import Explanation, explain
from .model import LayerExplanation, ModelExplanation, explain_model

__all__ = ["Explanation", "LayerExplanation", "ModelExplanation", "explain", "explain_model"]
