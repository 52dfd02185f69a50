"""Open images: turn a path, a URL, bytes, a file, an array or a row of `datasets` into a Pillow image.

If an image cannot be opened, one error says which image of a batch it is and why.

Invariant: an image that is opened here is turned as its EXIF orientation says. An object that is an image already is
never turned. Of an animation the first frame is taken. An image keeps its mode, since the original resizes it in that
mode and converts it to RGB at the end.

Dimensions: B batch, C channels, Y × X pixels.
"""

import base64
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, UnsupportedOperation
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .fetch import fetch, is_web_address

GREY_LEVEL = 1 / 255
"""How far a float may lie beyond 0 and 1. So much comes from rounding; more would be another scale."""

SMALLEST_IMAGE = 30
"""Size of the smallest image in bytes. A text that is base64 of fewer bytes is taken for a mistyped path."""

RASTER_FORMATS = {
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FPX", "FTEX", "GBR", "GIF", "HEIF", "ICNS",
    "ICO", "IM", "IMT", "JPEG", "JPEG2000", "JXL", "MCIDAS", "MIC", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM",
    "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB",
}  # fmt: skip
"""Formats that are opened, by Pillow's names: those with pixels that Pillow or its plugins decode themselves.

Not opened are EPS (PostScript), for which Pillow runs Ghostscript; WMF, which Windows draws; IPTC, which may contain an
image of any format, EPS included; BUFR, GRIB and HDF5, for which Pillow calls any handler that is registered; and MPEG,
of which Pillow reads no pixels.
"""

UNREADABLE = (
    *(UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError),
    *(RuntimeError, struct.error),
)
"""Errors that Pillow raises for a file that is no image, or is cut off. RuntimeError comes from a damaged AVIF; a
NotImplementedError, which is one too, from a damaged DDS or BLP."""


class UnreadableImageError(ValueError):
    """An image cannot be opened, or an object is no image.

    The message is made of the attributes. A caller who knows more of where the image was sets `index`.

    Attributes:
        problem: What is wrong with the image, and what to do. It follows the image's name in the message.
        index: Place of the image among all that were given, from 0. None for a single image.
    """

    def __init__(self, problem: str, index: int | None = None):
        super().__init__(problem)
        self.problem, self.index = problem, index

    def __str__(self) -> str:
        return f"{'the image' if self.index is None else f'images[{self.index}]'}{self.problem}"


@contextmanager
def at_place(index: int | None) -> Iterator[None]:
    """Give an UnreadableImageError from within a `with` block the image's place as its `index`."""
    try:
        yield
    except UnreadableImageError as error:
        error.index = index
        raise


def is_to_be_opened(item: Any) -> bool:
    """Whether an item is the path, URL, file or content of an image, and must be opened."""
    return isinstance(item, (str, bytes, bytearray, os.PathLike, dict)) or hasattr(item, "read")


def flatten_images(images: Any) -> list[Any]:
    """Return a flat list of images: of a single image, of a batch (B, …), or of lists of these in any nesting."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item)]
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def _content(source: Any, timeout: float | None) -> Any:
    """Return what Pillow can open: a path or a file."""
    if isinstance(source, dict):  # an undecoded image of `datasets`
        if source.get("bytes"):
            return BytesIO(source["bytes"])
        if source.get("path"):
            return _content(source["path"], timeout)
        raise ValueError("an image's row needs `bytes` or a `path`, and has neither")
    if isinstance(source, (bytes, bytearray)):
        return BytesIO(source)
    if not isinstance(source, str):
        return source
    if is_web_address(source):
        return BytesIO(fetch(source, timeout))
    if os.path.exists(source):
        return source
    try:
        content = base64.b64decode("".join(source.split()), validate=True)
    except ValueError:  # other letters than those of base64
        content = b""
    if len(content) < SMALLEST_IMAGE:
        raise FileNotFoundError(source)
    return BytesIO(content)


def open_raster(file: Any) -> Image.Image:
    """Open a path or file with Pillow if it has one of `RASTER_FORMATS`. The ending of its name does not matter."""
    if hasattr(file, "read"):
        try:
            file.seek(0)
        except (AttributeError, UnsupportedOperation):
            file = BytesIO(file.read())  # it may be read twice below
    for load in (Image.preinit, Image.init):  # first the common formats, as Pillow does, which most files have
        load()
        try:
            return Image.open(file, formats=[name for name in Image.ID if name in RASTER_FORMATS])
        except UnidentifiedImageError:
            continue
    raise UnidentifiedImageError(
        "cannot identify image file: it is damaged, or no raster image; PostScript, vector graphics and video are not "
        "opened"
    )


def draft_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Compute the least size at which a JPEG may be decoded if its shorter side is to have `shorter_side` pixels.

    It is twice as large as needed, so that most of the scaling is done by the exact filter.
    """
    ratio = 2 * shorter_side / min(size)
    return round(size[0] * ratio), round(size[1] * ratio)


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn and mirror an image as its EXIF orientation says. Without a readable orientation it stays as it is."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (None, 1)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # a damaged block can raise any error in Pillow's parser
        return image


