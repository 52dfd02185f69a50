"""The steps that turn one Pillow image into pixel values, with Pillow and numpy alone.

1. Resize, so that the shorter side has the model's image size.
2. Crop the centre to a square.
3. Convert to RGB.
4. Divide grey levels by 255.
5. Normalise: subtract the mean colour and divide by the standard deviation.

Invariant: the result equals that of OpenAI's transform in every bit. Pillow resizes the image in its own mode, sizes
and offsets are rounded in the same way, and steps 4 and 5 are the same float32 operations in the same order.

Neither torch nor transformers is imported here: a program that classifies with ONNX Runtime has the same pixels without
them.

Dimensions: C channels, Y × X pixels, y × x pixels after resizing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from .open_image import UNREADABLE, UnreadableImageError, to_image
from .resize import Layout, cut_centre, fit_inside, scale_and_cut, shorter_side_to
from .rust_resize import scale_and_cut_in_rust
from .variants import MOST_PIXELS

OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]

OPENAI_SETTINGS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
    "fit": "crop",
}
"""What an image processor does about which its files say nothing."""

FITS = ("crop", "pad", "squash")

Writer = Callable[[np.ndarray | None], np.ndarray]
"""Divides and normalises an image. It writes the result into the array (C, y, x), float32, that it is given, and
returns that; for None it makes the array."""


def check_fit(fit: Any) -> None:
    """Raise ValueError for an unknown `fit`."""
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r:.80}, but must be one of {', '.join(map(repr, FITS))}.")


def _check_numbers(name: str, values: Any, positive: bool) -> None:
    """Raise ValueError for values that pixels cannot be scaled by: no numbers, NaN, infinity, and divisors up to 0."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ValueError(f"{name} holds {value!r:.80}, but a finite number is needed.")
        if positive and value <= 0:
            raise ValueError(f"{name} holds {value}, but pixels are divided by it: a positive number is needed.")


