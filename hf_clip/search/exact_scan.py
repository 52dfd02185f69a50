"""All embeddings of an index in memory, compared with a query one by one: exact, and fast enough up to a million.

Embeddings are kept in float16, as they are stored, and widened block by block while they are in the processor's cache.

Dimensions: I images, D embedding, Q queries.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .plain_scan import PlainMatrix, sampled

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

    from .index_table import IndexTables

BLOCK = 2048
"""Rows that are widened at once: 4 MiB in float32 at D = 512."""


class EmbeddingMatrix:
    """The embeddings of an index.

    Attributes:
        ids: (I,) int64.
        embeddings: (I, D) float16, of length one up to its rounding.
        version: Of the table that they were read of.
    """

    def __init__(self, ids: Tensor, embeddings: Tensor, version: int = 0):
        self.ids, self.embeddings, self.version = ids, embeddings, version
        self._places: dict[int, int] | None = None

    @classmethod
    def read(cls, tables: "IndexTables") -> "EmbeddingMatrix":
        """Read the embeddings of all images, piece by piece, so that they are in memory once."""
        return cls._of(PlainMatrix.read(tables))

    @classmethod
    def parts(cls, tables: "IndexTables") -> Iterator["EmbeddingMatrix"]:
        """The embeddings of all images, some thousands at a time, in the order in which they were added."""
        yield from map(cls._of, PlainMatrix.parts(tables))

    @classmethod
    def of_table(cls, table: "pyarrow.Table | pyarrow.RecordBatch") -> "EmbeddingMatrix":
        """The embeddings of rows that were read, with their ids."""
        return cls._of(PlainMatrix.of_table(table))

    @classmethod
    def _of(cls, plain: PlainMatrix) -> "EmbeddingMatrix":
        return cls(torch.from_numpy(plain.ids), torch.from_numpy(plain.embeddings), plain.version)

    def __len__(self) -> int:
        return len(self.ids)

    def similarities(self, queries: Any) -> Tensor:
        """Cosine similarities of queries with all images.

        Args:
            queries: (Q, D) float32, of length one; a tensor or an array.

        Returns:
            (Q, I) float32.
        """
        queries = torch.as_tensor(queries)
        found = torch.empty(len(queries), len(self))
        wide = torch.empty(min(BLOCK, len(self)), self.embeddings.shape[1])
        for first in range(0, len(self), BLOCK):
            part = self.embeddings[first : first + BLOCK]
            block = wide[: len(part)]
            block.copy_(part)
            torch.mm(queries, block.T, out=found[:, first : first + len(part)])
        return found

    def refine(self, scores: Tensor, queries: Tensor) -> Tensor:
        """Similarities (Q, I) of which some were set to -inf, with the best of the others as exact as can be."""
        return scores

    def only(self, scores: Tensor, allowed: Sequence[int], direction: Any) -> Tensor:
        """Similarities (I,) with a direction, where those of images that are not allowed become -inf."""
        is_out = torch.ones(len(self), dtype=torch.bool)
        is_out[self.places_of(list(allowed))] = False
        return self.refine(scores.masked_fill(is_out, -torch.inf)[None], torch.as_tensor(direction)[None])[0]

    def places_of(self, ids: list[int]) -> Tensor:
        """Rows of images by their ids. Raises KeyError with the first id that there is not."""
        if self._places is None:
            self._places = {id: place for place, id in enumerate(self.ids.tolist())}
        return torch.tensor([self._places[id] for id in ids], dtype=torch.int64)

    def of(self, ids: list[int]) -> Tensor:
        """The embeddings of images by their ids, float32."""
        return self.embeddings[self.places_of(ids)].float()

    def whole(self) -> "EmbeddingMatrix":
        """Itself; `EstimatedScores` reads all embeddings here."""
        return self

    def sample(self, most: int) -> Tensor:
        """At most `most` embeddings, at random but always the same, (n, D) float16."""
        return self.embeddings[sample_places(len(self), most)]


def sample_places(count: int, most: int, seed: int = 0) -> Tensor:
    """At most `most` of `count` places, at random but always the same, in order."""
    return torch.from_numpy(sampled(count, most, seed))


__all__ = ["EmbeddingMatrix", "sample_places"]
