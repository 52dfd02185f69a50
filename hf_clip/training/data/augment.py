"""Training images: a random part of each, scaled to the model's size, perhaps mirrored, its colours perhaps shifted.

Every image has a generator of random numbers of its own. So what is drawn depends on the row alone: not on workers,
processes, or what came before. Images are tensors once they are decoded, and the torch backend of the image processor
scales them.

Dimensions: B batch, C channels, Y × X pixels, y = x the side that the model gets.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ASPECTS = (3 / 4, 4 / 3)
"""How much wider or narrower than the model's image a part may be, which it is squeezed or stretched to."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom"""

ATTEMPTS = 10
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R 601-2, as Pillow has them)."""


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image.

    Attributes:
        crop: The least part of its area that is kept; 1 keeps what the image processor keeps.
        flip: Probability of mirroring; 0 by default, since there is writing in images.
        jitter: Brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter.
    """

    crop: float = 0.9
    flip: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(
                f"crop is {self.crop}, but must be above 0 and at most 1: the least part of the area kept."
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}, but must be a probability from 0 to 1.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}, but must be at least 0 and below 1.")

    @classmethod
    def parse(cls, text: str) -> "Augmentation":
        """Read an augmentation: `"crop=0.9,flip=0.5,jitter=0.2"`, or `"none"`. What is left out keeps its default."""
        if text.strip() == "none":
            return cls(crop=1.0)
        names = [field.name for field in fields(cls)]
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = (piece.strip() for piece in part.partition("="))
            try:
                if name not in names or name in values:
                    raise ValueError
                values[name] = float(number)
            except ValueError:
                raise ValueError(
                    f'The augmentation {text!r} cannot be read at {part.strip()!r}: write "none", or each of '
                    f'{", ".join(names)} at most once, as in "crop=0.9,flip=0.5,jitter=0.2".'
                ) from None
        return cls(**values)

    def part(self, size: tuple[int, int], aspects: tuple[float, float], rng: np.random.Generator) -> Box:
        """Draw the part of an image that is kept.

        Area and aspect (on a logarithmic scale) are drawn evenly, as in "Going deeper with convolutions". If none of
        ten draws fits, because the image is too long, the part is all of its shorter side and as much of the longer as
        the aspects allow, at a random place.

        Args:
            size: Width and height of the image.
            aspects: The least and the greatest ratio of width to height.
            rng: Random numbers.

        Returns:
            left, top, right, bottom
        """
        width, height = size
        for _ in range(ATTEMPTS):
            area = width * height * rng.uniform(self.crop, 1.0)
            aspect = math.exp(rng.uniform(math.log(aspects[0]), math.log(aspects[1])))
            w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
            if w <= width and h <= height:
                break
        else:
            w = min(width, max(1, round(height * aspects[1])))
            h = min(height, max(1, round(width / aspects[0])))
        left, top = int(rng.integers(width - w, endpoint=True)), int(rng.integers(height - h, endpoint=True))
        return left, top, left + w, top + h

    def draw_colours(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Draw what brightness, contrast and saturation are multiplied by."""
        brightness, contrast, saturation = rng.uniform(1 - self.jitter, 1 + self.jitter, size=3).tolist()
        return brightness, contrast, saturation

    def shift_colours(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Brightness, contrast and saturation of an image (C, Y, X) of floats from 0 to 1."""
        return shift_colours(pixels[None], torch.tensor([self.draw_colours(rng)]))[0]


def shift_colours(pixels: Tensor, factors: Tensor) -> Tensor:
    """Multiply brightness, contrast and saturation.

    Args:
        pixels: (B, 3, Y, X), floats from 0 to 1.
        factors: (B, 3), float32: of brightness, contrast and saturation.

    Returns:
        (B, 3, Y, X), floats from 0 to 1.
    """
    weights = torch.tensor(GREY).reshape(-1, 1, 1).to(pixels.device)
    brightness, contrast, saturation = factors.T.reshape(3, -1, 1, 1, 1)
    pixels = (pixels * brightness).clamp(0, 1)
    middle = (pixels * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pixels = (middle + (pixels - middle) * contrast).clamp(0, 1)
    grey = (pixels * weights).sum(1, keepdim=True)  # (B, 1, Y, X)
    return (grey + (pixels - grey) * saturation).clamp(0, 1)


@dataclass(frozen=True)
class Change:
    """What was drawn for one image.

    Attributes:
        box: The part that is kept: left, top, right, bottom. None is all of it.
        is_flipped: Whether it is mirrored.
        colours: What brightness, contrast and saturation are multiplied by. None leaves them as they are.
    """

    box: Box | None = None
    is_flipped: bool = False
    colours: tuple[float, float, float] | None = None


class AugmentedPixels:
    """Turns an image into pixel values (3, y, x), by an image processor's settings and an augmentation.

    `scaled` does what is done to each image by itself, `normalised` what can be done to a batch at once.
    """

    def __init__(self, image_processor: Any, augmentation: Augmentation):
        self.augmentation = augmentation
        steps = image_processor.steps()
        sides = [*dict(steps.size).values(), *dict(steps.crop_size).values()]
        self.draft = math.ceil(max(side for side in sides if side) / math.sqrt(augmentation.crop))
        """The shorter side that a JPEG needs, so that the smallest part still has twice the model's pixels."""
        self.frame_aspect = steps.crop_size.width / steps.crop_size.height
        self.fit = steps.fit
        if augmentation.crop < 1 and self.fit == "crop":
            steps = replace(steps, fit="squash")  # the part that was drawn takes the place of the centre
        self.steps = steps

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Change:
        """Draw what happens to an image of (width, height)."""
        augmentation, box = self.augmentation, None
        if augmentation.crop < 1:
            # An image that is shown whole keeps its own aspect but for the part's.
            usual = self.frame_aspect if self.fit == "crop" else size[0] / size[1]
            box = augmentation.part(size, (ASPECTS[0] * usual, ASPECTS[1] * usual), rng)
        is_flipped = bool(augmentation.flip) and rng.random() < augmentation.flip
        return Change(box, is_flipped, augmentation.draw_colours(rng) if augmentation.jitter else None)

    def cut(self, image: Image.Image, change: Change) -> Tensor:
        """An image's part in RGB (Y, X, 3), uint8."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        if change.box is not None:
            image = image.crop(change.box)
        return torch.from_numpy(np.array(image))

    def scaled(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """An image's part in the model's size (C, y, x): grey levels, or with jitter floats from 0 to 1."""
        change = self.draw(image.size, rng)
        return self.finished(self.cut(image, change), change)

    def finished(self, part: Tensor, change: Change) -> Tensor:
        """An image's part (Y, X, 3) in the model's size (C, y, x), flipped and with its colours shifted."""
        pixels = self.steps.scale_tensor(part.movedim(-1, 0)[None])
        if change.is_flipped:
            pixels = pixels.flip(-1)
        if change.colours is not None:
            pixels = shift_colours(pixels / 255, torch.tensor([change.colours]))
        return pixels[0]

    def normalised(self, pixels: Tensor) -> Tensor:
        """(B, C, y, x) as `scaled` makes them → pixel values."""
        return self.steps.normalise_tensor(pixels, is_levels=not self.augmentation.jitter)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        return self.normalised(self.scaled(image, rng)[None])[0]