@dataclass(frozen=True)
class PillowSteps:
    """The settings of one call, and the steps that they ask for. They are checked before any image is read.

    All attributes are explained at `HfClipImageProcessor`. Sizes have the attributes `shortest_edge`, `height` and
    `width`, as `SizeDict` of transformers has.

    - `layout` computes to which size an image is resized, and which part of it is cut out.
    - `run` carries out all steps for one Pillow image, and `prepare` for whatever is an image.
    """

    do_convert_rgb: bool
    do_resize: bool
    size: Any
    resample: Any
    do_center_crop: bool
    crop_size: Any
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any
    fit: str

    def __post_init__(self) -> None:
        size, crop = self.size, self.crop_size
        for name in ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if (value := getattr(self, name)) not in (None, True, False):
                raise ValueError(f"{name} is {value!r:.80}, but True or False is needed.")
        check_fit(self.fit)
        if self.fit != "crop" and not (self.do_resize and self.do_center_crop):
            raise ValueError(f"fit={self.fit!r} needs do_resize=True and do_center_crop=True.")
        if self.do_resize and not (size.shortest_edge or (size.height and size.width)):
            raise ValueError(
                f'size is {dict(size)}, but {{"shortest_edge": n}} or {{"height": h, "width": w}} is needed.'
            )
        if self.do_resize and (isinstance(self.resample, str) or self.resample not in list(Image.Resampling)):
            raise ValueError(
                f"resample is {self.resample!r:.80}, but one of PIL.Image.Resampling is needed; 3 is bicubic."
            )
        if self.do_center_crop and not (crop.height and crop.width):
            raise ValueError(f'crop_size is {dict(crop)}, but {{"height": h, "width": w}} is needed.')
        for name, sides in (("size", size), ("crop_size", crop)):
            for side in (sides.shortest_edge, sides.height, sides.width):
                if side is not None and not (isinstance(side, (int, np.integer)) and 0 < side <= MOST_PIXELS):
                    raise ValueError(
                        f"{name} has a side of {side!r:.80}, but a whole number of pixels from 1 to {MOST_PIXELS:,} is "
                        f"needed."
                    )
        if self.do_rescale:
            _check_numbers("rescale_factor", [self.rescale_factor], positive=False)
            if self.rescale_factor == 0:
                raise ValueError("rescale_factor holds 0, but pixels are multiplied by it. OpenAI's is 1 / 255.")
        if self.do_normalize:
            for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
                values = values if isinstance(values, (list, tuple, np.ndarray)) else [values]
                if len(values) not in (1, 3):
                    raise ValueError(
                        f"{name} has {len(values)} values; images need one number, or one per channel: three."
                    )
                _check_numbers(name, values, positive=name == "image_std")

    def layout(self, size: tuple[int, int]) -> Layout:
        """Compute the size to which an image of (width, height) is resized, and the box that is cut out of it."""
        new_size = size
        frame: tuple[int, int] | None = (self.crop_size.width, self.crop_size.height) if self.do_center_crop else None
        if frame is not None and self.fit == "pad":
            new_size = fit_inside(size, frame)
        elif frame is not None and self.fit == "squash":
            new_size = frame
        elif self.do_resize and self.size.shortest_edge:
            new_size = shorter_side_to(size, self.size.shortest_edge)
        elif self.do_resize:
            new_size = (self.size.width, self.size.height)
        if frame is None or self.fit == "pad":
            return Layout(new_size, (0, 0, *new_size))
        return Layout(new_size, cut_centre(new_size, frame))

    def margins(self, height: int, width: int) -> tuple[int, int, int, int] | None:
        """Compute the margins that `fit="pad"` adds: columns left and right, rows above and below. None otherwise."""
        if self.fit != "pad":
            return None
        left, top = (self.crop_size.width - width) // 2, (self.crop_size.height - height) // 2
        return left, self.crop_size.width - width - left, top, self.crop_size.height - height - top

    def margin_colour(self) -> np.ndarray:
        """Return the mean colour as grey levels from 0 to 255. Margins of this colour are nearly 0 once normalised."""
        mean = np.asarray([0.0] if self.image_mean is None else self.image_mean, dtype=np.float64)
        return np.round(mean * (1 / self.rescale_factor if self.do_rescale else 1)).clip(0, 255)

    def draft_side(self) -> int | None:
        """Return the least shorter side at which a JPEG may be decoded, in pixels. None without resizing."""
        if not self.do_resize:
            return None
        sizes = [self.size.shortest_edge, self.size.height, self.size.width]
        if self.do_center_crop:
            sizes += [self.crop_size.height, self.crop_size.width]
        return max(side for side in sizes if side)

    def divisor(self, is_scaled: bool) -> float | None:
        """Return the divisor of grey levels, or None.

        Without `do_rescale` an image that was given as floats from 0 to 1 (`is_scaled`) is brought back to that scale.
        """
        if self.do_rescale:
            # The original divides by 255. To multiply by the inverse would differ in the last bit.
            return 1 / self.rescale_factor
        return 255.0 if is_scaled else None

    def levels(self, image: Image.Image) -> np.ndarray:
        """Resize and cut one Pillow image, and convert it to RGB.

        Args:
            image: A Pillow image.

        Returns:
            Grey levels (y, x, C), uint8.
        """
        image = scale_and_cut(image, self.layout(image.size), int(self.resample or 0))
        if self.do_convert_rgb and image.mode != "RGB":
            image = image.convert("RGB")
        levels = np.asarray(image)
        levels = levels[..., None] if levels.ndim == 2 else levels
        if margins := self.margins(*levels.shape[:2]):
            left, right, top, bottom = margins
            framed = np.empty((self.crop_size.height, self.crop_size.width, levels.shape[2]), levels.dtype)
            framed[:] = self.margin_colour()
            framed[top : len(framed) - bottom, left : framed.shape[1] - right] = levels
            levels = framed
        return levels

    def _planes(self, image: Image.Image, threads: int) -> np.ndarray:
        """Resize and cut one image, and convert it to RGB → (C, y, x), uint8, or whole float32 of memory of its own."""
        planes = None
        if self.do_resize and self.fit != "pad":
            layout = self.layout(image.size)
            planes = scale_and_cut_in_rust(image, layout, int(self.resample), threads)
        if planes is None:
            return np.ascontiguousarray(self.levels(image).transpose(2, 0, 1))  # the arithmetic is slow across strides
        return np.repeat(planes, 3, axis=0) if self.do_convert_rgb and len(planes) == 1 else planes

    def run(self, image: Image.Image, is_scaled: bool, threads: int = 1) -> Writer:
        """Resize and cut one image, and convert it to RGB.

        Args:
            image: A Pillow image.
            is_scaled: Whether it was given as floats from 0 to 1.
            threads: Number of threads of the caller that run these steps at the same time.

        Returns:
            A function that divides and normalises the image.
        """
        return partial(self._normalise, self._planes(image, threads), self.divisor(is_scaled))

    def prepare(self, item: Any, data_format: str | None = None, draft: int | None = None, threads: int = 1) -> Writer:
        """Carry out all steps for an image in any of the accepted forms.

        Args:
            item: What `to_image` takes.
            data_format: As for `to_image`.
            draft: As for `to_image`.
            threads: As for `run`.

        Returns:
            As for `run`.

        Raises:
            UnreadableImageError: The item is no image, or cannot be opened or processed. A ValueError.
        """
        is_scaled = hasattr(item, "dtype") and "float" in str(item.dtype)
        image = to_image(item, data_format=data_format, draft=draft)
        try:
            return self.run(image, is_scaled, threads)
        except UNREADABLE as error:
            described = f"mode {image.mode}, {image.width}x{image.height}"
            raise UnreadableImageError(f" ({described}) cannot be processed: {error}") from error

    def _normalise(self, levels: np.ndarray, divisor: float | None, out: np.ndarray | None) -> np.ndarray:
        """Divide and normalise grey levels (C, y, x) → float32, into `out` unless that is None."""
        if out is None:
            is_own = levels.dtype == np.float32 and levels.flags.c_contiguous
            out = levels if is_own else np.empty(levels.shape, dtype=np.float32)
        np.divide(levels, np.float32(1 if divisor is None else divisor), out=out, casting="unsafe")
        if self.do_normalize:
            mean, std = (
                np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (self.image_mean, self.image_std)
            )
            np.subtract(out, mean, out=out)
            np.divide(out, std, out=out)
        return out
