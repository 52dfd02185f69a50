"""The rows of a data set with their scores, on disk, and which of them to keep.

A condition such as `clip_score > 0.28 AND NOT duplicate` is SQL, and SQLite evaluates it, which comes with Python. A
row without a score fails every comparison with it, as NULL does in SQL.

Dimensions: I images, D embedding.
"""

import json
import re
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..model.checked_files import one_line
from .near_duplicates import group_duplicates

KNOWN = {
    "id": "INTEGER",
    "path": "TEXT",
    "caption": "TEXT",
    "metadata": "TEXT",
    "width": "INTEGER",
    "height": "INTEGER",
}
"""Columns that every data set has, and their types in SQLite."""

DUPLICATES = {"duplicate": "INTEGER", "duplicate_of": "INTEGER"}
TAGS = {"tags": "TEXT"}


STEPS = 1_000_000
"""Of SQLite between two looks at whether the user interrupts it: some milliseconds."""


def check_column(name: str) -> str:
    """Return the name of a score as a column's name. Raises ValueError if a column has it already."""
    column = re.sub(r"\W+", "_", name).strip("_")
    if (
        not column
        or column[0].isdigit()
        or column.lower() in {*KNOWN, *DUPLICATES, *TAGS, "clip_score", "kept", "image"}
    ):
        raise ValueError(
            f"A score is called {name!r}, but columns have that name or none can: name the head otherwise."
        )
    return column


