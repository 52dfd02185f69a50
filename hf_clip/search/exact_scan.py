"""All embeddings of an index in memory, compared with a query one by one: exact, and fast enough up to a million.

Embeddings are kept in float16, as they are stored, and widened block by block while they are in the processor's cache.

Dimensions: I images, D embedding, Q queries.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
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
        """Read the embeddings of all images."""
        version = tables.images.version
        found = tables.rows(["id", "embedding"])
        ids = torch.from_numpy(found["id"].to_numpy().copy())
        embeddings = torch.empty(len(ids), tables.description.width, dtype=torch.float16)
        first = 0
        for chunk in found["embedding"].chunks:
            values = chunk.flatten().to_numpy().reshape(len(chunk), -1)
            embeddings[first : first + len(chunk)] = torch.from_numpy(values.copy())
            first += len(chunk)
        return cls(ids, embeddings, version)

    def __len__(self) -> int:
        return len(self.ids)

    def similarities(self, queries: Tensor) -> Tensor:
        """Cosine similarities of queries with all images.

        Args:
            queries: (Q, D) float32, of length one.

        Returns:
            (Q, I) float32.
        """
        found = torch.empty(len(queries), len(self))
        wide = torch.empty(min(BLOCK, len(self)), self.embeddings.shape[1])
        for first in range(0, len(self), BLOCK):
            part = self.embeddings[first : first + BLOCK]
            block = wide[: len(part)]
            block.copy_(part)
            torch.mm(queries, block.T, out=found[:, first : first + len(part)])
        return found

    def places_of(self, ids: list[int]) -> Tensor:
        """Rows of images by their ids. Raises KeyError with the first id that there is not."""
        if self._places is None:
            self._places = {id: place for place, id in enumerate(self.ids.tolist())}
        return torch.tensor([self._places[id] for id in ids], dtype=torch.int64)

    def of(self, ids: list[int]) -> Tensor:
        """The embeddings of images by their ids, float32."""
        return self.embeddings[self.places_of(ids)].float()


def sample_places(count: int, most: int, seed: int = 0) -> Tensor:
    """At most `most` of `count` places, at random but always the same, in order."""
    if count <= most:
        return torch.arange(count)
    chosen = np.random.default_rng(seed).choice(count, most, replace=False)
    return torch.from_numpy(np.sort(chosen))


__all__ = ["EmbeddingMatrix", "sample_places"]
