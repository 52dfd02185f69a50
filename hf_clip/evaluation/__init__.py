"""Measuring CLIP models on data sets, the way the papers do it. `metrics` need no model."""

from .composition import CompositionResult, evaluate_composition
from .feature_file import read_features, write_features
from .head_training import HeadResult, evaluate_head
from .interpolation import InterpolationResult, evaluate_interpolation
from .linear_probe import LinearProbeResult, evaluate_linear_probe, probe_features
from .mteb_encoder import mteb_model
from .probe_encoding import encode_splits
from .retrieval import RetrievalResult, evaluate_retrieval
from .zero_shot import ZeroShotResult, evaluate_zero_shot

__all__ = [
    "CompositionResult",
    "HeadResult",
    "InterpolationResult",
    "LinearProbeResult",
    "RetrievalResult",
    "ZeroShotResult",
    "encode_splits",
    "evaluate_composition",
    "evaluate_head",
    "evaluate_interpolation",
    "evaluate_linear_probe",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "mteb_model",
    "probe_features",
    "read_features",
    "write_features",
]
