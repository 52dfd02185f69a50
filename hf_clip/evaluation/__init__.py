"""Measuring CLIP models on data sets, the way the papers do it. `metrics` need no model."""

from .composition import CompositionResult, evaluate_composition
from .mteb_encoder import mteb_model
from .retrieval import RetrievalResult, evaluate_retrieval
from .zero_shot import ZeroShotResult, evaluate_zero_shot

__all__ = [
    "CompositionResult",
    "RetrievalResult",
    "ZeroShotResult",
    "evaluate_composition",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "mteb_model",
]