class ScoredRows:
    """A table of rows and scores in a folder.

    Args:
        folder: A folder of its own, which is removed with all in it by the caller.
        scores: Names of the columns that hold scores.
        with_duplicates: Whether near duplicates are looked for.
        with_tags: Whether rows have tags.
    """

    def __init__(self, folder: Path, scores: Sequence[str], with_duplicates: bool, with_tags: bool):
        self.scores = list(scores)
        self.columns = KNOWN | dict.fromkeys(self.scores, "REAL")
        self.columns |= (TAGS if with_tags else {}) | (DUPLICATES if with_duplicates else {})
        self.with_duplicates = with_duplicates
        self._connection = sqlite3.connect(folder / "rows.sqlite")
        self._connection.execute("PRAGMA journal_mode = OFF")  # nobody reads it after a crash
        self._connection.execute("PRAGMA synchronous = OFF")
        defined = ", ".join(f'"{name}" {kind}' for name, kind in self.columns.items())
        self._connection.execute(f"CREATE TABLE rows ({defined}, kept INTEGER DEFAULT 1, PRIMARY KEY (id))")
        self._connection.execute("CREATE TABLE unreadable (path TEXT, problem TEXT)")
        self._embeddings = (folder / "embeddings.float16").open("w+b") if with_duplicates else None
        self._ids, self._hashes, self._areas = array("q"), array("q"), array("q")
        self._width = 0

    def close(self) -> None:
        """Close the files."""
        self._connection.close()
        if self._embeddings is not None:
            self._embeddings.close()

    def check_condition(self, condition: str) -> None:
        """Raise ValueError if a condition cannot be evaluated, before there are rows."""
        # In two places: what closes a parenthesis and goes on, such as `a) ORDER BY (b`, fits only one of them.
        self._evaluate(condition, f"SELECT 1 FROM rows WHERE ({condition}\n)")
        self._keep_where(condition)

    def _keep_where(self, condition: str) -> None:
        self._evaluate(condition, f"UPDATE rows SET kept = CASE WHEN ({condition}\n) THEN 1 ELSE 0 END")

    def _evaluate(self, condition: str, statement: str) -> None:
        """Run a statement with a condition. Ctrl-C ends one that never ends by itself."""
        self._connection.set_progress_handler(lambda: 0, STEPS)  # while Python runs, it hears of Ctrl-C
        try:
            self._connection.execute(statement).fetchall()
        except (sqlite3.Error, sqlite3.Warning) as error:
            if str(error) == "interrupted":
                raise KeyboardInterrupt from None
            names = ", ".join(name for name in self.columns)
            raise ValueError(
                f"The condition {one_line(condition)!r} cannot be evaluated ({one_line(error)}). It is SQL over the "
                f"columns {names}, such as clip_score > 0.28 AND NOT duplicate."
            ) from error
        finally:
            self._connection.set_progress_handler(None, STEPS)

    def add(self, rows: Iterable[dict[str, Any]], embeddings: np.ndarray, hashes: Sequence[int]) -> None:
        """Add rows with all columns but those of duplicates.

        Args:
            rows: Values by the names of columns.
            embeddings: (I, D) of the rows, of length one.
            hashes: (I,) their perceptual hashes.
        """
        rows = list(rows)
        names = [name for name in self.columns if name not in DUPLICATES]
        marks = ", ".join("?" * len(names))
        quoted = ", ".join(f'"{name}"' for name in names)
        self._connection.executemany(
            f"INSERT INTO rows ({quoted}) VALUES ({marks})", ([row[name] for name in names] for row in rows)
        )
        if self._embeddings is not None:
            self._embeddings.write(embeddings.astype(np.float16).tobytes())
            self._width = embeddings.shape[1]
            self._ids.extend(row["id"] for row in rows)
            self._hashes.extend(hashes)
            self._areas.extend(row["width"] * row["height"] for row in rows)

    def add_unreadable(self, problems: Iterable[tuple[str, str]]) -> None:
        """Add images that could not be opened, and why."""
        self._connection.executemany("INSERT INTO unreadable VALUES (?, ?)", problems)

    def mark_duplicates(self) -> None:
        """Compare all rows with one another. Of each group the largest image is none, and the others are duplicates."""
        if self._embeddings is None:
            return
        self._connection.execute("UPDATE rows SET duplicate = 0")
        if not self._ids:
            return
        self._embeddings.flush()
        stored = np.memmap(self._embeddings, dtype=np.float16, mode="r+", shape=(len(self._ids), self._width))
        groups = group_duplicates(torch.from_numpy(stored), np.array(self._hashes, dtype=np.int64))
        marked = []
        for group in groups:
            leader = max(group, key=lambda place: (self._areas[place], -place))
            marked += [(self._ids[leader], self._ids[place]) for place in group if place != leader]
        self._connection.executemany("UPDATE rows SET duplicate = 1, duplicate_of = ? WHERE id = ?", marked)

    def choose(self, condition: str | None, top_fraction: tuple[str, float] | None) -> None:
        """Say which rows are kept: those that fulfil a condition, and of them a fraction with the highest scores."""
        if condition is not None:
            self._keep_where(condition)
        if top_fraction is not None:
            name, fraction = top_fraction
            count = self._number(f'SELECT count("{name}") FROM rows WHERE kept')
            self._connection.execute(
                f'UPDATE rows SET kept = id IN (SELECT id FROM rows WHERE kept AND "{name}" IS NOT NULL '
                f'ORDER BY "{name}" DESC, id LIMIT ?)',
                [round(count * fraction)],
            )

    def _number(self, query: str) -> int:
        return int(self._connection.execute(query).fetchone()[0])

    def __len__(self) -> int:
        """Number of rows that could be opened."""
        return self._number("SELECT count(*) FROM rows")

    @property
    def kept(self) -> int:
        """Number of rows that are kept."""
        return self._number("SELECT count(*) FROM rows WHERE kept")

    @property
    def duplicates(self) -> int:
        """Number of rows that are near duplicates of a larger one."""
        return self._number("SELECT count(*) FROM rows WHERE duplicate") if self.with_duplicates else 0

    @property
    def unreadable(self) -> int:
        """Number of images that could not be opened."""
        return self._number("SELECT count(*) FROM unreadable")

    def problems(self) -> Iterator[tuple[str, str]]:
        """The images that could not be opened, and why."""
        yield from self._connection.execute("SELECT path, problem FROM unreadable")

    def values(self, name: str, kept: bool = False) -> np.ndarray:
        """A column of scores, float64, without the rows that have none."""
        only = "AND kept" if kept else ""
        found = self._connection.execute(f'SELECT "{name}" FROM rows WHERE "{name}" IS NOT NULL {only}')
        return np.fromiter((value for (value,) in found), dtype=np.float64)

    def kept_rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are kept, in their order. Tags are a list, `duplicate` is true or false."""
        names = list(self.columns)
        quoted = ", ".join(f'"{name}"' for name in names)
        for values in self._connection.execute(f"SELECT {quoted} FROM rows WHERE kept ORDER BY id"):
            row = dict(zip(names, values, strict=True))
            if "tags" in row:
                row["tags"] = json.loads(row["tags"])
            if "duplicate" in row:
                row["duplicate"] = bool(row["duplicate"])
            yield row


__all__ = ["ScoredRows", "check_column"]
