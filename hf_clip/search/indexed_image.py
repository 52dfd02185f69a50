"""What the index keeps of one image besides its embedding: content hash, size, perceptual hash and thumbnail.

Dimensions: C channels, Y × X pixels.
"""

import hashlib
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image

from ..extras import is_there
from ..model.open_image import open_image, open_raster

if TYPE_CHECKING:
    from torch import Tensor

THUMBNAIL_SIDE = 160
"""Longer side of a thumbnail in pixels, of which a page shows many."""
THUMBNAIL_QUALITY = 55
TINY_SIDE, TINY_QUALITY = 64, 95
"""An image of so few pixels is shown enlarged, and takes few bytes anyway."""

MOST_BYTES = 512 << 20
"""Largest file that is read."""

HASH_SIDE = 8


@dataclass(frozen=True)
class IndexedImage:
    """An image that was opened.

    Attributes:
        content: Hash of the file's bytes.
        width: In pixels, upright.
        height: In pixels, upright.
        perceptual_hash: 64 bits, as a signed number.
        thumbnail: A JPEG.
        pixels: (C, Y, X), as the image processor makes them.
    """

    content: str
    width: int
    height: int
    perceptual_hash: int
    thumbnail: bytes
    pixels: "Tensor"


def content_hash(content: bytes) -> str:
    """A hash of a file's bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def can_be_read(path: str) -> bool:
    """Whether a file's first byte can be read."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


def file_hash(path: str) -> str:
    """The content hash of a file, which is read in pieces."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def register_formats() -> None:
    """Let Pillow open HEIC, as phones write it, where pillow-heif is installed."""
    if is_there("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of an image that say, for each cell of a grid of 8 × 8, whether it is darker than the cell to its right.

    Copies of an image in other sizes and qualities differ in few of the bits (Krawetz 2013, "dHash").
    """
    small = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    levels = np.asarray(small, dtype=np.int16)
    bits = (levels[:, :-1] < levels[:, 1:]).ravel()
    return int(np.packbits(bits).view(">i8")[0])


def make_thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of an image. What is transparent is white."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
    if small.mode in ("RGBA", "LA", "PA") or "transparency" in small.info:
        small = small.convert("RGBA")
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    file = BytesIO()
    how = (
        {"quality": TINY_QUALITY, "subsampling": 0} if max(small.size) <= TINY_SIDE else {"quality": THUMBNAIL_QUALITY}
    )
    small.convert("RGB").save(file, "JPEG", **how)
    return file.getvalue()


def prepare(content: bytes, image_processor: Any, draft: int | None) -> IndexedImage:
    """Open an image and make of it all that the index keeps.

    Args:
        content: The file's bytes.
        image_processor: HfClipImageProcessor.
        draft: The shorter side that a JPEG needs, see `open_image`. None: full size.

    Raises:
        UnreadableImageError: It is no image, or damaged.
    """
    image = open_image(content, draft=draft)
    width, height = image.size if draft is None else full_size(content, image)
    return IndexedImage(
        content=content_hash(content),
        width=width,
        height=height,
        perceptual_hash=perceptual_hash(image),
        thumbnail=make_thumbnail(image),
        pixels=image_processor([image], return_tensors="pt")["pixel_values"][0],
    )


def full_size(content: bytes, image: Image.Image) -> tuple[int, int]:
    """Width and height of an image, upright, that was opened as a draft perhaps.

    Which side is longer is read from the file, and not from the draft: a draft of 1000 × 999 pixels may be a square.
    """
    with open_raster(BytesIO(content)) as whole:
        if whole.format not in ("JPEG", "MPO"):  # of others there are no drafts
            return image.size
        try:
            is_on_its_side = whole.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        except Exception:  # a damaged block, see `turn_upright`
            is_on_its_side = False
        return (whole.height, whole.width) if is_on_its_side else whole.size


__all__ = [
    "IndexedImage",
    "can_be_read",
    "content_hash",
    "file_hash",
    "full_size",
    "make_thumbnail",
    "perceptual_hash",
    "prepare",
    "register_formats",
]
