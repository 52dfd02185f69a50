"""The rows of a data set with their scores, on disk, and which of them to keep.

    FOLDER/rows.sqlite          the rows, what they were made of, and where in the source the next one is
    FOLDER/embeddings.float16   embeddings of the rows, one after the other; only if duplicates are looked for

Rows are committed together with the place where the source is to be read on. A run that was killed goes on there.

A condition such as `clip_score > 0.28 AND NOT duplicate` is SQL, and SQLite evaluates it, which comes with Python. A
row without a score fails every comparison with it, as NULL does in SQL.

Dimensions: I images, D embedding.
"""

import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..model.checked_files import one_line
from .image_rows import Position
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

FORMAT = 1
"""Number of the layout of these files, and of how hashes are made. What another version left is not used."""

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
        or column.lower() in {*KNOWN, *DUPLICATES, *TAGS, "clip_score", "perceptual_hash", "kept", "image"}
    ):
        raise ValueError(
            f"A score is called {name!r}, but columns have that name or none can: name the head otherwise."
        )
    return column


@dataclass
class _Progress:
    """How far a run has come: where its source is to be read on, and which steps are done. The D of its embeddings."""

    position: Position = field(default_factory=Position)
    is_complete: bool = False
    has_duplicates_marked: bool = False
    width: int = 0


def _keep_where(condition: str) -> str:
    return f"UPDATE rows SET kept = CASE WHEN ({condition}\n) THEN 1 ELSE 0 END"


