"""The images of a folder or a data set, row by row, with their captions and other columns.

A source is read in units: some files of a folder, some rows of a saved data set, one file of a streamed data set such
as a webdataset tar. Units in their order hold all rows in their order, and each can be read by itself: whoever goes on
after an interruption leaves out whole units, and several machines take a unit each.

    for row in open_image_rows("shards/{000..099}.tar"):
        row.path, row.caption, row.metadata

Images are opened, and encoded, by `row_encoding`.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..data.columns import CaptionReader, UnusableRowError, column_of, field_of, find_caption_column, find_image_column
from ..data.images import find_image_places, image_content
from ..data.sources import describe_columns, expand_braces, folder_of, leave_undecoded, open_source, readable
from ..evaluation.fingerprint import fingerprint_of
from ..training.data.image_stream import SAVED, is_data_set
from .folder_scan import FileState, refuse_to_empty, scan_folder
from .indexed_image import MOST_BYTES, register_formats

LONGEST_TEXT = 2000
"""Characters of a column's text that are kept."""

UNIT_ROWS = 256
"""Files of a folder, or rows of a saved data set, that are a unit."""


@dataclass(frozen=True)
class ImageRow:
    """One image of a source, not yet opened.

    Attributes:
        path: Its file, or the data set's name, `#` and the row's number.
        number: Place in the source, from 0.
        unit: Which unit it is in.
        caption: The data set's caption, or None.
        metadata: The data set's other columns, as JSON, or None.
        stored: What the image is read of: a path, bytes, or what `datasets` stores.
    """

    path: str
    number: int
    unit: int
    caption: str | None
    metadata: str | None
    stored: Any


class Position(NamedTuple):
    """Where a run goes on in its source: that many rows are done, of them `offset` in the unit `unit`."""

    unit: int = 0
    offset: int = 0
    number: int = 0

    def after(self, rows: Sequence[ImageRow]) -> "Position":
        """Where a run goes on that has done these rows too."""
        if not rows:
            return self
        last = rows[-1]
        before = self.offset if self.unit == last.unit else 0
        return Position(last.unit, before + sum(row.unit == last.unit for row in rows), last.number + 1)


class RowReader:
    """Takes a data set's row apart: its image, its caption, and its other columns as JSON."""

    def __init__(self, source: str, features: Any, image_column: str, caption_column: str | None, places: Any):
        self.image_column, self.places = image_column, places
        self.captions = None if caption_column is None else CaptionReader(source, caption_column, features)
        self.others = [name for name in features if name not in (image_column, caption_column)]
        self.labels = {name: features[name].names for name in self.others if hasattr(features[name], "names")}

    def stored(self, row: Any) -> Any:
        """What the image is read of."""
        return field_of(row, self.image_column)

    def content(self, stored: Any) -> bytes:
        """The image's bytes. Raises UnusableRowError where there are none."""
        return image_content(stored, self.places)

    def described(self, row: Any) -> dict[str, Any]:
        """The columns `caption` and `metadata`."""
        caption = None
        if self.captions is not None:
            try:
                caption = next((text for text in self.captions(row) if text), None)
            except UnusableRowError:
                caption = None
        found = {}
        for name in self.others:
            value = row.get(name)
            if name in self.labels and isinstance(value, int) and 0 <= value < len(self.labels[name]):
                value = self.labels[name][value]
            if isinstance(value, (str, int, float, bool)):
                found[name] = value[:LONGEST_TEXT] if isinstance(value, str) else value
        return {"caption": caption, "metadata": json.dumps(found, ensure_ascii=False) if found else None}


def row_path(source: str, number: int) -> str:
    """What a data set's row is called in the column `path`."""
    return f"{source}#{number}"


