"""Folders that appear only when they are whole: written beside their place, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_destination(out: str | Path, overwrite: bool = False) -> Path:
    """Refuse a destination that would lose something, before any work is done.

    Raises FileExistsError for a file, and for a folder that is not empty unless `overwrite`.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} exists and is a file; name a folder to write to.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} exists and is not empty; name another, or pass --overwrite to replace its model.")
    return out


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `out` when the block ends without an error.

    Where `out` has files already, the new ones replace those of the same name and leave the others alone.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-unfinished-", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if out.is_dir() and any(out.iterdir()):
            for file in unfinished.iterdir():
                os.replace(file, out / file.name)
        else:
            if out.is_dir():
                out.rmdir()
            os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