class ScoredRows:
    """A table of rows and scores in a folder.

    Args:
        folder: A folder of its own. It may hold what an earlier run left, which goes on if it is made of the same, and
            is removed if not.
        scores: Names of the columns that hold scores.
        with_duplicates: Whether near duplicates are looked for.
        with_tags: Whether rows have tags.
        made_of: What rows and scores are made of. JSON can hold it. `data` may be None, where nobody knows whether the
            data are the same.
    """

    def __init__(
        self,
        folder: Path,
        scores: Sequence[str],
        with_duplicates: bool,
        with_tags: bool,
        made_of: dict[str, Any] | None = None,
    ):
        self.scores = list(scores)
        self.columns = KNOWN | dict.fromkeys(self.scores, "REAL")
        self.columns |= (TAGS if with_tags else {}) | (DUPLICATES if with_duplicates else {})
        self.with_duplicates = with_duplicates
        self._rows, self._vectors = folder / "rows.sqlite", folder / "embeddings.float16"
        self._progress = _Progress()
        given = json.loads(json.dumps({"format": FORMAT, "columns": list(self.columns), **(made_of or {})}))
        self._connection = sqlite3.connect(self._rows)
        if not self._goes_on(given):
            self._connection.close()
            for path in (*folder.glob(f"{self._rows.name}*"), self._vectors):  # SQLite's journal too
                path.unlink(missing_ok=True)
            self._connection = sqlite3.connect(self._rows)
            self._create(given)
        self._embeddings = self._vectors.open("a+b") if with_duplicates else None

    def _create(self, made_of: dict[str, Any]) -> None:
        defined = ", ".join(f'"{name}" {kind}' for name, kind in self.columns.items())
        self._connection.execute(
            f"CREATE TABLE rows ({defined}, perceptual_hash INTEGER, kept INTEGER DEFAULT 1, PRIMARY KEY (id))"
        )
        self._connection.execute("CREATE TABLE unreadable (path TEXT, problem TEXT)")
        self._connection.execute("CREATE TABLE run (made_of TEXT, progress TEXT)")
        self._connection.execute("INSERT INTO run VALUES (?, ?)", [json.dumps(made_of), json.dumps({})])
        self._connection.commit()

    def _goes_on(self, given: dict[str, Any]) -> bool:
        """Take over what an earlier run has left. False: it is made of something else, or not whole."""
        try:
            found = self._connection.execute("SELECT made_of, progress FROM run").fetchone()
            made_of, progress = (json.loads(text) for text in found)
            unknown = {"data": None} if None in (made_of.get("data"), given.get("data")) else {}
            if made_of | unknown != given | unknown:
                return False
            done = _Progress(**progress)
            done.position = Position(*done.position)
            if self.with_duplicates:
                size = len(self) * done.width * np.dtype(np.float16).itemsize
                if self._vectors.stat().st_size < size:
                    return False
                os.truncate(self._vectors, size)  # what came after the last commit
        except (sqlite3.DatabaseError, OSError, ValueError, TypeError):
            return False
        self._progress = done
        return True

    def close(self) -> None:
        """Close the files. What was not committed is forgotten."""
        self._connection.close()
        if self._embeddings is not None:
            self._embeddings.close()

    @property
    def position(self) -> Position:
        """Where the source is to be read on."""
        return self._progress.position

    @property
    def is_complete(self) -> bool:
        """Whether the source was gone through to its end."""
        return self._progress.is_complete

    def commit(self, **progress: Any) -> None:
        """Keep what was added, for this run and for one that goes on after it.

        Args:
            progress: `position` and `is_complete`, where they are others now.
        """
        if self._embeddings is not None:
            self._embeddings.flush()
            os.fsync(self._embeddings.fileno())
        done = replace(self._progress, **progress)
        self._connection.execute("UPDATE run SET progress = ?", [json.dumps(asdict(done))])
        self._connection.commit()
        self._progress = done

    def check_condition(self, condition: str) -> None:
        """Raise ValueError if a condition cannot be evaluated, before there are rows."""
        # In two places: what closes a parenthesis and goes on, such as `a) ORDER BY (b`, fits only one of them.
        self._evaluate(condition, f"EXPLAIN SELECT 1 FROM rows WHERE ({condition}\n)")
        self._evaluate(condition, f"EXPLAIN {_keep_where(condition)}")

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
        names = [name for name in self.columns if name not in DUPLICATES]
        marks = ", ".join("?" * (len(names) + 1))
        quoted = ", ".join(f'"{name}"' for name in (*names, "perceptual_hash"))
        values = ([*(row[name] for name in names), hash] for row, hash in zip(rows, hashes, strict=True))
        self._connection.executemany(f"INSERT INTO rows ({quoted}) VALUES ({marks})", values)
        if self._embeddings is not None:
            self._embeddings.write(embeddings.astype(np.float16).tobytes())
            self._progress.width = embeddings.shape[1]

    def add_unreadable(self, problems: Iterable[tuple[str, str]]) -> None:
        """Add images that could not be opened, and why."""
        self._connection.executemany("INSERT INTO unreadable VALUES (?, ?)", problems)

    def mark_duplicates(self) -> None:
        """Compare all rows with one another. Of each group the largest image is none, and the others are duplicates."""
        if self._embeddings is None or self._progress.has_duplicates_marked:
            return
        self._connection.execute("UPDATE rows SET duplicate = 0")
        found = self._connection.execute("SELECT id, perceptual_hash, width * height FROM rows ORDER BY id")
        ids, hashes, areas = np.fromiter(found, dtype=np.dtype((np.int64, 3))).reshape(-1, 3).T.copy()
        self._embeddings.flush()
        shape = (len(ids), self._progress.width)
        stored = np.memmap(self._embeddings, dtype=np.float16, mode="r+", shape=shape) if len(ids) else np.empty(shape)
        marked = []
        for group in group_duplicates(torch.from_numpy(stored), hashes):
            leader = max(group, key=lambda place: (areas[place], -place))
            marked += [(int(ids[leader]), int(ids[place])) for place in group if place != leader]
        self._connection.executemany("UPDATE rows SET duplicate = 1, duplicate_of = ? WHERE id = ?", marked)
        self.commit(has_duplicates_marked=True)

    def choose(self, condition: str | None, top_fraction: tuple[str, float] | None) -> None:
        """Say which rows are kept: those that fulfil a condition, and of them a fraction with the highest scores."""
        if condition is not None:
            self._evaluate(condition, _keep_where(condition))
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