def open_rows(
    source: str,
    split: str | None,
    image_column: str | None,
    caption_column: str | None,
    image_folders: Sequence[str],
    streaming: bool = True,
) -> tuple[str, Any, RowReader]:
    """Open a split of a data set. Returns its name, its table or stream, and what takes its rows apart.

    Raises:
        OSError: There is no such data set.
        ValueError: It has no such split or column.
    """
    chosen = split or "train"
    name = source if chosen == "train" else f"{source}:{chosen}"
    table = open_source(source, chosen, streaming=streaming)
    features = describe_columns(table)
    if not features:
        raise ValueError(f"The data set {name} has no rows; name one with images.")
    image_column = find_image_column(source, features, image_column)
    captions = _caption_column(source, features, caption_column, image_column)
    table = leave_undecoded(table, [column_of(image_column, features)])
    places = find_image_places(source, folder_of(source), image_folders)
    return name, table, RowReader(source, features, image_column, captions, places)


def _caption_column(source: str, features: Any, named: str | None, image_column: str) -> str | None:
    """The column of captions; None if none is named, and none or several can be it."""
    try:
        return find_caption_column(source, features, named, image_column)
    except ValueError:
        if named is not None:
            raise
        return None


def read_file(path: str) -> bytes:
    """A file's bytes. Raises OSError or UnusableRowError."""
    if (size := os.stat(path).st_size) > MOST_BYTES:
        raise UnusableRowError(f"it has {size:,} bytes, and at most {MOST_BYTES:,} are read")
    return Path(path).read_bytes()


