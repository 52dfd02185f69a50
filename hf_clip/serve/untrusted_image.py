"""Open images that strangers send: decode data URIs and base64, and refuse what would take memory or time.

Nothing here takes a path. Only common formats are opened, since each further one is a parser that strangers reach.
What surrounds the pixels is bounded by `image_structure`.
"""

import base64
import binascii
import re
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from ..model.open_image import turn_upright
from .image_structure import StructureError, check_exif, check_strips, check_structure, without_metadata
from .request_error import RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""Formats that are opened, by Pillow's names. HEIF needs a plugin, and AVIF a Pillow that was built with it."""

MOST_STRETCHED = 100
"""The longer side is at most so many times as long as the shorter one, which is scaled to the model's size first."""

BYTES_FOR_PIXEL = 8
"""Bytes that may be in memory for each pixel that is allowed, while an image is decoded."""

DECODED_BYTES = {"WEBP": 16, "AVIF": 10, "HEIF": 10}
"""Bytes that decoding takes for each pixel, where it takes more than Pillow's image: WEBP and AVIF come with canvases
and planes of their own."""

URL_SAFE, WHITESPACE = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v"
PART = 65536

DATA_URI = re.compile(r"\s*data:(?P<about>[^,]{0,200}),", re.IGNORECASE)


def is_data_uri(text: str) -> bool:
    """Whether a text is the data URI of an image."""
    return text.lstrip()[:11].lower() == "data:image/"


def is_url(text: str) -> bool:
    """Whether a text is an http or https address."""
    return text.lstrip()[:8].lower().startswith(("http://", "https://"))


def unquoted(text: str) -> bytes:
    """Replace escapes such as %2F. In parts, since `unquote_to_bytes` takes many times the memory of its text."""
    content, found, place = text.encode("utf-8", "replace"), bytearray(), 0
    while place < len(content):
        part = content[place : place + PART]
        cut = part.rfind(b"%", -2)  # an escape whose letters are in the next part
        if cut > 0:
            part = part[:cut]
        found += unquote_to_bytes(part)
        place += len(part)
    return bytes(found)


def decode_image_text(text: str, name: str) -> bytes:
    """Decode a data URI or base64.

    Args:
        text: What a client sent.
        name: Where in the request it was, for messages.

    Raises:
        RequestError: It is neither.
    """
    found = DATA_URI.match(text)
    content = text[found.end() :] if found else text
    if found and not found["about"].rstrip().lower().endswith(";base64"):
        return unquoted(content)
    try:
        letters = unquoted(content) if "%" in content else content.encode("ascii")
        letters = letters.translate(URL_SAFE, WHITESPACE).rstrip(b"=")
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            400,
            f"{name} is no image: send a data URI (data:image/jpeg;base64,…), base64, or an http(s) address.",
            "invalid_image",
            "input",
        ) from None


def decoding_bytes(image: Image.Image) -> int:
    """About how many bytes decoding an image takes, which was opened and not loaded."""
    each = DECODED_BYTES.get(image.format or "", 8)
    if image.info.get("progressive"):  # coefficients of all pixels, in two bytes
        each = 4 + 2 * len(image.getbands())
    if image.format == "TIFF":  # a strip may hold the whole image
        bits: Any = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        each = 4 + sum(bits if isinstance(bits, tuple) else (bits,)) // 8
    if image.format in ("AVIF", "HEIF") and image.mode == "RGBA":
        each += 3
    return int(each * image.width * image.height)


def allow_pixels(most_pixels: int) -> None:
    """Let Pillow open images with so many pixels, if its own limit is lower. That limit is one for the process."""
    if Image.MAX_IMAGE_PIXELS is not None and most_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most_pixels


def open_untrusted(
    content: bytes, name: str, most_pixels: int, before: Callable[[int], object] = lambda count: None
) -> Image.Image:
    """Open an image that a stranger sent, turned as its EXIF orientation says.

    Args:
        content: The file's bytes.
        name: Where in the request it was, for messages.
        most_pixels: Pixels that are allowed. What has more is not decoded.
        before: Called with the bytes that decoding takes, before it begins.

    Raises:
        RequestError: It is no image in a known format, is damaged, too large, or would take too long.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        check_structure(content)
        with Image.open(BytesIO(without_metadata(content)), formats=known) as image:
            _check_size(image.size, name, most_pixels)
            check_strips(image, len(content))
            before(_checked_bytes(image, name, most_pixels))
            image.load()
            check_exif(_exif_of(image))
            return turn_upright(image)
    except UnidentifiedImageError:
        raise RequestError(
            400,
            f"{name} is no image in a known format ({', '.join(known)}), or it is damaged.",
            "invalid_image",
            "input",
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, most_pixels) from None
    except StructureError as error:
        raise RequestError(400, f"{name} {error}", "invalid_image", "input") from None
    except RequestError:
        raise
    except Exception:  # a damaged file can raise any error in a parser
        raise RequestError(400, f"{name} is an image that is damaged or cut off.", "invalid_image", "input") from None


def _exif_of(image: Image.Image) -> bytes:
    """EXIF that Pillow would read the orientation from. A PNG may hold it as hexadecimal letters in a text."""
    exif = image.info.get("exif")
    if exif is None and isinstance(text := image.info.get("Raw profile type exif"), str):
        with suppress(ValueError):  # Pillow does not read it either
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
    return exif if isinstance(exif, bytes) else b""


def _too_large(name: str, most_pixels: int) -> RequestError:
    return RequestError(
        413,
        f"{name} has too many pixels: at most {most_pixels:,} are allowed; scale it down.",
        "image_too_large",
        "input",
    )


def _checked_bytes(image: Image.Image, name: str, most_pixels: int) -> int:
    needed, allowed = decoding_bytes(image), BYTES_FOR_PIXEL * most_pixels
    if needed > allowed:
        each = needed // (image.width * image.height)
        raise RequestError(
            413,
            f"{name} has too many pixels for an image of its kind ({image.format}, {image.mode}): at most "
            f"{allowed // each:,} are allowed; scale it down, or save it as a plain JPEG or PNG.",
            "image_too_large",
            "input",
        )
    return needed


def _check_size(size: tuple[int, int], name: str, most_pixels: int) -> None:
    short, long = min(size), max(size)
    if short < 1:
        raise RequestError(400, f"{name} has no pixels.", "invalid_image", "input")
    if short * long > most_pixels:
        raise _too_large(name, most_pixels)
    if long > short * MOST_STRETCHED:
        raise RequestError(
            400,
            f"{name} has {size[0]}x{size[1]} pixels, but one side may be at most {MOST_STRETCHED} times as long as the "
            f"other: cut it.",
            "invalid_image",
            "input",
        )


__all__ = [
    "BYTES_FOR_PIXEL",
    "FORMATS",
    "allow_pixels",
    "decode_image_text",
    "decoding_bytes",
    "is_data_uri",
    "is_url",
    "open_untrusted",
]
