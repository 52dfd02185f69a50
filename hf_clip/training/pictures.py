"""The bytes of a picture, wherever a row says they are: read once, for opening it and for knowing it again."""

import base64
import re
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from PIL import Image

from ..pictures_hf_clip import open_picture
from .columns import UnusableRowError

TIMEOUT = 20.0
"""Seconds to wait for a server before a picture is given up."""


def _from_address(address: str, folder: Path | None, timeout: float) -> bytes:
    if address.startswith("data:image/"):
        return base64.b64decode(address.partition(",")[2], validate=True)
    if address.startswith(("http://", "https://")) and "::" not in address:
        request = Request(address, headers={"User-Agent": "hf_clip"})  # some servers refuse Python's own name
        with urlopen(request, timeout=timeout) as response:
            return response.read()
    if "://" in address:  # a file on the Hub, or within an archive
        import fsspec  # type: ignore[import-untyped]

        with fsspec.open(address, "rb") as file:
            return file.read()
    path = Path(address).expanduser()
    if folder is not None and not path.is_absolute() and (folder / path).is_file():
        path = folder / path
    return path.read_bytes()


def picture_content(stored: Any, folder: Path | None = None, timeout: float = TIMEOUT) -> bytes:
    """The bytes of a picture that `datasets` stores, or of a path or URL. Raises UnusableRowError where there are none.

    folder: where a relative path begins, if there is such a file; else it begins where the program runs
    """
    if isinstance(stored, dict):
        stored = stored.get("path") if stored.get("bytes") is None else stored["bytes"]
    if isinstance(stored, (bytes, bytearray)):
        return bytes(stored)
    if not isinstance(stored, str) or not stored:
        raise UnusableRowError("its picture is missing")
    try:
        return _from_address(stored, folder, timeout)
    except FileNotFoundError:
        raise UnusableRowError(f"there is no picture {stored[:200]!r}") from None
    except Exception as error:  # whatever a file system or a server does
        raise UnusableRowError(f"its picture {stored[:200]!r} cannot be read ({error})") from error


def open_content(content: bytes, draft: int | None = None) -> Image.Image:
    """A picture of its bytes, upright; see `open_picture`. Raises UnusableRowError where they are none."""
    try:
        picture = open_picture(content, "its picture", draft=draft)
    except ValueError as error:
        reason = re.sub(r" <_io.BytesIO object at 0x\w+>", "", str(error))
        raise UnusableRowError(reason.removesuffix("; replace it, or leave it out.")) from error
    if 0 in picture.size:
        raise UnusableRowError(f"its picture has {picture.width}x{picture.height} pixels")
    return picture