class FolderRows:
    """The images of a folder and its folders, in the order of their paths.

    Attributes:
        name: The folder's absolute path.
        units: Number of units.
        total: Number of images.
        fingerprint: A text that changes when an image is added, removed or written anew.
        is_numbered: Whether an image's path is made of its number: it is not.
        has_captions: Whether its images have captions: no.
        unread: Folders and files that could not be looked at, and why.
    """

    is_numbered = has_captions = False

    def __init__(self, folder: str):
        scan = scan_folder(folder)
        refuse_to_empty(scan)
        self.name, self.unread = scan.folder, scan.unread
        self._files, self.total = scan.files, len(scan.files)
        self.units = -(-len(scan.files) // UNIT_ROWS)
        self.fingerprint: str | None = _digest((file.path, file.size, file.mtime_ns) for file in scan.files)

    def rows_of(self, unit: int, first: int | None = None) -> Iterator[ImageRow]:
        """The images of a unit."""
        start = unit * UNIT_ROWS
        for number, file in enumerate(self._files[start : start + UNIT_ROWS], start):
            yield ImageRow(file.path, number, unit, None, None, file.path)

    def __iter__(self) -> Iterator[ImageRow]:
        return (row for unit in range(self.units) for row in self.rows_of(unit))

    content = staticmethod(read_file)


class DataSetRows:
    """The rows of a data set.

    Attributes:
        name: The data set, with its split if that is not "train".
        units: Number of units.
        total: Number of rows, or None where nobody knows.
        fingerprint: A text that changes with the data set, or None where nobody knows.
        is_numbered: Whether a row's path is made of its number: it is.
        has_captions: Whether a column of captions was found or named.
        unread: Nothing.
    """

    is_numbered = True

    def __init__(
        self,
        source: str,
        split: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        image_folders: Sequence[str] = (),
    ):
        is_saved = any(os.path.isfile(os.path.join(os.path.expanduser(source), name)) for name in SAVED)
        opened = open_rows(source, split, image_column, caption_column, image_folders, streaming=not is_saved)
        self.name, self._table, self._reader = opened
        self._source, self._is_saved = source, is_saved
        self.has_captions = self._reader.captions is not None
        self.unread: dict[str, str] = {}
        self.fingerprint = fingerprint_of_source(source, split or "train")
        if is_saved:
            self.total: int | None = len(self._table)
            self.units = -(-len(self._table) // UNIT_ROWS)
        else:
            counts = getattr(self._table.info, "splits", None) or {}
            found = counts.get(str(self._table.split))
            self.total = found.num_examples if found is not None and found.num_examples else None
            self.units = self._table.num_shards

    def rows_of(self, unit: int, first: int = 0) -> Iterator[ImageRow]:
        """The rows of a unit. `first` is the number of its first row, which a stream does not know."""
        with readable(self._source):
            if self._is_saved:
                start = unit * UNIT_ROWS
                rows = self._table.select(range(start, min(start + UNIT_ROWS, len(self._table))))
            else:
                rows = self._table.shard(num_shards=self.units, index=unit) if self.units > 1 else self._table
            for number, row in enumerate(rows, first):
                described = self._reader.described(row)
                yield ImageRow(row_path(self.name, number), number, unit, **described, stored=self._reader.stored(row))

    def __iter__(self) -> Iterator[ImageRow]:
        number = 0
        for unit in range(self.units):
            for row in self.rows_of(unit, number):
                number += 1
                yield row

    @property
    def content(self) -> Callable[[Any], bytes]:
        """Returns the bytes of a row's image. Raises UnusableRowError. It can be pickled without the rows."""
        return partial(image_content, places=self._reader.places)


ImageRows = FolderRows | DataSetRows


def open_image_rows(
    source: str,
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_folders: Sequence[str] = (),
) -> ImageRows:
    """Open a folder of images or a data set, to go through its rows once.

    Args:
        source: A folder of images; a repository on the Hub, a saved data set, CSV, JSON lines, parquet or webdataset
            files, which are streamed.
        split: The split of a data set. None: "train".
        image_column: The column that holds the images. None: the only one that can be it.
        caption_column: The column of captions, or a template over columns. None: the only one that can be it, if there
            is one.
        image_folders: Folders outside of the data set's own whose images its rows may name.

    Returns:
        The source. `embed_rows` takes its rows, and its method `content`.

    Raises:
        OSError: There is no such folder or data set, or the folder has no images.
        ValueError: The data set has no rows, or no such split or column.
    """
    register_formats()
    if is_data_set(os.path.expanduser(source)):
        return DataSetRows(source, split, image_column, caption_column, image_folders)
    return FolderRows(source)


def rows_from(rows: ImageRows, position: Position) -> Iterator[ImageRow]:
    """The rows of a source from a position on."""
    number = position.number
    for place in range(position.unit, rows.units):
        skipped = position.offset if place == position.unit else 0
        for row in islice(rows.rows_of(place, number - skipped), skipped, None):
            number += 1
            yield row


def fingerprint_of_source(source: str, split: str) -> str | None:
    """A text that changes with a data set: by its files' sizes and times, or its commit on the Hub. None: unknown."""
    names = [os.path.expanduser(name) for name in expand_braces(source)]
    if "://" in source or (len(names) == 1 and not glob.has_magic(names[0])):
        return fingerprint_of(source, split)
    files = sorted({file for name in names for file in glob.glob(name, recursive=True)})
    return _digest((split, file, (state := os.stat(file)).st_size, state.st_mtime_ns) for file in files)


def may_change_unseen(source: str, now_ns: int) -> bool:
    """Whether a file of a data set had changed so shortly before that another change might leave its fingerprint.

    Args:
        source: The data set.
        now_ns: When its fingerprint was taken, or some time before.
    """
    if "://" in source:
        return False
    named = [os.path.expanduser(name) for name in expand_braces(source)]
    found = (Path(path) for name in named for path in glob.glob(name, recursive=True))
    files = (path for place in found for path in (place.rglob("*") if place.is_dir() else [place]))
    return any(FileState.of(str(path), path.stat()).may_change_unseen(now_ns) for path in files if path.is_file())


def _digest(parts: Iterable[tuple[Any, ...]]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(b"".join(os.fsencode(str(value)) + b"\0" for value in part))
    return state.hexdigest()


__all__ = [
    "DataSetRows",
    "FolderRows",
    "ImageRow",
    "ImageRows",
    "Position",
    "RowReader",
    "fingerprint_of_source",
    "may_change_unseen",
    "open_image_rows",
    "open_rows",
    "row_path",
    "rows_from",
]
