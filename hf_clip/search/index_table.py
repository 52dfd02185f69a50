"""The tables of an index, as LanceDB keeps them: in a folder, or on object storage by an address.

    INDEX/images.lance     a row for each image, see `image_schema`
    INDEX/problems.lance   a row for each file that could not be opened, so that it is not opened again while unchanged
    INDEX/notes.lance      names and values: which folders were indexed, of which files the model was read, …

What the embeddings were made of stands in the schema of `images` and never changes. Every write is one commit of
LanceDB: after a kill, a table holds the commits that were finished, and nothing of the others.

Dimensions: D embedding.
"""

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.whole_file import whole_file
from ..extras import require
from ..model import checked_files
from .index_errors import SearchIndexError, damaged, in_words, is_of_condition, known_problem, reason_of
from .index_writer import only_writer
from .row_filter import FilterError, check_filter

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

FORMAT = 1
"""Number of the layout that is described here."""

IMAGES, PROBLEMS, NOTES = "images", "problems", "notes"
CTIME = "ctime_ns"
"""A column that indexes of earlier versions lack. It is added when a row is written that has a value for it."""

DESCRIPTION = b"hf_clip.index"
MARK = "hf_clip_index.json"
"""File in the folder of an index that says what the folder is. Not written on object storage."""

INDEX_VARIABLE = "HF_CLIP_INDEX"

ROWS_OF_A_BATCH = 4096

COMMITS_KEPT_APART = 100
"""Commits after which the pieces that they left are joined, since each piece takes time in every search."""


@dataclass(frozen=True)
class IndexDescription:
    """What the embeddings of an index were made of.

    Attributes:
        width: D, numbers of an embedding.
        weights: Hash of the image tower's weights and configuration.
        processor: The image processor's settings.
        model: The model as it was named: a folder, a repository, a file.
        format: Number of the layout.
    """

    width: int
    weights: str
    processor: dict[str, Any]
    model: str
    format: int = FORMAT


def default_index() -> str:
    """The index that is used if none is named: `HF_CLIP_INDEX`, else a folder of the user's own data."""
    if named := os.environ.get(INDEX_VARIABLE):
        return named
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(data, "hf_clip", "index")


def image_schema(description: IndexDescription) -> "pyarrow.Schema":
    """The columns of an image's row.

    path is for people and filters; a byte of it that is no UTF-8 is `�`. path_bytes is what the system knows the file
    by, content a hash of the file's bytes, perceptual_hash 64 bits that differ little between copies of an image.
    ctime_ns is -1 if the file may have changed after it was read, without a trace in its size and times.
    """
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("path_bytes", pa.binary(), nullable=False),
            pa.field("size", pa.int64()),
            pa.field("mtime_ns", pa.int64()),
            pa.field(CTIME, pa.int64()),
            pa.field("content", pa.string()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("perceptual_hash", pa.int64()),
            pa.field("embedding", pa.list_(pa.float16(), description.width)),
            pa.field("thumbnail", pa.binary()),
            pa.field("caption", pa.string()),
            pa.field("metadata", pa.string()),
        ],
        metadata={DESCRIPTION: json.dumps(asdict(description))},
    )


def _problem_schema() -> "pyarrow.Schema":
    import pyarrow as pa

    names = {"path": pa.string(), "path_bytes": pa.binary(), "size": pa.int64(), "mtime_ns": pa.int64()}
    return pa.schema([*names.items(), (CTIME, pa.int64()), ("problem", pa.string())])


def _note_schema() -> "pyarrow.Schema":
    import pyarrow as pa

    return pa.schema([("name", pa.string()), ("value", pa.string())])


def shown_path(path: str) -> str:
    """A path for people and tables: bytes that are no UTF-8 as `�`."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def printable(text: str) -> str:
    """A text in one line of a terminal, whatever characters it has."""
    return checked_files.printable(shown_path(text))


def file_in_the_way(folder: Path) -> Path | None:
    """What stands where a folder is, or would be made, and is none: a file, a pipe, a device."""
    nearest = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    return nearest if nearest.exists() and not nearest.is_dir() else None


def is_address(place: str) -> bool:
    """Whether a place is an address of object storage, such as s3://bucket/index."""
    return "://" in place