def _shown(source: Any) -> str:
    """A path, or the beginning and the end of what is longer than most paths, such as base64."""
    text = str(source)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-60:]}"


def open_image(source: Any, *, timeout: float | None = None, draft: int | None = None) -> Image.Image:
    """Open an image, turn it as its EXIF orientation says, and keep its mode.

    Args:
        source: A path, a URL, a data URI, base64, bytes, an open file, or an undecoded row of `datasets`, which has
            "bytes" and "path".
        timeout: Seconds until the download of an address is given up. None: 60.
        draft: Shorter side that is needed, in pixels. A JPEG that is more than four times as large is decoded at a
            half, a quarter or an eighth of its size, which is faster and not exact. None: full size.

    Returns:
        The image.

    Raises:
        UnreadableImageError: The image cannot be opened. A ValueError.
    """
    try:
        with open_raster(_content(source, timeout)) as image:
            if draft is not None and image.format in ("JPEG", "MPO"):
                image.draft(None, draft_size(image.size, draft))
            image.load()
            return turn_upright(image)
    except FileNotFoundError:
        raise UnreadableImageError(f": there is no file {_shown(source)!r}; check the path.") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            f" is too large: {error} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS, or scale it down."
        ) from error
    except (*UNREADABLE, TypeError) as error:
        described = f"{_shown(source)!r}, " if isinstance(source, (str, os.PathLike)) else ""
        raise UnreadableImageError(f" cannot be opened ({described}{error}); replace it, or leave it out.") from error


def _as_levels(array: np.ndarray) -> np.ndarray:
    """Convert an array of floats from 0 to 1, or of booleans, to grey levels of uint8. uint8 stays as it is."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(array.dtype, np.floating):
        raise UnreadableImageError(
            f" is an array of {array.dtype}, but images are needed: pass Pillow images, arrays of uint8 from "
            f"0 to 255, or of floats from 0 to 1.",
        )
    low, high = float(array.min(initial=0)), float(array.max(initial=0))  # both are NaN if any value is
    check_unit_range(low, high)
    return np.round(array.clip(0, 1) * 255).astype(np.uint8)


def check_unit_range(low: float, high: float) -> None:
    """Raise UnreadableImageError for a float image whose values are not from 0 to 1."""
    if not np.isfinite((low, high)).all():
        raise UnreadableImageError(" has values that are not finite (NaN or infinity); repair it, or leave it out.")
    if low < -GREY_LEVEL or high > 1 + GREY_LEVEL:
        raise UnreadableImageError(
            f" holds floats from {low:.4g} to {high:.4g}, but from 0 to 1 is needed. Divide images of 0 to 255 "
            f"by 255 or pass them as uint8; images that are normalised already need no image processor.",
        )


def channel_axis(shape: tuple[int, ...], data_format: str | None) -> int:
    """Find the axis of the channels in an image of three dimensions: 0 for (C, Y, X), 2 for (Y, X, C)."""
    given = getattr(data_format, "value", data_format)
    likely = 0 if shape[0] in (1, 3) and shape[-1] not in (1, 3) else 2
    axis = likely if given is None else (0 if given == "channels_first" else 2)
    if shape[axis] not in (1, 3) or 0 in shape:
        raise UnreadableImageError(
            f" is an array of shape {tuple(shape)}, but (H, W), (H, W, 3) or (3, H, W) is needed. Of four "
            f"channels, leave the transparency out.",
        )
    return axis


def to_image(
    item: Any, *, data_format: str | None = None, timeout: float | None = None, draft: int | None = None
) -> Image.Image:
    """Turn an image in any of the accepted forms into a Pillow image.

    Args:
        item: A Pillow image; anything that `open_image` takes; or an array or tensor (Y, X), (Y, X, C) or (C, Y, X),
            where C is 1 or 3, of uint8 or floats from 0 to 1.
        data_format: "channels_first" or "channels_last" for arrays. None: it is inferred from the shape.
        timeout: As for `open_image`.
        draft: As for `open_image`.

    Returns:
        The image.

    Raises:
        UnreadableImageError: The item is no image, or cannot be opened. A ValueError.
    """
    if is_to_be_opened(item):
        item = open_image(item, timeout=timeout, draft=draft)
    if isinstance(item, Image.Image):
        if 0 in item.size:
            raise UnreadableImageError(f" has {item.width}x{item.height} pixels; an image needs at least one.")
        return item
    if not hasattr(item, "ndim"):
        raise UnreadableImageError(
            f" is of type {type(item).__name__}, but images are needed: Pillow images, paths, or arrays."
        )
    if hasattr(item, "detach"):
        item = item.detach().cpu()
        item = item.float() if item.is_floating_point() else item  # numpy has no bfloat16
    array = np.asarray(item)
    if array.ndim == 3:
        axis = channel_axis(array.shape, data_format)
        array = array.transpose(1, 2, 0) if axis == 0 else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    elif array.ndim != 2 or array.size == 0:
        raise UnreadableImageError(
            f" is an array of shape {tuple(array.shape)}, but (H, W), (H, W, 3) or (3, H, W) is needed."
        )
    return Image.fromarray(np.ascontiguousarray(_as_levels(array)))
