"""Results of classification as a table: CSV, JSON lines or parquet, a row for each image, written as they come.

    image, label, score, label_2, score_2, …, error

A table appears only when it is whole.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.whole_file import whole_file
from ..checkpoints.whole_folder import check_writable
from .files import Classified

ROWS_AT_ONCE = 4096
"""Rows of a parquet file's group, which are held until it is full."""

Row = dict[str, str | float | None]


def columns_of(top_k: int) -> list[str]:
    """The names of a table's columns."""
    pairs = [f"{name}{'' if rank == 1 else f'_{rank}'}" for rank in range(1, top_k + 1) for name in ("label", "score")]
    return ["image", *pairs, "error"]


def name_in_table(result: Classified) -> str:
    """An image's name. A path of this machine may hold bytes that are no text."""
    return result.name.encode("utf-8", "backslashreplace").decode()


def row_of(result: Classified, top_k: int) -> Row:
    """A result as a row; what it doesn't have is None."""
    values: list[Any] = [value for found in result.labels for value in (found["label"], found["score"])]
    values += [None] * (2 * top_k - len(values))
    return dict(zip(columns_of(top_k), [name_in_table(result), *values, result.error], strict=True))


@contextmanager
def _csv_writer(path: Path, columns: list[str]) -> Iterator[Callable[[Row], Any]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        yield writer.writerow


@contextmanager
def _json_lines_writer(path: Path, columns: list[str]) -> Iterator[Callable[[Row], Any]]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def _parquet_writer(path: Path, columns: list[str]) -> Iterator[Callable[[Row], Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    is_number = {name: name.partition("_")[0] == "score" for name in columns}
    kinds = [(name, pyarrow.float32() if is_number[name] else pyarrow.string()) for name in columns]
    schema = pyarrow.schema(kinds)
    rows: list[Row] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def write() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            rows.clear()

        def take(row: Row) -> None:
            rows.append(row)
            if len(rows) == ROWS_AT_ONCE:
                write()

        yield take
        write()


WRITERS = {".csv": _csv_writer, ".jsonl": _json_lines_writer, ".parquet": _parquet_writer}


def check_table(path: str | Path) -> None:
    """Refuse a table that cannot be written, before any work is done for it.

    Raises:
        ValueError: The name ends otherwise than those of the three kinds.
        IsADirectoryError: It is a folder's.
        NotADirectoryError, PermissionError: Nothing can be written where it is to stand.
        ImportError: A package that writes this kind is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it, such as {path / 'scores.csv'}.")
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"{path} ends in none of {', '.join(WRITERS)}, which say how a table is written; choose one.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is no folder. Choose another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: you may not write in {folder}. Choose another folder.")
    check_writable(path.absolute().parent)
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'Writing parquet needs pyarrow, which this Python does not have: pip install "hf-clip[train]"; or '
                "write .csv or .jsonl."
            ) from error


@contextmanager
def row_writer(path: str | Path, columns: list[str]) -> Iterator[Callable[[Row], Any]]:
    """What writes one row after the other to a table, which takes its place when the block ends without an error.

    Args:
        path: Ends in .csv, .jsonl or .parquet.
        columns: Names of the columns. `score`, `score_2` and so on hold numbers, the others text.

    Yields:
        A function that writes a row.

    Raises:
        ValueError, IsADirectoryError, ImportError: See `check_table`.
    """
    check_table(path)
    make = WRITERS[Path(path).suffix.lower()]
    with whole_file(path) as unfinished, make(unfinished, columns) as write:
        yield write


@contextmanager
def table_writer(path: str | Path, top_k: int) -> Iterator[Callable[[Classified], Any]]:
    """What writes one result of classification after the other to a table, as `row_writer` does rows.

    Args:
        path: Ends in .csv, .jsonl or .parquet.
        top_k: Number of labels of a result, each with columns of its own: `label`, `score`, `label_2`, `score_2`.

    Yields:
        A function that writes a `Classified`.

    Raises:
        ValueError, IsADirectoryError, ImportError: See `check_table`.
    """
    with row_writer(path, columns_of(top_k)) as write:
        yield lambda result: write(row_of(result, top_k))


__all__ = ["check_table", "columns_of", "name_in_table", "row_of", "row_writer", "table_writer"]
