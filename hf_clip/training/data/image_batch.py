"""A batch's images on their way from the workers to the model: whole grey levels, of which `to` makes pixel values.

Grey levels take a quarter of the memory of pixel values, in the workers' queues and on the way to a GPU. They are
normalised where the model is. Scaled images are of the model's size already. Decoded images have sizes of their own,
and are scaled where the model is too, all together.

Both stand where a tensor of pixel values (B, 3, y, x) would: they have a length, can be split, and `to` moves them.

Dimensions: B batch, C channels, Y × X pixels, y × x pixels that the model gets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ...model.tensor_steps import Steps
from .augment import shift_colours
from .device_scaling import Placement, scale_on_device


@dataclass
class PreparedImage:
    """One image as a worker leaves it.

    Attributes:
        pixels: Scaled: (C, y, x), grey levels as uint8 or floats, or with jitter floats from 0 to 1. Decoded:
            (Y, X, 3), uint8.
        is_flipped: Of a decoded image: whether it is to be mirrored.
        colours: Of a decoded image: what brightness, contrast and saturation are multiplied by.
    """

    pixels: Tensor
    is_flipped: bool = False
    colours: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Normalisation:
    """How grey levels become pixel values.

    Attributes:
        steps: Of the image processor.
        is_exact: Whether in the image processor's own order of operations, equal in every bit, and not in the fastest.
        is_levels: Whether there are grey levels, and not floats from 0 to 1.
    """

    steps: Steps
    is_exact: bool
    is_levels: bool = True

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.is_exact:
            return self.steps.normalise_tensor_exactly(pixels)
        return self.steps.normalise_tensor(pixels, is_levels=self.is_levels)


class ImageBatch:
    """What both kinds of batches have in common with a tensor of pixel values."""

    def to(self, device: Any, non_blocking: bool = False) -> Tensor:
        """Make the pixel values (B, 3, y, x), float32, on a device."""
        raise NotImplementedError

    def part(self, start: int, end: int) -> "ImageBatch":
        raise NotImplementedError

    def pin_memory(self) -> "ImageBatch":
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def split(self, size: int) -> tuple["ImageBatch", ...]:
        """Cut into parts of so many images, of which the last may have fewer; of no image comes one part."""
        return tuple(self.part(start, start + size) for start in range(0, max(len(self), 1), size))


@dataclass
class ScaledImages(ImageBatch):
    """Images (B, C, y, x) of the model's size."""

    pixels: Tensor
    normalise: Normalisation

    @classmethod
    def of(cls, images: Sequence[PreparedImage], normalise: Normalisation) -> "ScaledImages":
        crop = normalise.steps.crop_size
        if not images:
            return cls(torch.zeros(0, 3, crop.height, crop.width, dtype=torch.uint8), normalise)
        # In a worker it stacks in shared memory, where the main process reads.
        return cls(default_collate([image.pixels for image in images]), normalise)

    def __len__(self) -> int:
        return len(self.pixels)

    def part(self, start: int, end: int) -> "ScaledImages":
        return replace(self, pixels=self.pixels[start:end])

    def pin_memory(self) -> "ScaledImages":
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: Any, non_blocking: bool = False) -> Tensor:
        return self.normalise(self.pixels.to(device, non_blocking=non_blocking))


@dataclass
class DecodedImages(ImageBatch):
    """Images of sizes of their own, one behind the other.

    Attributes:
        levels: Grey levels of all images (…,), uint8. Each image is (Y, X, 3).
        sizes: (width, height) of each.
        flips: Whether each is to be mirrored.
        colours: What brightness, contrast and saturation of each are multiplied by; None where nothing is.
        normalise: What is done at the end.
    """

    levels: Tensor
    sizes: list[tuple[int, int]]
    flips: list[bool]
    colours: list[tuple[float, float, float]] | None
    normalise: Normalisation

    @classmethod
    def of(cls, images: Sequence[PreparedImage], normalise: Normalisation) -> "DecodedImages":
        parts = [image.pixels.reshape(-1) for image in images]
        colours = [image.colours for image in images if image.colours is not None]
        return cls(
            torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8),
            [(image.pixels.shape[1], image.pixels.shape[0]) for image in images],
            [image.is_flipped for image in images],
            colours or None,
            normalise,
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def part(self, start: int, end: int) -> "DecodedImages":
        first, last = (sum(3 * width * height for width, height in self.sizes[:place]) for place in (start, end))
        return replace(
            self,
            levels=self.levels[first:last],
            sizes=self.sizes[start:end],
            flips=self.flips[start:end],
            colours=None if self.colours is None else self.colours[start:end],
        )

    def pin_memory(self) -> "DecodedImages":
        return replace(self, levels=self.levels.pin_memory())

    def _images(self, levels: Tensor) -> Iterator[Tensor]:
        counts = [3 * width * height for width, height in self.sizes]
        for (width, height), image in zip(self.sizes, levels.split(counts), strict=True):
            yield image.view(height, width, 3)

    def to(self, device: Any, non_blocking: bool = False) -> Tensor:
        steps, there = self.normalise.steps, torch.device(device)
        crop = steps.crop_size
        if not self.sizes:
            return torch.zeros(0, 3, crop.height, crop.width, device=there)
        images = list(self._images(self.levels.to(there, non_blocking=non_blocking)))
        placements = [Placement.of(steps, size) for size in self.sizes]
        pixels = scale_on_device(images, placements, (crop.width, crop.height), steps)
        if any(self.flips):
            flips = torch.tensor(self.flips).to(there, non_blocking=non_blocking)
            pixels = torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
        if self.colours is not None:
            factors = torch.tensor(self.colours, dtype=torch.float32).to(there, non_blocking=non_blocking)
            pixels = shift_colours(pixels / 255, factors)
        return self.normalise(pixels)
