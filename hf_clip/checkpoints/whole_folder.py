"""Write a folder completely or not at all: write beside its place, then move the files in under a lock.

An existing folder is not replaced as a whole, since it may be a mount point, the current folder or a git repository,
and may hold other files. Its files are replaced in this order:

1. The old files move out: config.json first, then the other JSON files, then the rest.
2. The new files move in, in the opposite order: config.json last.

Invariant: while config.json is in the folder, all files beside it were written together. A reader that finds the same
config.json before and after it reads the other files has read one model. `model.checked_files.read_unchanged` does
this. Between the two steps the folder holds no model, for less than a millisecond.

A writer that is killed leaves hidden folders behind. The next writer that holds the lock moves the old files back and
removes these folders.
"""

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_WORDS = (
    *("no space left", "disk quota exceeded", "file too large", "os error 28"),
    *("file write failed", "iostream error", "unexpected pos"),  # torch.save's writer
)
"""How libraries that are not written in Python say so, in errors of any kind."""


UNKNOWN_HOLDER = "which doesn't say who it is"


class FolderInUseError(OSError):
    """Another program writes to the same folder.

    folder: which one.   holder: the process that does, in words, where it is known
    """

    def __init__(self, folder: Path, holder: str):
        self.folder, self.holder = folder, holder
        super().__init__(
            f"{folder} is in use by another program ({holder}); wait until it is done or end it, or name another "
            f"folder."
        )

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.folder, self.holder)


class DiskFullError(OSError):
    """There is no room for a folder or a file.

    folder: where it was to be written.   needed, free: bytes; None where they aren't known
    """

    def __init__(self, folder: Path, needed: int | None, free: int | None):
        self.folder, self.needed, self.free = folder, needed, free
        said = ""
        if needed is None and free is not None:
            said = f": it needs more than the {free:,} bytes that are free"
        elif needed is not None and free is None:
            said = f": it needs {needed:,} bytes"
        elif needed is not None and free is not None and needed > free:  # under a quota, more may seem to be free
            said = f": it needs {needed:,} bytes, and {free:,} are free"
        super().__init__(
            f"No space left for {folder}{said}. Nothing was written. Make room there, or name a folder on another disk."
        )

    def __reduce__(self) -> tuple[type, tuple[Path, int | None, int | None]]:
        return type(self), (self.folder, self.needed, self.free)


def check_destination(out: str | Path, overwrite: bool = False, option: str = "--overwrite") -> Path:
    """Refuse a destination that would lose something or can't be written, before any work is done.

    Args:
        out: the folder to be written.
        overwrite: whether it may hold files.
        option: what allows this on the command line, for the message.

    Returns:
        `out` as a path.

    Raises:
        FileExistsError: `out` is a file, or holds files and `overwrite` is false.
        PermissionError: it cannot be written.
    """
    out = Path(out)
    _check_unused(out, overwrite, option)
    check_writable(out)
    return out


