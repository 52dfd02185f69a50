"""Find the images of a folder and its folders, with what a `stat` says of each. No file is opened.

Links to files are followed, and links to folders are not, so that a scan ends. Hidden files and folders are left out.
"""

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..zero_shot.files import is_image_name
from .indexed_image import register_formats

SETTLED_AFTER_NS = 3_000_000_000
"""Nanoseconds after which another change of a file changes its times too: the coarsest clock of a file system is that
of FAT, with ticks of two seconds, and a server's clock may be a little behind."""

LONGEST_AHEAD_NS = 24 * 3600 * 1_000_000_000
"""Nanoseconds by which a server's clock may be ahead. A time beyond, such as that of a camera whose clock was wrong, is
none at which anything is written now."""


@dataclass(frozen=True)
class FileState:
    """A file of an image.

    Attributes:
        path: Its absolute path. Bytes of the name that are no UTF-8 are surrogates, as Python reads them.
        size: In bytes.
        mtime_ns: When it was last written, in nanoseconds. Programs set it, such as `cp -p`.
        ctime_ns: When anything of it was last changed, its time of writing too. No program sets it. On Windows: when
            it was made.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str, found: os.stat_result) -> "FileState":
        """The state of a file of which a `stat` is known."""
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def may_change_unseen(self, now_ns: int) -> bool:
        """Whether it could be written anew, with the same size, and keep both of its times.

        It could if it was last changed in the tick of its file system's clock that was not over at `now_ns`. A time of
        writing that lies ahead was set by somebody, and tells nothing, if the other time is earlier. Nor does a time
        that is too far ahead for any clock: whoever writes the file now gives it another.

        Args:
            now_ns: When it was looked at, or some time before.
        """
        first, last = now_ns - SETTLED_AFTER_NS, now_ns + LONGEST_AHEAD_NS
        was_set_ahead = self.ctime_ns < now_ns < self.mtime_ns
        return first <= self.ctime_ns <= last or (first <= self.mtime_ns <= last and not was_set_ahead)


@dataclass
class FolderScan:
    """What a folder holds.

    Attributes:
        folder: Its absolute path.
        time_ns: When the scan began.
        files: Its images, in the order of their paths.
        unread: Folders and files in it that could not be looked at, and why. Nothing is known of what they hold.
    """

    folder: str
    time_ns: int
    files: list[FileState] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    def is_settled(self, file: FileState) -> bool:
        """Whether another change of a file that was found would change its size or a time of it."""
        return not file.may_change_unseen(self.time_ns)

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
    found = FolderScan(place, time.time_ns())
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
                    yield FileState.of(entry.path, state)


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
