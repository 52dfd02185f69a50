"""Write a file completely or not at all: write it beside its place, then rename it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from .whole_folder import DiskFullError, is_full


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file that takes the place of `path` when the block ends without an error.

    Until then it has a hidden name in the same folder, which ends in `.unfinished`. After an error it is removed, and
    `path` is as it was.

    Args:
        path: The file. Its folder is made if it is missing.

    Yields:
        The path to write to.

    Raises:
        IsADirectoryError: `path` is a folder.
        DiskFullError: There is no room for it.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}-{uuid4().hex}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except Exception as error:  # libraries that are not written in Python raise what they like
        if is_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(path.absolute(), None, None) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, values: Any, *, sort_keys: bool = False) -> None:
    """Write a JSON file completely or not at all. An existing file is replaced.

    Args:
        path: The file.
        values: What it is to hold.
        sort_keys: Whether the fields of objects are put in order by their names.
    """
    with whole_file(path) as unfinished:
        text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=sort_keys)
        unfinished.write_text(text + "\n", encoding="utf-8")


__all__ = ["whole_file", "write_json"]
