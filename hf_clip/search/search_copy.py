"""What a search reads of an index, copied into one file, so that it need not wait for the import of LanceDB.

    INDEX/search_copy.arrow     a line of 64 bytes with a checksum of what follows, and an Arrow file: the columns of
                                `COLUMNS`; in its schema the index's description, its notes, and a digest of its tables

LanceDB takes more processor time to import than all the rest of a search. A search by LanceDB leaves this file behind.
Later ones read it while the tables are as they were then, which the digest tells, see `digest_of_tables`. It has no
thumbnails and knows no filters: what needs these opens the tables.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.whole_file import whole_file
from ..extras import is_there
from .approximate_note import read_scan
from .index_table import FORMAT, ROWS_OF_A_BATCH, IndexDescription, IndexTables, is_address
from .plain_scan import numbers_of
from .unchanged_folders import digest_of_tables

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

NAME = "search_copy.arrow"

COLUMNS = ("id", "path", "path_bytes", "width", "height", "perceptual_hash", "embedding", "caption", "metadata")

MOST_IMAGES = 250_000
"""For more, the file is large (256 MB at D = 512), and what it saves is little beside the time to read it."""

HEADER = 64
FACTS = b"hf_clip.search_copy"


class CopiedTables:
    """The tables of an index as of the copy, for searches: what they read of `IndexTables`.

    Args:
        place: The index.
        table: The rows.
        facts: The index's description and notes.
    """

    def __init__(self, place: str, table: "pyarrow.Table", facts: dict[str, Any]):
        self.place, self.description = place, IndexDescription(**facts["description"])
        self.images = SimpleNamespace(version=facts["version"])
        self.opened: IndexTables | None = None
        self._table, self._notes = table, facts["notes"]
        self._ids = numbers_of(table["id"], np.int64)

    @classmethod
    def open(cls, place: str) -> "CopiedTables | None":
        """Open the copy. None: there is none, it is damaged, or the tables have changed since."""
        if is_address(place) or not is_there("pyarrow"):
            return None
        try:
            digest = digest_of_tables(place)
            return cls._read(place, digest)
        except (OSError, ValueError, KeyError, TypeError):  # Arrow's errors are ValueError and OSError
            return None

    @classmethod
    def _read(cls, place: str, digest: str) -> "CopiedTables | None":
        import pyarrow as pa

        with pa.memory_map(str(Path(place) / NAME)) as file:
            content = file.read_buffer()
        if len(content) <= HEADER:
            return None
        facts_and_rows = content.slice(HEADER)
        if content.slice(0, HEADER).to_pybytes() != _header(zlib.crc32(facts_and_rows)):
            return None
        table = pa.ipc.open_file(facts_and_rows).read_all()
        facts = json.loads(table.schema.metadata[FACTS])
        is_of_now = facts["tables"] == digest and facts["description"].get("format") == FORMAT
        return cls(place, table, facts) if is_of_now else None

    def refresh(self) -> None:
        """The copy stays what it is."""

    def count(self) -> int:
        """How many images there are."""
        return len(self._ids)

    def batches(self, columns: Sequence[str]) -> "Iterator[pyarrow.RecordBatch]":
        """Columns of all images, some thousand rows at a time."""
        yield from self._table.select(list(columns)).to_batches(max_chunksize=ROWS_OF_A_BATCH)

    def rows_of(self, columns: Sequence[str], ids: Sequence[int]) -> "pyarrow.Table":
        """Columns of those images that there are, in no certain order. There are no thumbnails."""
        import pyarrow as pa

        places = np.flatnonzero(np.isin(self._ids, np.asarray(ids, dtype=np.int64)))
        rows = self._table.select([name for name in columns if name != "thumbnail"])
        return pa.concat_tables([rows.slice(place, 1) for place in places.tolist()] or [rows.slice(0, 0)])

    def noted(self, name: str, default: Any = None) -> Any:
        """The value under a name."""
        return self._notes.get(name, default)

    def note(self, name: str, value: Any) -> None:
        """Keep a value under a name: in the tables, which are opened for it, so that the copy is none of them then."""
        self.opened = self.opened or IndexTables.open(self.place)
        self.opened.note(name, value)
        self._notes[name] = value


def open_for_search(place: str, needs_tables: bool = False, exact: bool = False) -> Any:
    """Open an index for a search: the copy if it will do, or else the tables.

    Args:
        place: The index.
        needs_tables: Whether the search needs what the copy does not have.
        exact: Whether all images are compared, even if the index has an approximate scan.

    Returns:
        IndexTables, or CopiedTables, which has what such a search reads of them.

    Raises:
        SearchIndexError: There is no index, or it is of another version.
    """
    copied = None if needs_tables else CopiedTables.open(place)
    if copied is None or (read_scan(copied) is not None and not exact):  # the tables have the partitions
        return IndexTables.open(place)
    return copied


def keep_copy(tables: IndexTables | CopiedTables) -> None:
    """Write the copy anew after a search, if LanceDB is imported and there is no copy of the tables as they are.

    Where nobody may write there is none.
    """
    opened = tables if isinstance(tables, IndexTables) else tables.opened
    if opened is None or is_address(opened.place):
        return
    with suppress(OSError, ValueError):
        if opened.count() <= MOST_IMAGES and CopiedTables.open(opened.place) is None:
            _write(opened)


def _write(tables: IndexTables) -> None:
    import pyarrow as pa

    before = digest_of_tables(tables.place)
    tables.refresh()
    rows = tables.rows(COLUMNS)
    facts = {"tables": before, "version": tables.images.version, "notes": tables.all_noted()}
    facts["description"] = asdict(tables.description)
    rows = rows.replace_schema_metadata({FACTS: json.dumps(facts)})
    if digest_of_tables(tables.place) != before:  # another process writes
        return
    with whole_file(Path(tables.place) / NAME) as unfinished, unfinished.open("w+b") as file:
        file.write(bytes(HEADER))
        with pa.ipc.new_file(file, rows.schema) as writer:
            writer.write_table(rows)
        checksum = 0
        file.seek(HEADER)
        while part := file.read(1 << 22):
            checksum = zlib.crc32(part, checksum)
        file.seek(0)
        file.write(_header(checksum))


def _header(checksum: int) -> bytes:
    return f"hf_clip search copy {FORMAT} {checksum:08x}".encode().ljust(HEADER - 1) + b"\n"


__all__ = ["CopiedTables", "keep_copy", "open_for_search"]
