"""The table that `hf-clip mine-negatives` writes: a data set's own rows and columns, with a column of wrong captions.

Images that are files are not copied: the table names them. A path is relative to the table's folder where the file lies
below it, since the trainer opens such a path without being asked. Other paths are absolute, and their folder is to be
allowed with `--image_folders`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoints.whole_file import whole_file
from ...checkpoints.whole_folder import (
    DiskFullError,
    FolderInUseError,
    check_writable,
    free_bytes,
    held_folder,
    is_full,
)
from ...data.columns import describe_feature
from ...data.images import ImagePlaces, find_local_file
from ...data.sources import import_datasets, leave_undecoded, open_source
from .mining import Mined
from .pair_table import PairTable

COLUMN = "negative_caption"

ROWS_AT_ONCE = 1000
"""Rows that are in memory at once, and in a group of the file."""

ENDING = ".parquet"


def check_table(path: str, column: str = COLUMN) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Args:
        path: The file.
        column: The name of its new column.

    Raises:
        ValueError: its name has another ending, or the column's name would be taken for a template.
        FileExistsError: there is one.
        PermissionError: its folder cannot be written.
    """
    if not path.endswith(ENDING):
        raise ValueError(f"--output is {path}, but the result is a table in a parquet file: name one, *{ENDING}.")
    if "{" in column or "}" in column:
        raise ValueError(
            f"--column is {column!r}, but hf-clip finetune takes braces for a template; name the column without them."
        )
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; remove it, or name another file for --output.")
    check_writable(Path(path).parent)


@contextmanager
def held_table(path: str) -> Iterator[None]:
    """Keep other programs from the table that is to be written; what killed ones left of it is removed.

    Args:
        path: The parquet file, which is not there.

    Raises:
        FileExistsError: It is there.
        OSError: Another program writes it.
    """
    file = Path(path).resolve()
    try:
        with held_folder(file):
            check_table(path)  # another program may have written it before it let go
            for other in file.parent.iterdir():
                if re.fullmatch(rf"\.{re.escape(file.name)}-[0-9a-f]{{32}}\.unfinished", other.name):
                    other.unlink(missing_ok=True)
            yield
    except FolderInUseError as error:
        raise OSError(
            f"{path} is being written by another program ({error.holder}); wait until it is done or end it, or name "
            f"another file for --output."
        ) from None


@dataclass
class _Paths:
    """Where images are, as the new table names them.

    Attributes:
        places: Where the source's own paths lead.
        folder: Of the new table.
        outside: Folders of files that are not below it.
    """

    places: ImagePlaces
    folder: Path
    outside: set[str] = field(default_factory=set)

    def __call__(self, stored: Any) -> Any:
        """A stored image with its path changed; bytes, web addresses and what is not there stay as they are."""
        if isinstance(stored, dict):
            return stored if stored.get("bytes") is not None else stored | {"path": self(stored.get("path"))}
        if not isinstance(stored, str) or ("://" in stored and not stored.startswith("file://")):
            return stored
        try:
            file = find_local_file(stored, self.places)
        except FileNotFoundError:
            return stored
        if file is None:
            return stored
        if file.is_relative_to(self.folder):
            return str(file.relative_to(self.folder))
        self.outside.add(str(file.parent))
        return str(file)


def open_whole(source: PairTable, split: str, new_column: str) -> Any:
    """A source's table with all of its columns, images undecoded.

    Args:
        source: As `load_pairs` has opened it.
        split: Of it.
        new_column: The column that it is to get.

    Raises:
        ValueError: It has that column already.
    """
    table = open_source(source.name, split)
    if new_column in table.column_names:
        raise ValueError(
            f"{source.name} has a column {new_column!r} already; name another for the new one with --column."
        )
    return leave_undecoded(table, table.features)


def write_mined(path: str, table: Any, source: PairTable, mined: Mined, column: str = COLUMN) -> list[str]:
    """Write a table completely or not at all.

    Args:
        path: The parquet file.
        table: See `open_whole`.
        source: As `load_pairs` has opened it.
        mined: What was found for its rows.
        column: The name of the column of wrong captions, lists of texts.

    Returns:
        Folders outside of the file's own in which its images lie.

    Raises:
        DiskFullError: There is no room.
    """
    from pyarrow import parquet  # type: ignore[import-untyped]

    datasets = import_datasets()
    features = datasets.Features({**table.features, column: datasets.List(datasets.Value("string"))})
    for name, feature in table.features.items():
        if describe_feature(feature) in ("image", "stored image"):
            features[name] = datasets.Image()
    paths = _Paths(source.places, Path(path).resolve().parent)
    try:
        with whole_file(path) as unfinished, parquet.ParquetWriter(unfinished, features.arrow_schema) as writer:
            for batch in _batches(table, source, mined, column, paths):
                writer.write_table(batch.cast(features.arrow_schema))
    except OSError as error:
        if not is_full(error):
            raise
        file = Path(path).resolve()
        # About what the new table takes; where that is less than what is free, nothing better is known.
        free, needed = free_bytes(file.parent), table.data.nbytes * len(table) // max(len(table.data), 1)
        raise DiskFullError(file, needed if free is None or needed > free else None, free) from error
    return _common_folders(paths.outside)


def _batches(table: Any, source: PairTable, mined: Mined, column: str, paths: _Paths) -> Iterator[Any]:
    """The rows as arrow tables, with the new column."""
    import pyarrow

    images = source.image_column
    first = 0
    for batch in table.with_format("arrow").iter(ROWS_AT_ONCE):
        if images in batch.column_names:  # a field of a record holds bytes
            kept = batch.schema.field(images)
            changed = pyarrow.array([paths(stored) for stored in batch[images].to_pylist()], kept.type)
            batch = batch.set_column(batch.column_names.index(images), kept.name, changed)
        texts = [[negative.text for negative in mined.of_row(first + row)] for row in range(len(batch))]
        yield batch.append_column(column, pyarrow.array(texts, pyarrow.list_(pyarrow.string())))
        first += len(batch)


def _common_folders(folders: set[str]) -> list[str]:
    """The folder that holds them all, or where that is the root of everything, each."""
    if not folders:
        return []
    common = os.path.commonpath(folders)
    return [common] if common != os.path.dirname(common) else sorted(folders)