def made_at(place: str) -> tuple[int, int] | None:
    """What tells an index from another one that is made later in the same folder. None: it is gone, or elsewhere."""
    try:
        found = os.stat(os.path.join(place, MARK))
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def without_collection() -> Iterator[None]:
    """Look for no garbage, of which the import of LanceDB makes none: it builds classes by the thousand."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def connect(place: str) -> Any:
    """Connect to the tables of a place.

    Raises:
        ImportError: LanceDB is not installed.
        SearchIndexError: The place is a file, or a folder of something else.
    """
    require("A search index", "search")
    os.environ.setdefault("LANCE_LOG", "error")  # it warns of its own coming changes
    with without_collection():
        import lancedb

    if not is_address(place):
        _check_folder(Path(place))
    try:
        return lancedb.connect(place)
    except Exception as error:  # Rust's errors come as RuntimeError, OSError or ValueError
        problem = known_problem(place, error) or f"The index {place} cannot be reached ({reason_of(error)})."
        raise SearchIndexError(problem, place) from error


def _check_folder(folder: Path) -> None:
    if (file := file_in_the_way(folder)) is not None:
        raise SearchIndexError(f"{file} is a file, but an index is a folder: name another.", str(folder))
    with in_words(str(folder)):
        is_ours = (folder / MARK).is_file() or (folder / f"{IMAGES}.lance").is_dir()  # `open` looks into the table
        is_of_others = folder.is_dir() and any(folder.iterdir()) and not is_ours
    if is_of_others:
        raise SearchIndexError(
            f"The folder {folder} holds other files, and no index: name an empty or a new folder.", str(folder)
        )


class IndexTables:
    """The tables of one index.

    Args:
        place: Folder or address.
        description: What the embeddings were made of.
        database: LanceDB's connection.
        tables: LanceDB's tables by their names: of images, of files that could not be opened, of names and values.
    """

    def __init__(self, place: str, description: IndexDescription, database: Any, tables: Mapping[str, Any]):
        self.place, self.description, self.database = place, description, database
        self.images, self.problems, self.notes = (tables[name] for name in (IMAGES, PROBLEMS, NOTES))
        self.commits = 0
        self.made_at = made_at(place)
        self._check_writer: Callable[[], None] = lambda: None

    @classmethod
    def create(cls, place: str, description: IndexDescription) -> "IndexTables":
        """Make an empty index. What a killed attempt left is taken over."""
        database = connect(place)
        schemas = {PROBLEMS: _problem_schema(), NOTES: _note_schema(), IMAGES: image_schema(description)}
        with in_words(place):
            if not is_address(place):
                with whole_file(Path(place) / MARK) as unfinished:
                    unfinished.write_text(json.dumps({"what": "an index of hf_clip", "format": FORMAT}) + "\n")
            tables = {name: database.create_table(name, schema=each, exist_ok=True) for name, each in schemas.items()}
        return cls(place, description, database, tables)

    @classmethod
    def open(cls, place: str) -> "IndexTables":
        """Open an index.

        Raises:
            SearchIndexError: There is none, or it is of another version.
        """
        if not is_address(place) and not Path(place).exists():
            raise _missing(place)
        found_at, database = made_at(place), connect(place)
        with in_words(place):
            names = set(database.list_tables().tables)
            if IMAGES not in names:
                raise _missing(place)
            if lost := {PROBLEMS, NOTES} - names:
                raise damaged(place, f"its table {min(lost)} is missing")
            tables = {name: database.open_table(name) for name in (IMAGES, PROBLEMS, NOTES)}
            stored = (tables[IMAGES].schema.metadata or {}).get(DESCRIPTION)
            values = json.loads(stored) if stored else {}
        if values.get("format") != FORMAT or values.keys() != {field.name for field in fields(IndexDescription)}:
            found = values.get("format", "unknown")
            is_newer = isinstance(found, int) and found > FORMAT
            advice = "update hf-clip" if is_newer else "make it anew with `hf-clip index`, into another folder"
            raise SearchIndexError(
                f"The index {place} has layout {found}, and this version reads layout {FORMAT}: {advice}.", place
            )
        description = IndexDescription(**values)
        if lost := {*image_schema(description).names} - {*tables[IMAGES].schema.names, CTIME}:
            raise damaged(place, f"its table {IMAGES} has no column {min(lost)}")
        opened = cls(place, description, database, tables)
        opened.made_at = found_at  # before its tables were read: an index that is made meanwhile is another
        return opened

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other processes from writing while the block runs, see `only_writer`."""
        with only_writer(self.place, database=self.database) as check:
            self._check_writer = check
            try:
                self.refresh()
                yield
            finally:
                self._check_writer = lambda: None

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Around each write: another process may have taken over, and errors are told in one line."""
        self._check_writer()
        with in_words(self.place):
            yield

    def refresh(self) -> None:
        """See what other processes have written since."""
        with in_words(self.place):
            for table in (self.images, self.problems, self.notes):
                table.checkout_latest()

    def rows(self, columns: Sequence[str], where: str | None = None) -> "pyarrow.Table":
        """Columns of the images, in the order in which they were added. `ctime_ns` is left out where there is none.

        Raises:
            SearchIndexError: `where` is no condition that LanceDB reads.
        """
        known = self.images.schema.names
        query = self.images.search().select([name for name in columns if name != CTIME or name in known])
        with self._filtering(where):
            return (query.where(where) if where is not None else query).to_arrow()

    def check_condition(self, where: str) -> None:
        """Raise SearchIndexError for a text that is no condition on the columns; no more than one row is read."""
        with self._filtering(where):
            self.images.search().select(["id"]).where(where).limit(1).to_arrow()

    def count(self, where: str | None = None) -> int:
        """How many images there are, or meet a condition. Raises as `rows` does."""
        with self._filtering(where):
            return int(self.images.count_rows(where))

    def rows_at(self, places: Sequence[int], columns: Sequence[str]) -> "pyarrow.Table":
        """Columns of some images by their places, which are those of `rows`; in no certain order."""
        with in_words(self.place):
            return self.images.take_offsets(list(places)).select(list(columns)).to_arrow()

    def rows_of(self, columns: Sequence[str], ids: Sequence[int]) -> "pyarrow.Table":
        """Columns of those images that there are, by their ids; in no certain order."""
        return self.rows(columns, f"id IN ({', '.join(map(str, ids))})")

    def batches(self, columns: Sequence[str]) -> "Iterator[pyarrow.RecordBatch]":
        """Columns of all images, some thousand rows at a time."""
        with in_words(self.place):
            yield from self.images.search().select(list(columns)).to_batches(ROWS_OF_A_BATCH)

    @contextmanager
    def _filtering(self, where: str | None) -> Iterator[None]:
        """Around each read with a condition: errors of the condition are told apart from those of the tables."""
        if where is not None:
            check_filter(where)
        try:
            yield
        except Exception as error:
            if where is None or not is_of_condition(error):
                with in_words(self.place):
                    raise
            raise FilterError(where, reason_of(error)) from None

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add images, in one commit."""
        if rows:
            import pyarrow as pa

            self._complete(self.images)
            self.add_table(pa.Table.from_pylist(rows, schema=self.images.schema))

    def add_table(self, rows: "pyarrow.Table") -> None:
        """Add images, whose columns are those of the table, in one commit."""
        if len(rows):
            with self.committing():
                self.images.add(rows)
            self._committed()

    def put(self, rows: list[dict[str, Any]]) -> None:
        """Replace the rows of images that have the same ids, in one commit."""
        if rows:
            import pyarrow as pa

            self._complete(self.images)
            self.put_table(pa.Table.from_pylist(rows, schema=self.images.schema))

    def put_table(self, rows: "pyarrow.Table") -> None:
        """Replace the rows of images that have the same ids, in one commit."""
        if len(rows):
            with self.committing():
                self.images.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
            self._committed()

    def remove(self, ids: Sequence[int]) -> None:
        """Remove images, in one commit."""
        if ids:
            with self.committing():
                self.images.delete(f"id IN ({', '.join(map(str, ids))})")
            self._committed()

    def _complete(self, table: Any) -> None:
        """Add the column `ctime_ns` to a table of an earlier version, of whose rows nothing is known then."""
        if CTIME not in table.schema.names:
            with self.committing():
                table.add_columns({CTIME: "CAST(NULL AS BIGINT)"})

    def problem_rows(self) -> list[dict[str, Any]]:
        """What is noted of files that could not be opened."""
        with in_words(self.place):
            return list(self.problems.search().to_arrow().to_pylist())

    def put_problems(self, rows: list[dict[str, Any]]) -> None:
        """Note files that could not be opened; an older note of the same file is replaced."""
        if rows:
            import pyarrow as pa

            self._complete(self.problems)
            given = pa.Table.from_pylist(rows, schema=self.problems.schema)
            with self.committing():
                merge = self.problems.merge_insert("path_bytes")
                merge.when_matched_update_all().when_not_matched_insert_all().execute(given)

    def remove_problems(self, paths: Sequence[bytes]) -> None:
        """Forget that these files could not be opened."""
        for first in range(0, len(paths), 1000):
            listed = ", ".join(f"X'{path.hex()}'" for path in paths[first : first + 1000])
            with self.committing():
                self.problems.delete(f"path_bytes IN ({listed})")

    def _committed(self) -> None:
        self.commits += 1
        if self.commits % COMMITS_KEPT_APART == 0:
            self.tidy()

    def tidy(self) -> None:
        """Join the pieces that many commits left, and remove versions that are an hour old."""
        with self.committing():
            self.images.optimize(cleanup_older_than=timedelta(hours=1))

    def note(self, name: str, value: Any) -> None:
        """Keep a value, as JSON, under a name."""
        import pyarrow as pa

        with self.committing():
            given = pa.Table.from_pylist([{"name": name, "value": json.dumps(value)}], schema=self.notes.schema)
            merge = self.notes.merge_insert("name")
            merge.when_matched_update_all().when_not_matched_insert_all().execute(given)

    def noted(self, name: str, default: Any = None) -> Any:
        """The value under a name."""
        return self.all_noted().get(name, default)

    def all_noted(self) -> dict[str, Any]:
        """All values by their names."""
        with in_words(self.place):
            rows = self.notes.search().to_arrow().to_pylist()
            return {row["name"]: json.loads(row["value"]) for row in rows}


def _missing(place: str) -> SearchIndexError:
    return SearchIndexError(
        f"There is no index at {place}: make one with `hf-clip index FOLDER --model MODEL`, or name another with "
        f"--index.",
        place,
    )


__all__ = [
    "CTIME",
    "IndexDescription",
    "IndexTables",
    "SearchIndexError",
    "default_index",
    "file_in_the_way",
    "image_schema",
    "is_address",
    "made_at",
    "printable",
    "shown_path",
]
