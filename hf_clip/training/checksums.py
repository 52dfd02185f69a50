"""One digest for each file of a checkpoint, in the form that `sha256sum --check` reads.

A disk, a cable or a copy may change a bit and say nothing of it. A weight with another bit is still a weight, so a
damaged checkpoint would go on to other weights. The digests are compared before anything of a checkpoint is read.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checkpoints.whole_folder import DiskFullError, free_bytes, is_full

SUMS = "SHA256SUMS"
UNFINISHED = ".unfinished"
"""How the name of a folder ends that is still written."""
PART = 1 << 22


def write_checksums(folder: Path) -> None:
    """Write the digests of all files below a folder, each of which is on the disk then, also if power fails.

    Args:
        folder: A checkpoint that is not yet in its place.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(folder / name, is_new=True)}  {name}\n" for name in names if name != SUMS]
    with (folder / SUMS).open("w", encoding="utf-8", newline="\n") as file:
        file.write("".join(lines) + _last_line(lines))
        file.flush()
        os.fsync(file.fileno())


def check_checksums(folder: Path) -> None:
    """Compare the files of a folder with their digests.

    Args:
        folder: A checkpoint.

    Raises:
        OSError: A file is missing, or cannot be read.
        ValueError: A file is not as it was written.
    """
    with (folder / SUMS).open(encoding="utf-8", newline="\n") as file:
        lines = file.readlines()
    if not lines or lines[-1] != _last_line(lines[:-1]):
        raise ValueError(f"{SUMS} is not as it was written")
    for line in lines[:-1]:
        digest, _, name = line.rstrip("\n").partition("  ")
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} is not as it was written: its checksum differs")


def _last_line(lines: list[str]) -> str:
    """A comment for `sha256sum`: the digest of the lines before, so that none can be missing."""
    return f"# {hashlib.sha256(''.join(lines).encode()).hexdigest()}\n"


def _digest(path: Path, is_new: bool = False) -> str:
    found = hashlib.sha256()
    with path.open("rb+" if is_new else "rb") as file:
        while part := file.read(PART):
            found.update(part)
        if is_new:
            os.fsync(file.fileno())
    return found.hexdigest()


def sync_folder(folder: Path) -> None:
    """See to it that the names in a folder are on the disk. Not every system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def checked_folder(folder: Path, needed: int | None = None) -> Iterator[Path]:
    """A new folder to fill. When the block ends without an error it has its digests and its name, and is on the disk.

    Args:
        folder: Its place, where nothing is. Nobody else may write it meanwhile.
        needed: Bytes that will be written, if known.

    Yields:
        The folder to fill, beside its place.

    Raises:
        DiskFullError: There is no room; nothing is left behind.
    """
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        write_checksums(unfinished)
        os.replace(unfinished, folder)
        sync_folder(folder.parent)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_full(error):
            raise DiskFullError(folder, needed, free_bytes(folder.parent)) from error
        raise
