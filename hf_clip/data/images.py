"""The bytes of an image, wherever a row says they are: read once, for opening it and for knowing it again.

Whoever wrote the rows may not be the one who trains on them. A path that leads out of the data set's folder, a link, or
an address of another file system would put files of this machine, or of its user's accounts, among the images. So rows
may name images on the web (http, https), within the data set, and nowhere else but where the user allows it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from ..model.fetch import MAX_BYTES, fetch, is_web_address
from ..model.open_image import UnreadableImageError, open_image
from .columns import UnusableRowError
from .sources import import_datasets, is_pattern

TIMEOUT = 20.0
"""Seconds until an address is given up, all in all."""

ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")
"""File systems within a file: `zip://inner.png::archive.zip`. Caches and others that lead further are not opened."""


LONGEST_SHOWN = 200
"""Letters of an address or an error that a message repeats."""


@dataclass(frozen=True)
class ImagePlaces:
    """Where the rows of a source may point for their images, besides the web; see the module.

    Attributes:
        folder: where relative paths begin: the source's own, or None where that is not on this machine.
        local: folders whose files may be opened, without links in their names.
        remote: beginnings of addresses that may be opened, such as "hf://datasets/user/name/".
    """

    folder: Path | None = None
    local: tuple[Path, ...] = ()
    remote: tuple[str, ...] = ()


NOWHERE = ImagePlaces()


class ImageRegion(NamedTuple):
    """A part of an image.   stored: as `image_content` takes it   box: left, top, right and bottom in pixels"""

    stored: Any
    box: tuple[int, int, int, int]


def find_image_places(source: str, folder: Path | None, allowed: Sequence[str] = ()) -> ImagePlaces:
    """Where the rows of a source may point for their images.

    Args:
        source: as the user named it: a repository, a folder, files, or an address of files.
        folder: where the source's relative paths begin, or None where it is not on this machine.
        allowed: more folders, or addresses of folders, that the user allows.

    Raises:
        ValueError: one of `allowed` is no folder.
    """
    config = import_datasets().config
    local = [Path(config.DOWNLOADED_DATASETS_PATH), Path(config.EXTRACTED_DATASETS_PATH)]  # of the data sets' archives
    remote = []
    if folder is not None:
        local.append(folder)
    elif "://" in source:
        parent = source.rpartition("/")[0]
        while is_pattern(parent):
            parent = parent.rpartition("/")[0]
        remote.append(f"{parent}/")
    else:
        name = source.partition(":")[0]
        local.append(Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}")
        remote += [f"hf://datasets/{name}/", f"hf://datasets/{name}@"]
    for place in allowed:
        if "://" in place:
            remote.append(f"{place.rstrip('/')}/")
        elif (folder_allowed := Path(os.path.expanduser(place))).is_dir():
            local.append(folder_allowed)
        else:
            raise ValueError(f"--image_folders names {place}, which is no folder; check the path.")
    return ImagePlaces(folder, tuple(path.resolve() for path in local), tuple(remote))


def find_local_file(name: str, places: ImagePlaces) -> Path | None:
    """The file that a path names, which may begin at the source's folder or where the program runs.

    Args:
        name: the path, or a file:// address.
        places: where it may lead.

    Returns:
        The file, without links in its name. None is a path that leads elsewhere.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(name.removeprefix("file://"))
    path = Path(os.path.expanduser(path)) if path.parts[:1] == ("~",) else path
    beginnings = [Path.cwd()] if places.folder is None else [places.folder, Path.cwd()]
    found = [(beginning / path).resolve() for beginning in beginnings]  # an absolute path stays as it is
    found = [file for file in found if any(file.is_relative_to(folder) for folder in places.local)]
    for file in found:
        if file.is_file():
            return file
    if found:
        raise FileNotFoundError(name)
    return None


def _read(address: str, places: ImagePlaces, timeout: float) -> bytes:
    if is_web_address(address):
        return fetch(address, timeout)
    *archives, target = address.split("::") if "://" in address else [address]
    if all(part.partition("://")[0] in ARCHIVES for part in archives):
        if "://" not in target or target.startswith("file://"):
            if (file := find_local_file(target, places)) is not None:
                return _read_file("::".join([*archives, str(file)])) if archives else file.read_bytes()
        elif target.startswith(places.remote) and ".." not in target.split("/"):
            return _read_file(address)
    where = "the data set" if places.folder is None else f"the data set's folder {places.folder}"
    raise UnusableRowError(
        f"its image {address[:LONGEST_SHOWN]!r} lies outside of {where}; if you trust the rows, allow its folder with "
        f"--image_folders"
    )


def _read_file(address: str) -> bytes:
    """A file on the Hub, or within an archive, which may unpack to any size."""
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(address, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    return content


def image_content(stored: Any, places: ImagePlaces = NOWHERE, timeout: float = TIMEOUT) -> bytes:
    """The bytes of an image that `datasets` stores, or of a path or URL.

    Args:
        stored: bytes, a path, an address, or the {"bytes", "path"} of `datasets`.
        places: where a path or an address may lead; http(s) addresses are always fetched.
        timeout: seconds until an http(s) address is given up.

    Raises:
        UnusableRowError: there are none, or they lie where the row may not point.
    """
    if isinstance(stored, dict):
        stored = stored.get("path") if stored.get("bytes") is None else stored["bytes"]
    if isinstance(stored, (bytes, bytearray)):
        return bytes(stored)
    if not isinstance(stored, str) or not stored:
        raise UnusableRowError("its image is missing")
    try:
        return _read(stored, places, timeout)
    except UnusableRowError:
        raise
    except FileNotFoundError:
        raise UnusableRowError(f"there is no image {stored[:LONGEST_SHOWN]!r}") from None
    except Exception as error:  # whatever a file system or a server does
        raise UnusableRowError(
            f"its image {stored[:LONGEST_SHOWN]!r} cannot be read ({str(error)[:LONGEST_SHOWN]})"
        ) from error


def open_content(content: bytes, draft: int | None = None) -> Image.Image:
    """An image of its bytes, upright; see `open_image`. Raises UnusableRowError where they are none."""
    try:
        image = open_image(content, draft=draft)
    except UnreadableImageError as error:
        problem = error.problem.removesuffix("; replace it, or leave it out.")
        raise UnusableRowError(f"its image{problem}") from error
    if 0 in image.size:
        raise UnusableRowError(f"its image has {image.width}x{image.height} pixels")
    return image
