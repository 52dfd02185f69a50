"""Index the images of a data set, with their captions and their other columns.

A row is known by its number. While the data set's files, or its commit on the Hub, are the same, a known row is not
read again. Otherwise each row's image is compared by a hash of its content, and encoded if that is another. So it is
at the next run, too, if a file of the data set was written just before.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from ..data.columns import UnusableRowError
from ..data.sources import readable
from ..zero_shot.features import image_processor_of
from .image_rows import RowReader, fingerprint_of_source, may_change_unseen, open_rows, row_path
from .index_encoding import encode_rows
from .index_table import IndexTables
from .index_update import IndexChanges
from .indexed_image import IndexedImage, content_hash, prepare
from .row_encoding import draft_for


class _RowsToEncode:
    """The rows of a data set that are new or changed, and counts of the others."""

    def __init__(self, tables: IndexTables, source: str, table: Any, read: RowReader, same: bool):
        self.source, self.table, self.read, self.same = source, table, read, same
        self.known = known_rows(tables, source)
        self.unchanged = 0
        self.seen: set[str] = set()

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int | None, Any]]:
        with readable(self.source):
            for number, row in enumerate(self.table):
                path = row_path(self.source, number)
                self.seen.add(path)
                id, content = self.known.get(path, (None, None))
                if id is not None and (self.same or self._has_content(row, content)):
                    self.unchanged += 1
                    continue
                place = {"path": path, "path_bytes": path.encode(), "size": None, "mtime_ns": None}
                yield place | self.read.described(row), id, self.read.stored(row)

    def _has_content(self, row: Any, content: str | None) -> bool:
        try:
            return content_hash(self.read.content(self.read.stored(row))) == content
        except UnusableRowError:
            return False


def known_rows(tables: IndexTables, source: str) -> dict[str, tuple[int, str]]:
    """The rows of a data set that the index has: path → id and content hash."""
    found = tables.rows(["id", "path", "content"], "size IS NULL").to_pylist()
    return {row["path"]: (row["id"], row["content"]) for row in found if row["path"].rpartition("#")[0] == source}


def update_data_set(
    tables: IndexTables,
    source: str,
    load: Callable[[], tuple[Any, Any]],
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_folders: Sequence[str] = (),
    batch_size: int = 16,
    exact: bool = False,
    keep_missing: bool = False,
    threads: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> IndexChanges:
    """Bring an index up to date with a data set.

    Args:
        tables: The index.
        source: A repository on the Hub, a saved data set, CSV, JSON lines, parquet or webdataset files.
        load: Returns the model and its processor; called if a row has to be encoded.
        split: The split. None: "train".
        image_column: The column that holds the images. None: the only one that can be it.
        caption_column: The column of captions, or a template over columns. None: the only one that can be it, if there
            is one.
        image_folders: Folders outside of the data set's own whose images its rows may name.
        batch_size: Images encoded at once.
        exact: Whether to decode large JPEGs in full.
        keep_missing: Whether images whose rows are gone stay in the index.
        threads: How many open images.
        advance: Called with a number of images as they are encoded.

    Returns:
        What changed.

    Raises:
        OSError: There is no such data set.
        ValueError: It has no such split or column.
    """
    chosen, started = split or "train", time.time_ns()
    name, table, reader = open_rows(source, split, image_column, caption_column, image_folders)
    fingerprint, note = fingerprint_of_source(source, chosen), f"data set {name}"
    is_same = fingerprint is not None and tables.noted(note) == fingerprint
    rows = _RowsToEncode(tables, name, table, reader, is_same)
    to_encode = iter(rows)
    changes = IndexChanges()
    if (first := next(to_encode, None)) is not None:
        model, processor = load()
        image_processor = image_processor_of(processor)
        draft = draft_for(image_processor, exact)

        def make(stored: Any) -> IndexedImage:
            return prepare(reader.content(stored), image_processor, draft)

        items = chain([first], to_encode)
        changes = encode_rows(tables, items, make, model, batch_size=batch_size, threads=threads, advance=advance)
    changes.unchanged = rows.unchanged
    gone = [id for path, (id, _) in rows.known.items() if path not in rows.seen]
    broken = [id for path, (id, _) in rows.known.items() if path in changes.problems]
    tables.remove([*([] if keep_missing else gone), *broken])
    changes.removed, changes.kept = (0, len(gone)) if keep_missing else (len(gone), 0)
    tables.remove_problems([path.encode() for path in rows.seen if path not in changes.problems])
    if fingerprint is not None and not may_change_unseen(source, started):
        tables.note(note, fingerprint)
    return changes


__all__ = ["known_rows", "row_path", "update_data_set"]
