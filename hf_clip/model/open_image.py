"""Whatever a user has → a Pillow image, or one clear error that says which of the batch it was.

Invariant: what is opened here (a path, a URL, bytes, a file, a row of `datasets`) is turned as its EXIF orientation
says; what is an image already is never turned. Of an animation the first frame is taken. An image keeps its mode:
the original resizes an image in its own mode and makes it RGB at the end.

Dimensions: C channels, Y × X pixels.
"""

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, UnsupportedOperation
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .fetch import fetch, is_web_address

GREY_LEVEL = 1 / 255
"""How far beyond 0 and 1 a float may lie: rounding in somebody's resize, not another scale."""

SMALLEST_IMAGE = 30
"""Bytes; a text that is base64 of fewer is a path that was mistyped."""

RASTER_FORMATS = {
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FPX", "FTEX", "GBR", "GIF", "HEIF", "ICNS",
    "ICO", "IM", "IMT", "JPEG", "JPEG2000", "JXL", "MCIDAS", "MIC", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM",
    "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB",
}  # fmt: skip
"""Formats, by Pillow's names, that are opened: all that hold pixels and are decoded by Pillow or its plugins alone.

Left out are EPS (PostScript), which Pillow has Ghostscript run; WMF, which Windows draws; IPTC, whose content Pillow
opens as an image of any format, EPS included; BUFR, GRIB and HDF5, which are handed to whatever was registered for
them; and MPEG, which has no pixels that Pillow reads.
"""

UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises where a file is no image, or only part of one."""


class UnreadableImageError(ValueError):
    """One image among those given cannot be opened, or is none.

    Its text is `name` and `problem`, one after the other. Whoever knows more of where the image was calls `place`.

    Attributes:
        index: the image's place among all that were given, from 0, or None where it is the only one.
        name: what the text calls it, e.g. "images[3]".
        problem: what is wrong with it and what to do.
    """

    def __init__(self, name: str, problem: str = "", index: int | None = None):
        super().__init__(name, problem, index)  # with all of them it can be pickled
        self.name, self.problem, self.index = name, problem, index

    def __str__(self) -> str:
        return f"{self.name}{self.problem}"

    def place(self, index: int | None) -> None:
        """Name the image by its place in what the user gave; None for a single image."""
        self.index, self.name = index, "the image" if index is None else f"images[{index}]"


@contextmanager
def at_place(index: int | None) -> Iterator[None]:
    """Whatever UnreadableImageError is raised in here names its image by this place; see `place`."""
    try:
        yield
    except UnreadableImageError as error:
        error.place(index)
        raise


def is_to_be_opened(item: Any) -> bool:
    """Whether an item is an image's address or content, and not an image yet."""
    return isinstance(item, (str, bytes, bytearray, os.PathLike, dict)) or hasattr(item, "read")


def flatten_images(images: Any) -> list[Any]:
    """One image or its address, a batch array (B, ...), or any nesting of lists of these → a list of them."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item)]
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def _content(source: Any, timeout: float | None) -> Any:
    """What Pillow can open: a file's path, or a file."""
    if isinstance(source, dict):  # as `datasets` stores an image that it hasn't decoded
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
    """`Image.open` of a path or file for RASTER_FORMATS alone, whatever the file's name ends in."""
    if hasattr(file, "read"):
        try:
            file.seek(0)
        except (AttributeError, UnsupportedOperation):
            file = BytesIO(file.read())  # which is tried twice
    for load in (Image.preinit, Image.init):  # the common formats first, as Pillow does: most files need no others
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
    """The least size at which a JPEG may be decoded when its shorter side is to become `shorter_side` pixels.

    Twice as large as needed, so that most of the scaling is still done by the exact filter.
    """
    ratio = 2 * shorter_side / min(size)
    return round(size[0] * ratio), round(size[1] * ratio)


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn and mirror an image as its EXIF orientation says; one that says nothing legible stays as it is."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (None, 1)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # whatever a damaged block makes Pillow's parser do
        return image


