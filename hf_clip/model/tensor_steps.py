"""The steps of the image processor for tensors: resize, cut, convert to RGB, add margins, divide, normalise.

Those for Pillow images are in `image_steps`. Grey levels before the last step differ from theirs by at most one.

Dimensions: B batch, C channels, Y × X pixels, y × x pixels after resizing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image_steps import PillowSteps, Writer
from .open_image import UnreadableImageError, at_place, channel_axis, check_unit_range, is_to_be_opened, to_image
from .resize_tensors import scale_and_cut_tensor

TORCH_FILTERS = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}


@dataclass(frozen=True)
class Steps(PillowSteps):
    """The settings of one call, and the steps that they ask for, for Pillow images and for tensors.

    - `run` carries out all steps for one Pillow image (`backend="pil"`).
    - `run_tensor` carries them out for a batch of tensors of one size (`backend="torch"`).
    """

    def scale_tensor(self, pixels: Tensor) -> Tensor:
        """Resize and cut a batch of images, and convert grey images to RGB.

        Args:
            pixels: (B, C, Y, X), uint8 or floats from 0 to 1.

        Returns:
            (B, C, y, x). uint8 becomes grey levels from 0 to 255, as uint8 or as whole floats. Floats stay floats from
            0 to 1.
        """
        is_levels = pixels.dtype == torch.uint8
        layout = self.layout((pixels.shape[3], pixels.shape[2]))
        if pixels.shape[1] == 1 and self.do_convert_rgb:
            pixels = pixels.expand(-1, 3, -1, -1)
        pixels = scale_and_cut_tensor(pixels, layout, TORCH_FILTERS.get(self.resample, "bicubic"))
        if margins := self.margins(pixels.shape[2], pixels.shape[3]):
            colour = torch.as_tensor(self.margin_colour() / (1 if is_levels else 255), device=pixels.device)
            frame = torch.empty(*pixels.shape[:2], self.crop_size.height, self.crop_size.width, device=pixels.device)
            frame[:] = colour.reshape(-1, 1, 1)
            left, right, top, bottom = margins
            frame[..., top : frame.shape[2] - bottom, left : frame.shape[3] - right] = pixels
            pixels = frame
        return pixels

    def normalise_tensor(self, pixels: Tensor, is_levels: bool) -> Tensor:
        """Divide and normalise a batch of images.

        Args:
            pixels: (B, C, y, x), grey levels from 0 to 255 of any dtype, or floats from 0 to 1.
            is_levels: Whether these are grey levels.

        Returns:
            (B, C, y, x), float32, on the same device.
        """
        scale, shift = self.scale_and_shift(is_levels)
        scale = scale.to(pixels.device)
        if shift is None:
            return pixels.float() * scale
        if is_levels:  # in place, which no gradient forbids: fresh memory costs more time than the arithmetic
            return pixels.float().mul_(scale).sub_(shift.to(pixels.device))
        return torch.addcmul(-shift.to(pixels.device), pixels, scale)

    def scale_and_shift(self, is_levels: bool) -> tuple[Tensor, Tensor | None]:
        """Compute what normalises an image: it is multiplied by the first, and the second is subtracted.

        Args:
            is_levels: Whether images are grey levels from 0 to 255, or floats from 0 to 1.

        Returns:
            Two tensors (C, 1, 1) or (1, 1, 1), float32, on the CPU. The second is None without `do_normalize`.
        """
        divisor = self.divisor(is_scaled=not is_levels)
        scale = (1.0 if divisor is None else 1 / divisor) * (1 if is_levels else 255.0)
        if not self.do_normalize:
            return torch.tensor(scale, dtype=torch.float32).reshape(1, 1, 1), None
        mean, std = (
            torch.tensor(np.atleast_1d(values), dtype=torch.float32).reshape(-1, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        return scale / std, mean / std

    def normalise_tensor_exactly(self, levels: Tensor) -> Tensor:
        """Divide and normalise grey levels with the operations of `run` in their order, on any device.

        Args:
            levels: (B, C, y, x), grey levels from 0 to 255 of any dtype.

        Returns:
            (B, C, y, x), float32, on the same device.
        """

        def column(values: Any) -> Tensor:
            # A tensor, since a GPU multiplies by the inverse of a number, which differs in the last bit.
            return torch.tensor(np.atleast_1d(values), dtype=torch.float32).reshape(-1, 1, 1).to(levels.device)

        divisor = self.divisor(is_scaled=False)
        pixels = levels.float() if divisor is None else levels.float() / column(divisor)
        if not self.do_normalize:
            return pixels
        return pixels.sub_(column(self.image_mean)).div_(column(self.image_std))

    def run_tensor(self, pixels: Tensor) -> Tensor:
        """Carry out all steps for a batch of images.

        Args:
            pixels: (B, C, Y, X), uint8 or floats from 0 to 1.

        Returns:
            (B, C, y, x), float32, on the same device.
        """
        return self.normalise_tensor(self.scale_tensor(pixels), is_levels=pixels.dtype == torch.uint8)


class _PixelsToRead:
    """The pixels of a Pillow image for numpy, as if they could be written.

    Pillow gives away bytes. torch warns of an array of such memory, which it would never write here, and a copy of it
    would take a tenth of the time of all steps.
    """

    def __init__(self, image: Image.Image):
        self.pixels = np.asarray(image)
        interface = self.pixels.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def to_tensor(item: Any, steps: Steps, data_format: str | None, device: Any, draft: int | None) -> Tensor:
    """Open one image if needed, and return it as (C, Y, X), uint8 or float."""
    if is_to_be_opened(item):
        item = to_image(item, draft=draft)
    if isinstance(item, Image.Image):
        image = to_image(item)
        is_converted = steps.do_convert_rgb and image.mode != "RGB"
        item = np.asarray(_PixelsToRead(image.convert("RGB") if is_converted else image))
        data_format = None if item.ndim == 2 else "channels_last"
    if not hasattr(item, "ndim") or item.ndim not in (2, 3):
        to_image(item)  # raises the error that says what is wrong with it
    if isinstance(item, np.ndarray):
        item = np.require(item, requirements=["C", "W"])  # torch warns of any other array, or refuses it
    pixels = torch.as_tensor(item, device=device)
    if pixels.ndim == 2:
        pixels, data_format = pixels[None], "channels_first"
    return pixels.movedim(channel_axis(tuple(pixels.shape), data_format), 0)


def has_levels_here(item: Any) -> bool:
    """Whether an item is an image of grey levels in the memory of the CPU, or will be one when it is opened."""
    if isinstance(item, Tensor):
        return item.dtype == torch.uint8 and item.device.type == "cpu"
    return is_to_be_opened(item) or isinstance(item, Image.Image) or getattr(item, "dtype", None) == np.uint8


class LevelsByTorch:
    """Resizes and cuts images of grey levels on the CPU, with the arithmetic of torch, and normalises with numpy.

    The result equals that of `Steps.run_tensor`, which would start threads for the arithmetic.
    """

    def __init__(self, steps: Steps, data_format: str | None, draft: int | None):
        self.steps, self.data_format, self.draft = steps, data_format, draft
        scale, shift = steps.scale_and_shift(is_levels=True)
        self.scale, self.shift = scale.numpy(), None if shift is None else shift.numpy()

    def prepare(self, item: Any, threads: int) -> Writer:
        """Resize and cut an image. The result is as that of `Steps.run`."""
        pixels = to_tensor(item, self.steps, self.data_format, "cpu", self.draft)
        levels = self.steps.scale_tensor(pixels[None])[0].numpy()
        return partial(self._normalise, np.ascontiguousarray(levels))

    def _normalise(self, levels: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        """Normalise grey levels (C, y, x) → float32, into `out` unless that is None."""
        out = np.empty(levels.shape, dtype=np.float32) if out is None else out
        np.multiply(levels, self.scale, out=out, casting="unsafe")
        return out if self.shift is None else np.subtract(out, self.shift, out=out)


def stack_images(tensors: list[Tensor]) -> Tensor:
    """Stack images (C, Y, X) → (B, C, Y, X). Channels side by side in memory stay so, which makes resizing faster."""
    if len(tensors) == 1:
        return tensors[0][None]
    if tensors[0].stride(0) == 1:
        return torch.stack([tensor.movedim(0, -1) for tensor in tensors]).movedim(-1, 1)
    return torch.stack(tensors)


def check_pixels(pixels: Tensor, first: int) -> None:
    """Raise UnreadableImageError for a batch (B, C, Y, X) that is neither uint8 nor floats from 0 to 1.

    `first` is the place of the batch's first image, from which the error counts.
    """
    if pixels.dtype == torch.uint8:
        return
    if not pixels.is_floating_point():
        problem = f" is a tensor of {pixels.dtype}, but uint8 from 0 to 255 or floats from 0 to 1 are needed."
        raise UnreadableImageError(problem, first)
    with torch.no_grad():
        flat = pixels.flatten(1)
        low, high = flat.amin(1), flat.amax(1)  # both are NaN if any value is
        for index, (least, most) in enumerate(zip(low.tolist(), high.tolist(), strict=True), start=first):
            with at_place(index):
                check_unit_range(least, most)
