"""Bring an index up to date with a folder: only what is new or was written anew is encoded.

1. Compare. A file with the size and time that the index knows is unchanged, and costs its `stat`.
2. Recognise. A file that is new at its place, or was written anew, is hashed if the index knows an image of its size.
   If the content is known, the file was moved, copied or touched: the row is kept, or copied, and nothing is encoded.
3. Encode, see `index_encoding`. A batch is one commit.
4. Forget. Images whose files are gone leave the index last. What lies in a folder that could not be read stays.

Whatever interrupts it, the next run goes on after the last commit. Nothing here imports torch.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .exact_folders import is_exact, may_be_draft
from .folder_scan import FileState, FolderScan
from .index_table import IndexTables, shown_path
from .indexed_image import can_be_read, file_hash

COMMIT_AT = 256
"""Images that are encoded before they are written: what a kill can lose."""

PLACE = ("path", "path_bytes", "size", "mtime_ns")
"""Columns that say where an image is."""

KNOWN = ("id", "path_bytes", "size", "mtime_ns", "content", "width", "height")

NOT_READ = -1
"""In place of the time of a file that could not be read: what kept it, such as permissions or a network, may pass."""


@dataclass
class IndexChanges:
    """What an update did, in numbers of images.

    Attributes:
        unchanged: Known, with the same size and time.
        added: Encoded for the first time.
        updated: Encoded again, since the file was written anew.
        moved: Known by their content: renamed, moved, copied or touched.
        removed: Gone, and removed from the index.
        kept: Gone, and kept by `keep_missing`.
        problems: Files that cannot be opened, and why; those of earlier runs too.
        unread: How many of these could not even be read, and are tried again although they have not changed.
    """

    unchanged: int = 0
    added: int = 0
    updated: int = 0
    moved: int = 0
    removed: int = 0
    kept: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    unread: int = 0

    def describe(self) -> str:
        """The numbers above 0, such as "12 added, 3 moved, 200 unchanged"."""
        names = ("added", "updated", "moved", "removed", "kept", "unchanged")
        return ", ".join(f"{count:,} {name}" for name in names if (count := getattr(self, name))) or "nothing there"


@dataclass(frozen=True)
class _Known:
    id: int
    path: str
    size: int
    mtime_ns: int
    content: str
    width: int
    height: int


@dataclass
class UpdatePlan:
    """What there is to do for a folder.

    Attributes:
        unchanged: Number of files that the index knows as they are.
        recognised: Files with known content, with the row that is known and whether its own file is gone.
        to_encode: Files to encode, with the id of the row that they replace, or None.
        missing: Rows whose files are gone.
        problems: Files that could not be opened before and have not changed since, and why.
        unread: How many of these could not and cannot be read.
        mended: Files that could not be opened before, and that changed, are gone, or can be read by now.
        broken: Ids of rows whose files cannot be opened any more, as a run noted that was interrupted after it.
    """

    unchanged: int = 0
    recognised: list[tuple[FileState, _Known, int | None]] = field(default_factory=list)
    to_encode: list[tuple[FileState, int | None]] = field(default_factory=list)
    missing: list[_Known] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    mended: list[str] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)


def plan_update(
    tables: IndexTables,
    scan: FolderScan,
    advance: Callable[[int], Any] = lambda count: None,
    *,
    draft_side: int | None = None,
) -> UpdatePlan:
    """Compare a folder with the index. Files are hashed where an image of their size is known, and else not opened.

    Args:
        tables: The index.
        scan: The folder.
        advance: Called with a number of files as they are compared.
        draft_side: Images are to be decoded in full: those that are known and may be drafts of at least this shorter
            side are encoded again. None: they are kept.

    Returns:
        What there is to do.
    """
    are_exact = draft_side is None or is_exact(tables, scan.folder)
    rows = [_as_known(row) for row in tables.rows(KNOWN, "size IS NOT NULL").to_pylist()]
    inside = os.path.join(scan.folder, "")
    known = {row.path: row for row in rows if row.path.startswith(inside)}
    old_problems = _read_problems(tables, scan.folder)
    plan, paths = UpdatePlan(), {file.path for file in scan.files}
    lost = {row.path: row for row in known.values() if row.path not in paths and scan.is_known(row.path)}
    moved: set[int] = set()
    plan.mended = [path for path in old_problems if path not in paths and scan.is_known(path)]
    by_size: dict[int, list[_Known]] = defaultdict(list)
    for other in rows:
        by_size[other.size].append(other)
    for file in scan.files:
        advance(1)
        row, state = known.get(file.path), (file.size, file.mtime_ns)
        if row is not None and (row.size, row.mtime_ns) == state:
            if are_exact or not _may_be_draft(file, row, draft_side):
                plan.unchanged += 1
            else:
                plan.to_encode.append((file, row.id))
        elif file.path in old_problems:
            size, mtime_ns, problem = old_problems[file.path]
            is_unread = mtime_ns == NOT_READ and not can_be_read(file.path)
            plan.unread += is_unread
            if is_unread or (size, mtime_ns) == state:
                plan.problems[file.path] = problem
                plan.broken += [] if row is None else [row.id]
            else:
                plan.mended.append(file.path)
                plan.to_encode.append((file, None if row is None else row.id))
        elif (same := _same_content(file, by_size[file.size], lost)) and not _may_be_draft(file, same, draft_side):
            is_moved = lost.pop(same.path, None) is not None or not os.path.lexists(same.path)
            place = row.id if row is not None else same.id if is_moved and same.id not in moved else None
            moved.add(same.id)
            plan.recognised.append((file, same, place))
        else:
            plan.to_encode.append((file, None if row is None else row.id))
    plan.missing = list(lost.values())
    return plan


def _may_be_draft(file: FileState, row: _Known, side: int | None) -> bool:
    return side is not None and may_be_draft(file.path, row.width, row.height, side)


def _same_content(file: FileState, candidates: list[_Known], lost: dict[str, _Known]) -> _Known | None:
    """The row of an image with the same content; one whose own file is gone, if there is one."""
    if not candidates:
        return None
    try:
        content = file_hash(file.path)
    except OSError:
        return None  # whoever opens it gets the error
    same = [row for row in candidates if row.content == content]
    return next((row for row in same if row.path in lost or not os.path.lexists(row.path)), same[0] if same else None)


def _as_known(row: dict[str, Any]) -> _Known:
    pixels = (row["width"] or 0, row["height"] or 0)
    return _Known(row["id"], os.fsdecode(row["path_bytes"]), row["size"], row["mtime_ns"], row["content"], *pixels)


def _read_problems(tables: IndexTables, folder: str) -> dict[str, tuple[int, int, str]]:
    inside, found = os.path.join(folder, ""), {}
    for row in tables.problem_rows():
        path = os.fsdecode(row["path_bytes"])
        if path.startswith(inside):
            found[path] = (row["size"], row["mtime_ns"], row["problem"])
    return found


def columns_of_place(file: FileState) -> dict[str, Any]:
    """The columns that say where an image is."""
    place = {"path": shown_path(file.path), "path_bytes": os.fsencode(file.path)}
    return {**place, "size": file.size, "mtime_ns": file.mtime_ns}


def apply_recognised(tables: IndexTables, plan: UpdatePlan) -> int:
    """Write the rows of files whose content was known. Returns how many there are."""
    if not plan.recognised:
        return 0
    columns = ("id", "content", "width", "height", "perceptual_hash", "embedding", "thumbnail", "caption", "metadata")
    next_id = next_free_id(tables)
    for first in range(0, len(plan.recognised), COMMIT_AT):
        part = plan.recognised[first : first + COMMIT_AT]
        ids = ", ".join(str(same.id) for _, same, _ in part)
        stored = {row["id"]: row for row in tables.rows(columns, f"id IN ({ids})").to_pylist()}
        replaced, added = [], []
        for file, same, place in part:
            if place is None:
                added.append(stored[same.id] | {"id": next_id} | columns_of_place(file))
                next_id += 1
            else:
                replaced.append(stored[same.id] | {"id": place} | columns_of_place(file))
        tables.put(replaced)
        tables.add(added)
    return len(plan.recognised)


def next_free_id(tables: IndexTables) -> int:
    """The id of the next image that is added."""
    ids = tables.rows(["id"])["id"].to_numpy()
    return int(ids.max()) + 1 if len(ids) else 1


def forget_missing(tables: IndexTables, plan: UpdatePlan, keep_missing: bool, unreadable: dict[str, str]) -> int:
    """Remove images whose files are gone, and those that can no longer be opened. Returns how many of the first."""
    tables.remove_problems([os.fsencode(path) for path in plan.mended if path not in unreadable])
    broken = [replaced for file, replaced in plan.to_encode if replaced is not None and file.path in unreadable]
    gone = [] if keep_missing else [row.id for row in plan.missing]
    tables.remove([*gone, *broken, *plan.broken])
    return len(gone)


__all__ = [
    "IndexChanges",
    "UpdatePlan",
    "apply_recognised",
    "columns_of_place",
    "forget_missing",
    "next_free_id",
    "plan_update",
]