def open_image(
    source: Any, name: str = "the image", *, timeout: float | None = None, draft: int | None = None
) -> Image.Image:
    """Open an image, turned as its EXIF orientation says, in its own mode.

    source:  a path, a URL, a data URI, base64, bytes, an open file, or the {"bytes", "path"} of `datasets`
    name:    what to call it in an error, e.g. "images[3]"
    timeout: seconds until an address is given up, all in all; see `fetch`
    draft:   the shorter side that is wanted; a JPEG of more than four times that is decoded at a half, a quarter
             or an eighth of its size, which is faster and not exact

    Raises UnreadableImageError, a ValueError that names the image and what is wrong with it.
    """
    try:
        with open_raster(_content(source, timeout)) as image:
            if draft is not None and image.format in ("JPEG", "MPO"):
                image.draft(None, draft_size(image.size, draft))
            image.load()
            return turn_upright(image)
    except FileNotFoundError:
        raise UnreadableImageError(name, f": there is no file {str(source)[:200]!r}; check the path.") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            name, f" is too large: {error} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS, or scale it down."
        ) from error
    except (*UNREADABLE, TypeError) as error:
        described = f"{str(source)[:80]!r}, " if isinstance(source, (str, os.PathLike)) else ""
        raise UnreadableImageError(
            name, f" cannot be opened ({described}{error}); replace it, or leave it out."
        ) from error


def _as_levels(array: np.ndarray, name: str) -> np.ndarray:
    """Grey levels of uint8 from what an array holds: uint8 as it is, floats from 0 to 1, booleans."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(array.dtype, np.floating):
        raise UnreadableImageError(
            name,
            f" is an array of {array.dtype}, but images are needed: pass Pillow images, arrays of uint8 from "
            f"0 to 255, or of floats from 0 to 1.",
        )
    low, high = float(array.min(initial=0)), float(array.max(initial=0))  # NaN wins both
    check_unit_range(low, high, name)
    return np.round(array.clip(0, 1) * 255).astype(np.uint8)


def check_unit_range(low: float, high: float, name: str) -> None:
    """Refuse float images that are not on the scale from 0 to 1."""
    if not np.isfinite((low, high)).all():
        raise UnreadableImageError(
            name, " has values that are not finite (NaN or infinity); repair it, or leave it out."
        )
    if low < -GREY_LEVEL or high > 1 + GREY_LEVEL:
        raise UnreadableImageError(
            name,
            f" holds floats from {low:.4g} to {high:.4g}, but from 0 to 1 is needed. Divide images of 0 to 255 "
            f"by 255 or pass them as uint8; images that are normalised already need no image processor.",
        )


def channel_axis(shape: tuple[int, ...], data_format: str | None, name: str) -> int:
    """Where the channels of an image of three dimensions are: 0 for (C, Y, X), 2 for (Y, X, C)."""
    given = getattr(data_format, "value", data_format)
    likely = 0 if shape[0] in (1, 3) and shape[-1] not in (1, 3) else 2
    axis = likely if given is None else (0 if given == "channels_first" else 2)
    if shape[axis] not in (1, 3) or 0 in shape:
        raise UnreadableImageError(
            name,
            f" is an array of shape {tuple(shape)}, but (H, W), (H, W, 3) or (3, H, W) is needed. Of four "
            f"channels, leave the transparency out.",
        )
    return axis


def to_image(
    item: Any, name: str, *, data_format: str | None = None, timeout: float | None = None, draft: int | None = None
) -> Image.Image:
    """A Pillow image of what users have: an image, its address or content, or an array.

    item: as above; arrays of shape (Y, X), (Y, X, C) or (C, Y, X), C being 1 or 3, uint8 or floats from 0 to 1
    """
    if is_to_be_opened(item):
        item = open_image(item, name, timeout=timeout, draft=draft)
    if isinstance(item, Image.Image):
        if 0 in item.size:
            raise UnreadableImageError(name, f" has {item.width}x{item.height} pixels; an image needs at least one.")
        return item
    if not hasattr(item, "ndim"):
        raise UnreadableImageError(
            name, f" is of type {type(item).__name__}, but images are needed: Pillow images, paths, or arrays."
        )
    if hasattr(item, "detach"):
        item = item.detach().cpu()
        item = item.float() if item.is_floating_point() else item  # numpy has no bfloat16
    array = np.asarray(item)
    if array.ndim == 3:
        axis = channel_axis(array.shape, data_format, name)
        array = array.transpose(1, 2, 0) if axis == 0 else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    elif array.ndim != 2 or array.size == 0:
        raise UnreadableImageError(
            name, f" is an array of shape {tuple(array.shape)}, but (H, W), (H, W, 3) or (3, H, W) is needed."
        )
    return Image.fromarray(np.ascontiguousarray(_as_levels(array, name)))
