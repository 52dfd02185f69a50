"""Find the images of a folder and its folders, with what a `stat` says of each. No file is opened.

Links to files are followed, and links to folders are not, so that a scan ends. Hidden files and folders are left out.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..zero_shot.files import is_image_name
from .indexed_image import register_formats


@dataclass(frozen=True)
class FileState:
    """A file of an image.

    Attributes:
        path: Its absolute path. Bytes of the name that are no UTF-8 are surrogates, as Python reads them.
        size: In bytes.
        mtime_ns: When it was last written, in nanoseconds.
    """

    path: str
    size: int
    mtime_ns: int


@dataclass
class FolderScan:
    """What a folder holds.

    Attributes:
        folder: Its absolute path.
        files: Its images, in the order of their paths.
        unread: Folders and files in it that could not be looked at, and why. Nothing is known of what they hold.
    """

    folder: str
    files: list[FileState] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    def is_known(self, path: str) -> bool:
        """Whether a path in this folder would have been found if it still existed."""
        return not any(path == place or path.startswith(os.path.join(place, "")) for place in self.unread)


def scan_folder(folder: str | Path) -> FolderScan:
    """Scan a folder.

    Raises:
        FileNotFoundError: There is no such folder.
        NotADirectoryError: It is a file.
        PermissionError: It may not be read.
    """
    register_formats()
    place = os.path.realpath(os.path.expanduser(folder))
    if not os.path.exists(place):
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    if not os.path.isdir(place):
        raise NotADirectoryError(f"{folder} is a file, but a folder of images is needed: name its folder.")
    found = FolderScan(place)
    try:
        os.scandir(place).close()
    except OSError as error:
        raise PermissionError(f"The folder {folder} cannot be read ({error.strerror}).") from None
    found.files = sorted(_files_of(place, found.unread), key=lambda file: os.fsencode(file.path))
    return found


def _files_of(folder: str, unread: dict[str, str]) -> Iterator[FileState]:
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                listed = list(entries)
        except OSError as error:
            unread[place] = error.strerror or str(error)
            continue
        for entry in listed:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif is_image_name(entry.name):
                try:
                    state = entry.stat()
                except OSError as error:
                    unread[entry.path] = error.strerror or str(error)
                    continue
                if stat.S_ISREG(state.st_mode):  # a pipe or a device might never end
                    yield FileState(entry.path, state.st_size, state.st_mtime_ns)


def refuse_to_empty(scan: FolderScan, missing: int = 0) -> None:
    """Raise FileNotFoundError for a folder without images, which may be a disk that is not there.

    Args:
        scan: The folder.
        missing: How many images of it the index has.
    """
    if scan.files:
        return
    stays = f" The {missing:,} images of it that the index has stay there." if missing else ""
    raise FileNotFoundError(
        f"The folder {scan.folder} has no images: no file in it, or in its folders, is named as one, such as .jpg or "
        f".png.{stays} Name another folder."
    )


__all__ = ["FileState", "FolderScan", "refuse_to_empty", "scan_folder"]
