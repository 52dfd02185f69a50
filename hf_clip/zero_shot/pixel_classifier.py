"""What the classifiers of `classify_stream` that compute with torch have in common: from an image to its features.

Dimensions: B batch, D embedding, y × x pixels.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .features import encode_pixels, image_processor_of


class PixelClassifier(ABC):
    """A classifier that prepares images one by one, and encodes a batch of them at once.

    Attributes:
        model: The model that encodes images.
        processor: Its processor, or its image processor.
    """

    model: Any
    processor: Any

    @abstractmethod
    def _rank_features(self, features: Tensor, top_k: int | None) -> list[list[dict[str, Any]]]:
        """Find the labels and scores of images, best first.

        Args:
            features: (B, D) of length one.
            top_k: Number of labels for each image. None: all.

        Returns:
            For each image a list of dictionaries with `label` and `score`.
        """

    def pixels_of(self, image: Any, **settings: Any) -> Tensor:
        """Prepare one image for `rank_pixels`. Threads may call this at the same time.

        Args:
            image: A Pillow image, or what else the image processor takes.
            **settings: Arguments for the image processor, e.g. `fit="pad"`.

        Returns:
            Pixel values (3, y, x), float32.

        Raises:
            UnreadableImageError: It cannot be read. A ValueError.
        """
        return image_processor_of(self.processor)([image], return_tensors="pt", **settings)["pixel_values"][0]

    def rank_pixels(self, pixels: list[Tensor], top_k: int | None) -> list[list[dict[str, Any]]]:
        """Encode a batch of images, and find the labels and scores of each one, best first.

        Args:
            pixels: What `pixels_of` made of each image.
            top_k: Number of labels for each image. None: all.

        Returns:
            For each image a list of dictionaries with `label` and `score`.
        """
        return self._rank_features(encode_pixels(self.model, torch.stack(pixels)), top_k)


__all__ = ["PixelClassifier"]
