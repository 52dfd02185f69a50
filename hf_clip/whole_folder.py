"""Folders that appear only when they are whole: written beside their place, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def check_destination(out: str | Path, overwrite: bool = False) -> Path:
    """Refuse a destination that would lose something or can't be written, before any work is done.

    Raises FileExistsError for a file, and for a folder that is not empty unless `overwrite`; PermissionError.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} exists and is a file; name a folder to write to.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} exists and is not empty; name another, or pass --overwrite to replace its model.")
    nearest = next(folder for folder in [out.resolve(), *out.resolve().parents] if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{out} cannot be written: {nearest} is no folder that you may write to.")
    try:  # read-only and virtual file systems, and disks that are full, are known by nothing else
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\0")
    except OSError as error:
        raise PermissionError(f"{out} cannot be written: {nearest} takes no files ({error.strerror}).") from None
    return out


def _move_in(unfinished: Path, out: Path, instead_of: Sequence[str]) -> None:
    """Move everything in `unfinished` into `out`, all of it or nothing; what is replaced is put back on failure."""
    replaced = Path(tempfile.mkdtemp(prefix=".replaced-", dir=out))
    moved: list[str] = []
    try:
        for name in instead_of:
            if (out / name).exists():
                os.replace(out / name, replaced / name)
        for name in sorted(path.name for path in unfinished.iterdir()):
            if (out / name).exists():
                os.replace(out / name, replaced / name)
            os.replace(unfinished / name, out / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.replace(out / name, unfinished / name)
        for path in replaced.iterdir():
            os.replace(path, out / path.name)
        raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Permissions as of any new file and folder; temporary ones are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def whole_folder(out: str | Path, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `out` when the block ends without an error.

    Where `out` has files already, the new ones replace those of the same name and those that `instead_of` names, and
    leave the others alone. When only the last step fails, the finished files are kept, and the error says where.
    """
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Inside a folder that exists, since it may be a file system of its own; else beside its place.
    place = out if out.is_dir() else out.parent
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-unfinished-", dir=place))
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    try:
        _open_to_others(unfinished)
        if place == out:
            _move_in(unfinished, out, instead_of)
            unfinished.rmdir()
        else:
            os.replace(unfinished, out)
    except OSError as error:
        raise OSError(f"The finished files could not be moved to {out} ({error}); they are in {unfinished}.") from error
