"""OpenAI's checkpoints: reading them without running them, naming their tensors, fetching them."""

from .archive import Checkpoint, CheckpointError, read_checkpoint
from .keys import config_from_shapes, convert_names, identify_variant, original_names
from .reading import read_original

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "config_from_shapes",
    "convert_names",
    "identify_variant",
    "original_names",
    "read_checkpoint",
    "read_original",
]
