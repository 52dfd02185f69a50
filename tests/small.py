"""Reduced models of both tower kinds, built by the reference implementation, and inputs for them.

They keep what the originals have: heads of width 64, every kind of tensor, all parameters random.
"""

import torch
from torch import Tensor

from conversion.parity import random_texts

VOCAB_SIZE = 1000
CONTEXT_LENGTH = 20
TEXT = {
    "embed_dim": 48,
    "context_length": CONTEXT_LENGTH,
    "vocab_size": VOCAB_SIZE,
    "transformer_width": 128,
    "transformer_heads": 2,
    "transformer_layers": 3,
}
DIMENSIONS = {
    "vit": TEXT | {"image_resolution": 48, "vision_layers": 3, "vision_width": 128, "vision_patch_size": 16},
    "resnet": TEXT
    | {"image_resolution": 96, "vision_layers": (1, 2, 1, 1), "vision_width": 8, "vision_patch_size": None},
}
IMAGE_SIZES = {tower: dimensions["image_resolution"] for tower, dimensions in DIMENSIONS.items()}


def random_images(tower: str, count: int = 4, seed: int = 0) -> Tensor:
    """pixel_values (count, 3, size, size)."""
    size = IMAGE_SIZES[tower]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def texts(lengths: tuple[int, ...] = (3, 7, 12, CONTEXT_LENGTH), seed: int = 0) -> Tensor:
    """input_ids (len(lengths), CONTEXT_LENGTH), padded with zeros as the original pads."""
    torch.manual_seed(seed)
    return random_texts(lengths, VOCAB_SIZE, CONTEXT_LENGTH)
