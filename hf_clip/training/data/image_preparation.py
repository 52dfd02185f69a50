"""What a worker does with an image: all of the scaling, or so much that the device of the model can do the rest.

Training images are augmented. They are scaled as by the image processor's torch backend, within one grey level of the
default. Without an augmentation, as in evaluation, images are equal in every bit to the image processor's by default.

On the device images are scaled with Pillow's arithmetic, so that the two ways differ by at most one grey level in
training, and not at all in evaluation. What is drawn is drawn by the worker in both ways.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...model.tensor_steps import TORCH_FILTERS
from .augment import Augmentation, AugmentedPixels
from .image_batch import DecodedImages, ImageBatch, Normalisation, PreparedImage, ScaledImages

MOST_SENT = 1 << 20
"""Pixels of an image that is sent to the device as it is; a larger one is scaled by the worker. A batch of the largest
takes 3 MiB for each image, on its way and on the device."""

SCALED_THERE = ("RGB", "L")
"""Modes whose images may be scaled in RGB. Others are scaled in their own mode and converted at the end."""


class ImagePreparation:
    """Opened images → prepared images → a batch.

    Attributes:
        draft: The shorter side that a JPEG needs, or None where it is decoded in full.
    """

    def __init__(self, image_processor: Any, augmentation: Augmentation | None, *, on_device: bool = False):
        self.augmented = None if augmentation is None else AugmentedPixels(image_processor, augmentation)
        self.draft = self.augmented.draft if self.augmented else None
        self.steps = self.augmented.steps if self.augmented else image_processor.steps()
        self.on_device = on_device
        is_jittered = augmentation is not None and augmentation.jitter > 0
        self.normalisation = Normalisation(self.steps, is_exact=augmentation is None, is_levels=not is_jittered)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> PreparedImage:
        """Prepare one image. Raises any of `UNREADABLE`."""
        if self.augmented is None:
            return PreparedImage(self._plain(image))
        change = self.augmented.draw(image.size, rng)
        part = self.augmented.cut(image, change)
        if not self.on_device:
            return PreparedImage(self.augmented.finished(part, change))
        if part.shape[0] * part.shape[1] > MOST_SENT:
            part = self.steps.scale_tensor(part.movedim(-1, 0)[None])[0].movedim(0, -1).to(torch.uint8)
        return PreparedImage(part, change.is_flipped, change.colours)

    def _plain(self, image: Image.Image) -> Tensor:
        """Grey levels of what the image processor makes of an image."""
        is_known = image.mode in SCALED_THERE and self.steps.resample in TORCH_FILTERS
        if self.on_device and is_known and image.width * image.height <= MOST_SENT:
            return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))
        levels = torch.from_numpy(np.array(self.steps.levels(image)))  # (y, x, C)
        return levels if self.on_device else levels.movedim(-1, 0)

    def batch(self, images: Sequence[PreparedImage]) -> ImageBatch:
        """Put images together, of which there may be none."""
        kind = DecodedImages if self.on_device else ScaledImages
        return kind.of(images, self.normalisation)


__all__ = ["MOST_SENT", "ImagePreparation"]