def check_writable(out: Path) -> None:
    """Raise PermissionError or DiskFullError if a folder cannot be written, or not be made where it is missing."""
    nearest = next(folder for folder in [out.resolve(), *out.resolve().parents] if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{out} cannot be written: {nearest} is no folder that you may write to.")
    try:  # read-only and virtual file systems, and disks that are full, are known by nothing else
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\0")
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(out.resolve(), None, None) from None
        raise PermissionError(f"{out} cannot be written: {nearest} takes no files ({error.strerror}).") from None


def _check_unused(out: Path, overwrite: bool, option: str = "--overwrite") -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} exists and is a file; name a folder to write to.")
    if overwrite or not out.is_dir():
        return
    if any(_left_by_a_writer(path, out.resolve()) is None for path in out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty; name another, or pass {option} to replace its model.")


def _hidden(out: Path, kind: str) -> str:
    """How the names begin of the hidden folders that writing `out` takes."""
    return f".{out.name}-{kind}-"


def _left_by_a_writer(path: Path, out: Path) -> str | None:
    """Which of a writer's own files this is: its lock, or a hidden folder's kind; None for all other files."""
    if path.name in (_beside(out, "lock"), _beside(out, "holder")):
        return "lock"
    found = re.fullmatch(rf"\.{re.escape(out.name)}-(unfinished|replaced|removed)-[a-z0-9_]{{8}}", path.name)
    return found[1] if found else None


def _beside(out: Path, ending: str) -> str:
    return f".{out.name}.{ending}"


@contextmanager
def held_folder(out: Path, wait: float = 0.0) -> Iterator[None]:
    """Keep other writers of a folder away; what killed ones left there is removed.

    The kernel lets go of the lock of a process that was killed. The lock is a file beside the folder, so that it holds
    for all machines that share the disk, and is there before the folder is. It is removed while it is held; filelock
    takes no lock of a file that has been removed. Where a file system has no locks, nobody is kept away.

    Args:
        out: The folder, which need not be there, by its absolute path.
        wait: Seconds for which another holder is waited for.

    Raises:
        FolderInUseError: Another program holds it.
        DiskFullError: There is no room for the lock.
    """
    made = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    place = out.parent if os.access(out.parent, os.W_OK | os.X_OK) else out
    lock, holder = FileLock(place / _beside(out, "lock")), place / _beside(out, "holder")
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        who = UNKNOWN_HOLDER
        with suppress(OSError):
            who = holder.read_text(encoding="utf-8").strip() or who
        raise FolderInUseError(out, who) from None
    except (NotImplementedError, OSError) as error:  # some network file systems have no locks
        if isinstance(error, OSError) and error.errno in FULL:
            raise DiskFullError(out, None, None) from None
        yield
        return
    try:
        with suppress(OSError):  # a full disk keeps nobody from removing what fills it
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        _clear_leftovers(out)
        yield
    finally:
        for path in (holder, Path(lock.lock_file)):
            with suppress(OSError):  # Windows removes none that is open
                path.unlink()
        lock.release()
        for folder in made:  # where nothing was written, nothing is left
            with suppress(OSError):
                folder.rmdir()


def _clear_leftovers(out: Path) -> None:
    """Undo what a killed writer had begun. The lock must be held: nobody else's are there then."""
    for place in {out, out.parent}:
        if not place.is_dir():
            continue
        for path in list(place.iterdir()):
            kind = _left_by_a_writer(path, out)
            if kind == "replaced":
                for old in sorted(path.iterdir(), key=_entrance):
                    if (out / old.name).is_dir():
                        shutil.rmtree(out / old.name)
                    os.replace(old, out / old.name)
            if kind not in (None, "lock"):
                shutil.rmtree(path, ignore_errors=True)


def _entrance(path: Path) -> tuple[bool, bool, str]:
    """The order in which files enter: descriptions after what they describe, config.json last."""
    return path.suffix == ".json", path.name == "config.json", path.name


def _move_in(unfinished: Path, out: Path, instead_of: Sequence[str]) -> None:
    """Move everything in `unfinished` into `out`, all of it or nothing; what is replaced is put back on failure."""
    replaced = Path(tempfile.mkdtemp(prefix=_hidden(out, "replaced"), dir=out))
    entering = sorted(unfinished.iterdir(), key=_entrance)
    leaving = {out / name for name in (*instead_of, *(path.name for path in entering))}
    moved: list[Path] = []
    try:
        for path in sorted(filter(os.path.lexists, leaving), key=_entrance, reverse=True):
            os.replace(path, replaced / path.name)
        for path in entering:
            os.replace(path, out / path.name)
            moved.append(path)
    except BaseException:
        for path in reversed(moved):
            os.replace(out / path.name, path)
        for path in sorted(replaced.iterdir(), key=_entrance):
            os.replace(path, out / path.name)
        replaced.rmdir()
        raise
    removed = replaced.with_name(replaced.name.replace("-replaced-", "-removed-"))
    os.replace(replaced, removed)  # from here on a killed process leaves the new model
    shutil.rmtree(removed, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Permissions as of any new file and folder; temporary ones are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def is_full(error: BaseException) -> bool:
    """Whether an error of any library says that there is no room."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    said = str(error).lower()
    return isinstance(error, Exception) and any(words in said for words in FULL_WORDS)


def free_bytes(place: Path) -> int | None:
    """What is free on the disk of a folder, which need not be there; None where that is not known."""
    try:
        return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free
    except OSError:
        return None


@contextmanager
def whole_folder(
    out: str | Path,
    instead_of: Sequence[str] = (),
    *,
    overwrite: bool = True,
    needed: int | None = None,
    wait: float = 0.0,
    is_held: bool = False,
) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `out` when the block ends without an error.

    Where `out` has files already, the new ones replace those of the same name and those that `instead_of` names, and
    leave the others alone. When only the last step fails, the finished files are kept, and the error says where.

    Args:
        out: The folder to write; it need not be there.
        instead_of: Names of files of `out` that go when the new ones come.
        overwrite: Whether `out` may hold files, now that no other writer can put any there.
        needed: Bytes that will be written, if known.
        wait: Seconds for which another writer of the same folder is waited for.
        is_held: Whether the caller holds the folder already, see `held_folder`.

    Yields:
        The folder to fill.

    Raises:
        FolderInUseError: Another program writes to `out`.
        FileExistsError: `out` holds files and `overwrite` is false.
        DiskFullError: There is no room; nothing is left behind.
    """
    out = Path(out).resolve()
    with nullcontext() if is_held else held_folder(out, wait):
        _check_unused(out, overwrite)
        # Inside a folder that exists, since it may be a file system of its own; else beside its place.
        place = out if out.is_dir() else out.parent
        free = free_bytes(place)
        if needed is not None and free is not None and free < needed:
            raise DiskFullError(out, needed, free)
        unfinished = Path(tempfile.mkdtemp(prefix=_hidden(out, "unfinished"), dir=place))
        try:
            yield unfinished
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if is_full(error):
                raise DiskFullError(out, needed, free_bytes(place)) from error
            raise
        try:
            _open_to_others(unfinished)
            if place == out:
                _move_in(unfinished, out, instead_of)
                unfinished.rmdir()
            else:
                os.replace(unfinished, out)
        except OSError as error:
            kept = unfinished.with_name(unfinished.name.replace("-unfinished-", "-finished-"))
            with suppress(OSError):  # else the next writer would remove them
                os.replace(unfinished, kept)
            kept = kept if kept.exists() else unfinished
            raise OSError(f"The finished files could not be moved to {out} ({error}); they are in {kept}.") from error
