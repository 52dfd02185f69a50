"""All embeddings of an index in memory, as `exact_scan` has them, in numpy: for a search that does not import torch.

Dimensions: I images, D embedding, Q queries.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

    from .index_table import IndexTables

BLOCK = 512
"""Rows that are widened at once: 1 MiB in float32 at D = 512."""


class PlainMatrix:
    """The embeddings of an index.

    Attributes:
        ids: (I,) int64.
        embeddings: (I, D) float16, of length one up to its rounding.
        version: Of the table that they were read of.
    """

    def __init__(self, ids: np.ndarray, embeddings: np.ndarray, version: int = 0):
        self.ids, self.embeddings, self.version = ids, embeddings, version

    @classmethod
    def read(cls, tables: "IndexTables") -> "PlainMatrix":
        """Read the embeddings of all images, piece by piece, so that they are in memory once."""
        version, count = tables.images.version, tables.count()
        ids = np.empty(count, dtype=np.int64)
        embeddings = np.empty((count, tables.description.width), dtype=np.float16)
        first = 0
        for part in cls.parts(tables):
            ids[first : first + len(part)] = part.ids
            embeddings[first : first + len(part)] = part.embeddings
            first += len(part)
        return cls(ids, embeddings, version)

    @classmethod
    def parts(cls, tables: "IndexTables") -> Iterator["PlainMatrix"]:
        """The embeddings of all images, some thousands at a time, in the order in which they were added."""
        for batch in tables.batches(["id", "embedding"]):
            yield cls.of_table(batch)

    @classmethod
    def of_table(cls, table: "pyarrow.Table | pyarrow.RecordBatch") -> "PlainMatrix":
        """The embeddings of rows that were read, with their ids."""
        embeddings = in_one_piece(table["embedding"])
        values = numbers_of(embeddings.flatten(), np.float16).reshape(len(embeddings), embeddings.type.list_size)
        return cls(numbers_of(table["id"], np.int64).copy(), values.copy())

    def __len__(self) -> int:
        return len(self.ids)

    def similarities(self, queries: np.ndarray) -> np.ndarray:
        """Cosine similarities of queries (Q, D) float32, of length one, with all images: (Q, I) float32."""
        queries = np.asarray(queries, dtype=np.float32)
        found = np.empty((len(queries), len(self)), np.float32)
        wide = np.empty((min(BLOCK, len(self)), self.embeddings.shape[1]), np.float32)
        for first in range(0, len(self), BLOCK):
            part = self.embeddings[first : first + BLOCK]
            block = wide[: len(part)]
            block[:] = part
            found[:, first : first + len(part)] = queries @ block.T
        return found

    def only(self, scores: np.ndarray, allowed: Sequence[int], direction: np.ndarray) -> np.ndarray:
        """Similarities (I,) with a direction, where those of images that are not allowed become -inf."""
        found = np.full_like(scores, -np.inf)
        places = np.isin(self.ids, np.asarray(allowed, dtype=np.int64))
        found[places] = scores[places]
        return found

    def of(self, ids: Sequence[int]) -> np.ndarray:
        """The embeddings of images by their ids, float32. Raises KeyError with the first id that there is not."""
        rows = []
        for id in ids:
            places = np.flatnonzero(self.ids == id)
            if not len(places):
                raise KeyError(id)
            rows.append(self.embeddings[places[0]].astype(np.float32))
        return np.stack(rows)

    def whole(self) -> "PlainMatrix":
        """Itself; `EstimatedScores` reads all embeddings here."""
        return self

    def sample(self, most: int) -> np.ndarray:
        """At most `most` embeddings, at random but always the same, (n, D) float16."""
        return self.embeddings[sampled(len(self), most)]


def in_one_piece(column: Any) -> Any:
    """An array of Arrow, of one or of a table's column."""
    return column.combine_chunks() if hasattr(column, "combine_chunks") else column


def numbers_of(column: Any, kind: type[np.generic]) -> np.ndarray:
    """The numbers of a column without nulls, not copied. Arrow's `to_numpy` would import pandas, if it is there."""
    array = in_one_piece(column)
    if not len(array):
        return np.empty(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * np.dtype(kind).itemsize)


def sampled(count: int, most: int, seed: int = 0) -> np.ndarray:
    """At most `most` of `count` places, at random but always the same, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def best_places(scores: Any, count: int) -> np.ndarray:
    """The places of the highest scores (I,), at most `count`, the highest first; of equal ones the first place."""
    scores = np.asarray(scores)
    kept = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
    kept.sort()
    return kept[np.argsort(-scores[kept], kind="stable")]


__all__ = ["PlainMatrix", "best_places", "in_one_piece", "numbers_of", "sampled"]
