"""Folders whose large JPEGs were all decoded in full, as `hf-clip index --exact` does.

An index notes these folders. In any other, `--exact` encodes anew what may have been decoded at a part of its size, and
what was copied from there.
"""

import os

from .index_table import IndexTables

NOTE = "exact folders"

START_OF_JPEG = b"\xff\xd8\xff"


def may_be_draft(path: str, width: int, height: int, side: int) -> bool:
    """Whether an image is decoded at a half of its size, or less, where that is allowed.

    Args:
        path: Its file.
        width: In pixels.
        height: In pixels.
        side: The shorter side that the model needs, of which a draft has twice as much at least.
    """
    if min(width, height) < 4 * side:
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(START_OF_JPEG)) == START_OF_JPEG
    except OSError:
        return False


def is_exact(tables: IndexTables, folder: str) -> bool:
    """Whether all images of a folder are known to be decoded in full."""
    return any(_lies_in(folder, exact) for exact in tables.noted(NOTE, []))


def note_exact(tables: IndexTables, folder: str) -> None:
    """Note that all images of a folder are decoded in full."""
    if not is_exact(tables, folder):
        tables.note(NOTE, sorted({*tables.noted(NOTE, []), folder}))


def forget_exact(tables: IndexTables, folder: str) -> None:
    """Forget it of all folders in which, or above which, a folder lies: it gets images that may be drafts."""
    known = tables.noted(NOTE, [])
    left = [exact for exact in known if not (_lies_in(folder, exact) or _lies_in(exact, folder))]
    if left != known:
        tables.note(NOTE, left)


def _lies_in(folder: str, other: str) -> bool:
    return folder == other or folder.startswith(os.path.join(other, ""))


__all__ = ["forget_exact", "is_exact", "may_be_draft", "note_exact"]
