"""Search without comparing every image: LanceDB's IVF with RabitQ codes, built on request, measured before it is used.

1. k-means divides the embeddings into partitions. In a partition each is kept as one bit per dimension (Gao & Long
   2024, "RabitQ"), 16 times smaller than in float16. The rotation before that is random: no codebook has to be trained.
2. A query looks into the `probes` nearest partitions, and takes the `rescored` images whose codes are nearest.
3. Their embeddings are read, and compared exactly. Scores are therefore those of the exact scan.

What an update adds is found before it is in a partition, since LanceDB scans what is in none. Product quantization
(IVF-PQ) in place of the bits took longer to train than the rest of the build, and refinement brought it less far.

Invariant: the settings that a search uses reached `LEAST_RECALL` on queries of this index; otherwise none are kept.

Dimensions: Q queries, D embedding.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .approximate_note import EXACT_UP_TO, NOTE, RECALL_AT, ApproximateScan, read_scan
from .exact_scan import EmbeddingMatrix, sample_places
from .index_errors import SearchIndexError, in_words

if TYPE_CHECKING:
    from .index_table import IndexTables

EMBEDDING_INDEX = "embedding_idx"
"""LanceDB's name of what is built over the column `embedding`."""

LEAST_IMAGES = 1000
"""Below that there is nothing to gain."""

IMAGES_OF_A_PARTITION = 4096

ITERATIONS, SAMPLES_OF_A_PARTITION = 10, 64
"""Of k-means. More of either took longer and brought no recall."""

PROBES, RESCORED = (8, 16, 32, 64, 128, 256), (64, 256, 1024)
"""What is tried, in this order of time, until the recall is reached."""

LEAST_RESCORED = 4
"""How many times as many images as are wanted are compared exactly at least."""

LEAST_RECALL, AIM = 0.95, 0.97
"""Settings are wanted that reach the aim, since another sample of queries gives a somewhat other recall."""

SAMPLE, HIGHEST = 4096, 256
"""Images by which scores are estimated, and how many of the highest scores are exact."""

QUERIES = 100
"""Of each kind, by which recall is measured."""

FILTERED_EXACTLY = 100_000
"""Images that a filter may leave for them to be compared one by one."""


class EmbeddingsOfTables:
    """Embeddings that are read from the tables when they are needed."""

    def __init__(self, tables: "IndexTables"):
        self.tables = tables

    def __len__(self) -> int:
        return self.tables.count()

    def of(self, ids: Sequence[int]) -> Tensor:
        """The embeddings of images by their ids, (ids, D) float32. Raises KeyError with the first id there is not."""
        found = EmbeddingMatrix.of_table(self.tables.rows(["id", "embedding"], f"id IN ({', '.join(map(str, ids))})"))
        return found.of(list(ids))

    def sample(self, most: int) -> Tensor:
        """At most `most` embeddings, at random but always the same, (n, D) float16."""
        return self.sampled(most).embeddings

    def sampled(self, most: int, seed: int = 0) -> EmbeddingMatrix:
        """At most `most` images, at random but always the same."""
        places = sample_places(len(self), most, seed).tolist()
        return EmbeddingMatrix.of_table(self.tables.rows_at(places, ["id", "embedding"]))


class EstimatedScores:
    """Scores of a query over all images, without comparing all: what the cutoff of results looks at.

    The highest scores are exact. Each of the others stands for as many images as there are for one of a sample.
    """

    def __init__(self, tables: "IndexTables", scan: ApproximateScan):
        self.tables, self.scan = tables, scan
        self._sample: Tensor | None = None
        self._count = tables.count()

    def __len__(self) -> int:
        return self._count

    def similarities(self, queries: Any) -> Tensor:
        """Estimated cosine similarities of queries (Q, D), about as many as there are images, (Q, n) float32."""
        queries = torch.as_tensor(queries)
        if self._sample is None:
            self._sample = EmbeddingsOfTables(self.tables).sample(SAMPLE).float()
        times = max(1, round(len(self) / max(1, len(self._sample))))
        found = []
        for query in queries:
            best = candidates(self.tables, self.scan, query, HIGHEST).similarities(query[None])[0]
            # Images of the sample that are among the best are not counted again.
            others = (self._sample @ query).clamp(max=float(best.min())) if len(best) else self._sample @ query
            found.append(torch.cat([best, others.repeat_interleave(times)]))
        return torch.stack(found)

    def whole(self) -> EmbeddingMatrix:
        """All embeddings, which are read for it."""
        return EmbeddingMatrix.read(self.tables)


