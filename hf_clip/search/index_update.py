"""Bring an index up to date with a folder: only what is new or was written anew is encoded.

1. Compare. A file with the size and the times that the index knows is unchanged, and costs its `stat`. It costs a hash
   if that `stat` cannot be trusted: the file had changed so shortly before it was read that it may have changed again
   within the same tick of the clock, or another program gave it its old time of writing back, and not the time of its
   last change.
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
from .index_table import CTIME, IndexTables, shown_path
from .indexed_image import can_be_read, file_hash

COMMIT_AT = 256
"""Images that are encoded before they are written: what a kill can lose."""

PLACE = ("path", "path_bytes", "size", "mtime_ns", CTIME)
"""Columns that say where an image is."""

KNOWN = ("id", "path_bytes", "size", "mtime_ns", CTIME, "content", "width", "height")

NOT_READ = -1
"""In place of the time of a file that could not be read: what kept it, such as permissions or a network, may pass."""

UNSETTLED = -1
"""In place of the time of the last change of a file that may have changed again unseen, see `may_change_unseen`."""


@dataclass
class IndexChanges:
    """What an update did, in numbers of images.

    Attributes:
        unchanged: Known, with the same size and time of writing.
        added: Encoded for the first time.
        updated: Encoded again, since the file was written anew.
        moved: Known by their content: renamed, moved, copied or touched.
        removed: Gone, and removed from the index.
        kept: Gone, and kept by `keep_missing`.
        problems: Files that cannot be opened, and why; those of earlier runs too.
        unread: How many files could not even be read, and are tried again although they have not changed.
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
    ctime_ns: int | None
    content: str
    width: int
    height: int


@dataclass
class UpdatePlan:
    """What there is to do for a folder.

    Attributes:
        scan: The folder.
        unchanged: Number of files that the index knows as they are.
        verified: Those of them that were hashed, and whose `stat` can be trusted from now on.
        recognised: Files with known content, with the row that is known and whether its own file is gone.
        to_encode: Files to encode, with the id of the row that they replace, or None.
        missing: Rows whose files are gone.
        problems: Files that could not be opened before and have not changed since, and why.
        unread: How many files could not and cannot be read.
        mended: Files that could not be opened before, and that changed, are gone, or can be read by now.
        broken: Ids of rows whose files cannot be opened any more, as a run noted that was interrupted after it.
    """

    scan: FolderScan
    unchanged: int = 0
    verified: list[tuple[FileState, _Known]] = field(default_factory=list)
    recognised: list[tuple[FileState, _Known, int | None]] = field(default_factory=list)
    to_encode: list[tuple[FileState, int | None]] = field(default_factory=list)
    missing: list[_Known] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    mended: list[str] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def columns_of_place(self, file: FileState) -> dict[str, Any]:
        """The columns that say where an image is."""
        ctime_ns = file.ctime_ns if self.scan.is_settled(file) else UNSETTLED
        place = {"path": shown_path(file.path), "path_bytes": os.fsencode(file.path), "size": file.size}
        return place | {"mtime_ns": file.mtime_ns, CTIME: ctime_ns}


def plan_update(
    tables: IndexTables,
    scan: FolderScan,
    advance: Callable[[int], Any] = lambda count: None,
    *,
    draft_side: int | None = None,
) -> UpdatePlan:
    """Compare a folder with the index. Of the files that are not as the index knows them, those are hashed that have
    the size of a known image.

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
    plan, paths = UpdatePlan(scan), {file.path for file in scan.files}
    lost = {row.path: row for row in known.values() if row.path not in paths and scan.is_known(row.path)}
    moved: set[int] = set()
    plan.mended = [path for path in old_problems if path not in paths and scan.is_known(path)]
    by_size: dict[int, list[_Known]] = defaultdict(list)
    for other in rows:
        by_size[other.size].append(other)
    for file in scan.files:
        advance(1)
        row = known.get(file.path)
        if row is not None and _is_unchanged(file, row, plan):
            if are_exact or not _may_be_draft(file, row, draft_side):
                plan.unchanged += 1
            else:
                plan.to_encode.append((file, row.id))
        elif file.path in old_problems:
            noted = old_problems[file.path]
            is_unread = noted["mtime_ns"] == NOT_READ and not can_be_read(file.path)
            plan.unread += is_unread
            if is_unread or _has_state(file, noted["size"], noted["mtime_ns"], noted[CTIME]):
                plan.problems[file.path] = noted["problem"]
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


def _has_state(file: FileState, size: int, mtime_ns: int, ctime_ns: int | None) -> bool:
    """Whether a file has the size and times that were noted. Of the last, an index of an earlier version has none."""
    return (file.size, file.mtime_ns) == (size, mtime_ns) and ctime_ns in (None, file.ctime_ns)


def _is_unchanged(file: FileState, row: _Known, plan: UpdatePlan) -> bool:
    """Whether a file is as its row says: by its size and times, else by its size, its time of writing and its content.

    No program sets the time of the last change back, but many changes of a file leave its content.
    """
    if _has_state(file, row.size, row.mtime_ns, row.ctime_ns):
        return True
    if (file.size, file.mtime_ns) != (row.size, row.mtime_ns):
        return False
    try:
        content = file_hash(file.path)
    except OSError:  # nobody knows, and the next run asks again
        plan.unread += 1
        return True
    if content == row.content and (plan.scan.is_settled(file) or row.ctime_ns != UNSETTLED):
        plan.verified.append((file, row))
    return content == row.content


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
    state = (row["size"], row["mtime_ns"], row.get(CTIME))
    return _Known(row["id"], os.fsdecode(row["path_bytes"]), *state, row["content"], *pixels)


def _read_problems(tables: IndexTables, folder: str) -> dict[str, dict[str, Any]]:
    inside, found = os.path.join(folder, ""), {}
    for row in tables.problem_rows():
        path = os.fsdecode(row["path_bytes"])
        if path.startswith(inside):
            found[path] = {CTIME: None} | row
    return found


def apply_recognised(tables: IndexTables, plan: UpdatePlan) -> int:
    """Write the rows of files whose content was known. Returns how many were moved, copied or touched."""
    if not (plan.recognised or plan.verified):
        return 0
    columns = ("id", "content", "width", "height", "perceptual_hash", "embedding", "thumbnail", "caption", "metadata")
    next_id = next_free_id(tables)
    known = [*plan.recognised, *((file, row, row.id) for file, row in plan.verified)]
    for first in range(0, len(known), COMMIT_AT):
        part = known[first : first + COMMIT_AT]
        ids = ", ".join(str(same.id) for _, same, _ in part)
        stored = {row["id"]: row for row in tables.rows(columns, f"id IN ({ids})").to_pylist()}
        replaced, added = [], []
        for file, same, place in part:
            if place is None:
                added.append(stored[same.id] | {"id": next_id} | plan.columns_of_place(file))
                next_id += 1
            else:
                replaced.append(stored[same.id] | {"id": place} | plan.columns_of_place(file))
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
    "forget_missing",
    "next_free_id",
    "plan_update",
]
