"""Lay a map of heat over an image: what is hot is coloured, what is cold is left as it is.

The colours run from dark purple through red to light yellow. Equal steps of heat are equal steps for the eye: the
colours stand at equal distances on a path in the space OKLab (Ottosson 2020), whose distances are those that people
see. They grow lighter on the way, so the map is readable without seeing colours, too.

Dimensions: Y × X cells of the map, y × x pixels of the image.
"""

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from ..model.open_image import to_image
from .seen_square import seen_region

LEVELS = 256

STATIONS = ((0.38, 0.13, 305.0), (0.50, 0.19, 345.0), (0.65, 0.20, 30.0), (0.78, 0.16, 65.0), (0.95, 0.12, 105.0))
"""Lightness, chroma and hue (in degrees) of the colours that the path runs through."""

OKLAB_TO_LMS = ((1, 0.3963377774, 0.2158037573), (1, -0.1055613458, -0.0638541728), (1, -0.0894841775, -1.2914855480))
LMS_TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)

SHARE_OF_UNSEEN = 0.35
"""Brightness at which the part is shown that the model did not see."""


def _path(count: int) -> np.ndarray:
    """Return colours in OKLab, (count, 3), at equal distances on the path through the stations."""
    stations = np.array(STATIONS)
    stations[:, 2] = np.unwrap(stations[:, 2], period=360)
    fine = np.linspace(0, len(stations) - 1, 64 * count)
    lightness, chroma, hue = (np.interp(fine, np.arange(len(stations)), column) for column in stations.T)
    lab = np.stack([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], axis=1)
    way = np.concatenate([[0], np.linalg.norm(np.diff(lab, axis=0), axis=1).cumsum()])
    even = np.linspace(0, way[-1], count)
    return np.stack([np.interp(even, way, column) for column in lab.T], axis=1)


@cache
def heat_colours() -> np.ndarray:
    """Make the colours of `overlay`.

    Returns:
        (256, 3) uint8, sRGB, from cold to hot. It cannot be written to.
    """
    linear = (_path(LEVELS) @ np.array(OKLAB_TO_LMS).T) ** 3 @ np.array(LMS_TO_RGB).T
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colours = np.round(255 * encoded).astype(np.uint8)
    colours.setflags(write=False)
    return colours


def _spread(heat: np.ndarray, size: tuple[int, int], region: tuple[float, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Scale a map (Y, X) to the pixels of the image that it covers.

    Returns:
        The heat of those pixels (y, x), and their box in the image: left, top, right, bottom.
    """
    left, top, right, bottom = region
    box = (max(0, round(left)), max(0, round(top)), min(size[0], round(right)), min(size[1], round(bottom)))
    across, down = heat.shape[1] / (right - left), heat.shape[0] / (bottom - top)
    # Where the map reaches beyond the image, only that part of it is scaled that lies on the image.
    part = (
        max(0.0, (box[0] - left) * across),
        max(0.0, (box[1] - top) * down),
        min(float(heat.shape[1]), (box[2] - left) * across),
        min(float(heat.shape[0]), (box[3] - top) * down),
    )
    shown = (max(1, box[2] - box[0]), max(1, box[3] - box[1]))
    scaled = Image.fromarray(heat, mode=None).resize(shown, Image.Resampling.BILINEAR, box=part)
    return np.asarray(scaled), (box[0], box[1], box[0] + shown[0], box[1] + shown[1])


def overlay(
    image: Any,
    heat: Any,
    *,
    processor: Any = None,
    image_size: int | None = None,
    low: float | None = None,
    high: float | None = None,
    strength: float = 0.8,
    grey: bool = False,
) -> Image.Image:
    """Lay a map over an image, such as one of `relevance_map` or `attention_rollout`.

    Args:
        image: A Pillow image, an array, a path, a URL or bytes.
        heat: (Y, X), a tensor or an array of numbers.
        processor: HfClipProcessor or HfClipImageProcessor that the map was made with. It says which part of the image
            the map covers (`seen_region`); the rest is shown dark and grey. None: the map covers the whole image.
        image_size: What the map was made with. None: nothing was given.
        low: Heat that is left uncoloured, and everything below. None: the least of the map.
        high: Heat that has the last colour, and everything above. None: the greatest of the map. Give both to compare
            maps of several texts.
        strength: Opacity of the hottest colour, from 0 to 1. Opacity grows evenly from `low` to `high`.
        grey: Whether to show the image in grey, so that only heat has colours.

    Returns:
        An RGB image of the same size.

    Raises:
        UnreadableImageError: The image cannot be read.
        ValueError: The map is not two-dimensional, is empty or holds NaN or infinity, or `strength` is not from 0 to 1.

    Example::

        heat = relevance_map(model, processor, "pets.jpg", "a photo of a cat")[0]
        overlay("pets.jpg", heat, processor=processor).save("cat-heat.png")
    """
    values = np.asarray(heat.detach().cpu().float() if hasattr(heat, "detach") else heat, dtype=np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"heat has the shape {values.shape}, but one map (Y, X) is needed; take one of several by its number."
        )
    if not np.isfinite(values).all():
        raise ValueError("heat holds NaN or infinity, but numbers are needed.")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, but a number from 0 to 1 is needed.")
    shown = to_image(image).convert("RGB")
    size = shown.size
    region = seen_region(processor, size, image_size=image_size) if processor is not None else (0.0, 0.0, *size)
    low, high = (float(values.min()) if low is None else low, float(values.max()) if high is None else high)
    spread, box = _spread(values, size, region)
    # A map without differences has nothing hot.
    warmth = ((spread - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(spread)
    pixels = np.asarray(shown.convert("L").convert("RGB") if grey else shown, dtype=np.float32)
    part = pixels[box[1] : box[3], box[0] : box[2]]
    opacity = (strength * warmth)[..., None]
    part = part + opacity * (heat_colours()[np.round(warmth * (LEVELS - 1)).astype(int)] - part)
    whole = np.asarray(shown.convert("L").convert("RGB"), dtype=np.float32) * SHARE_OF_UNSEEN
    whole[box[1] : box[3], box[0] : box[2]] = part
    return Image.fromarray(np.round(whole).astype(np.uint8))


__all__ = ["heat_colours", "overlay"]