def candidates(
    tables: "IndexTables", scan: ApproximateScan, direction: Any, count: int, where: str | None = None
) -> EmbeddingMatrix:
    """The images of an index that are probably most similar to a direction.

    Args:
        tables: The index.
        scan: How to look for them.
        direction: (D,) float32, of length one; a tensor or an array.
        count: How many to find.
        where: A condition on the index's columns. If few images meet it, all of them are returned.

    Raises:
        SearchIndexError: `where` is no condition.
    """
    if where is not None and tables.count(where) <= FILTERED_EXACTLY:
        return EmbeddingMatrix.of_table(tables.rows(["id", "embedding"], where))
    query = tables.images.search(np.asarray(direction), vector_column_name="embedding").distance_type("cosine")
    refine = max(LEAST_RESCORED, -(-scan.rescored // count))
    query = query.minimum_nprobes(scan.probes).maximum_nprobes(0).refine_factor(refine)
    query = query.select(["id", "embedding", "_distance"]).limit(count)
    with in_words(tables.place):
        return EmbeddingMatrix.of_table((query if where is None else query.where(where, prefilter=True)).to_arrow())


def build(tables: "IndexTables", texts: Tensor) -> ApproximateScan:
    """Divide the images of an index into partitions, measure the recall of searches, and note how to search.

    Args:
        tables: The index.
        texts: (Q, D) embeddings of texts by which recall is measured, beside images of the index. May be empty.

    Raises:
        SearchIndexError: The index has too few images, or too low a recall was reached; it is searched exactly then.
            Or another process writes to it.
    """
    from lancedb.index import IvfRq

    with tables.writing():
        count = tables.count()
        if count < LEAST_IMAGES:
            raise SearchIndexError(
                f"The index {tables.place} has {count:,} images. An approximate scan is built for {LEAST_IMAGES:,} at "
                f"least: fewer are compared one by one in milliseconds.",
                tables.place,
            )
        how = {"max_iterations": ITERATIONS, "sample_rate": SAMPLES_OF_A_PARTITION, "distance_type": "cosine"}
        partitions = max(1, round(count / IMAGES_OF_A_PARTITION))
        with tables.committing():
            tables.images.create_index("embedding", config=IvfRq(num_partitions=partitions, **how))
        scan = _measure(tables, texts, count, partitions)
        if min(scan.recall.values()) < LEAST_RECALL:
            forget(tables)
            raise SearchIndexError(
                f"An approximate scan of the index {tables.place} would not find enough: {scan.describe()}, and "
                f"{LEAST_RECALL} is needed. The index is searched exactly.",
                tables.place,
            )
        tables.note(NOTE, asdict(scan))
    return scan


def forget(tables: "IndexTables") -> None:
    """Search an index exactly from now on."""
    tables.note(NOTE, None)
    with tables.committing():
        tables.images.drop_index(EMBEDDING_INDEX)


def _measure(tables: "IndexTables", texts: Tensor, count: int, partitions: int) -> ApproximateScan:
    """The fastest settings that reach the aim, or else those of the highest recall."""
    images = EmbeddingsOfTables(tables).sampled(QUERIES, seed=1)
    queries = {"images": (normalize(images.embeddings.float(), dim=1), images.ids)}
    if len(texts):
        queries["texts"] = (texts, torch.full((len(texts),), -1))  # of no image
    expected = _exact_neighbours(tables, torch.cat([vectors for vectors, _ in queries.values()]))
    best: ApproximateScan | None = None
    probes = sorted({min(value, partitions) for value in PROBES})
    for rescored in RESCORED:
        for number in probes:
            scan = ApproximateScan(number, rescored, {}, count)
            first = 0
            for kind, (vectors, own) in queries.items():
                rows = expected[first : first + len(vectors)]
                scan.recall[kind] = round(_recall(tables, scan, vectors, own, rows), 4)
                first += len(vectors)
            if best is None or min(scan.recall.values()) > min(best.recall.values()):
                best = scan
            if min(scan.recall.values()) >= AIM:
                return scan
    assert best is not None
    return best


def _recall(tables: "IndexTables", scan: ApproximateScan, vectors: Tensor, own: Tensor, expected: Tensor) -> float:
    """Share of the nearest images that are found. An image is no neighbour of itself."""
    found = []
    for vector, id, row in zip(vectors, own.tolist(), expected.tolist(), strict=True):
        wanted = [other for other in row if other != id][:RECALL_AT]
        matrix = candidates(tables, scan, vector, RECALL_AT + 1)
        order = matrix.similarities(vector[None])[0].argsort(descending=True)
        given = [other for other in matrix.ids[order].tolist() if other != id][:RECALL_AT]
        found.append(len({*wanted} & {*given}) / len(wanted))
    return float(np.mean(found))


def _exact_neighbours(tables: "IndexTables", queries: Tensor) -> Tensor:
    """The ids of the nearest images of each query, nearest first; one more than recall needs."""
    scores, ids = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for part in EmbeddingMatrix.parts(tables):
        scores = torch.cat([scores, part.similarities(queries)], dim=1)
        ids = torch.cat([ids, part.ids.expand(len(queries), -1)], dim=1)
        best = scores.topk(min(RECALL_AT + 1, scores.shape[1]))
        scores, ids = best.values, ids.gather(1, best.indices)
    return ids


__all__ = [
    "EXACT_UP_TO",
    "QUERIES",
    "ApproximateScan",
    "EmbeddingsOfTables",
    "EstimatedScores",
    "build",
    "candidates",
    "forget",
    "read_scan",
]
