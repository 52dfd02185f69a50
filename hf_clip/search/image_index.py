"""An index of images from Python: open it, add folders, search, and find near duplicates.

Example::

    from hf_clip.search.image_index import ImageIndex

    index = ImageIndex.open("photos-index", model="clip-vit-b32")  # made if there is none
    index.add("~/Pictures")
    for result in index.search("a dog on a beach"):
        print(result.score, result.path)

Dimensions: I images, D embedding.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..inference.computing_thread import ComputingThread
from ..zero_shot.features import encode_texts
from .approximate_scan import (
    QUERIES,
    ApproximateScan,
    EmbeddingsOfTables,
    EstimatedScores,
    build,
    candidates,
    read_scan,
)
from .exact_scan import EmbeddingMatrix, sample_places
from .near_duplicates import LEAST_SIMILARITY, MOST_BITS, fold, group_duplicates, known_hashes
from .query import AUTO, QueryError, QueryPart, combine_parts, encode_parts, parse_query
from .reference_nouns import REFERENCE_TEXTS
from .result_cutoff import ResultCutoff
from .updatable_index import UpdatableIndex

SAMPLE = 4096
"""Images of the index by which the spread of similarities is measured."""

SHOWN_COLUMNS = ("id", "path", "path_bytes", "width", "height", "caption", "metadata", "thumbnail", "perceptual_hash")

ROWS_AT_ONCE = 1000
"""Images whose columns are read at once."""

EXTRA_RESULTS = 4
"""How many times as many images are looked at as are shown, for near duplicates that take no place of their own."""


@dataclass(frozen=True)
class SearchResult:
    """An image that was found.

    Attributes:
        id: Its number in the index.
        path: Its file, or row of a data set.
        score: Cosine similarity with the query.
        width: In pixels; 0 if the index was made of embeddings, without opening the image.
        height: In pixels, or 0.
        caption: Of the data set, or None.
        metadata: Other columns of the data set, as JSON, or None.
        thumbnail: A small JPEG; empty if the index was made of embeddings.
        duplicates: Paths of its near duplicates among the results, which are not shown by themselves.
    """

    id: int
    path: str
    score: float
    width: int
    height: int
    caption: str | None = None
    metadata: str | None = None
    thumbnail: bytes = field(default=b"", repr=False)
    duplicates: list[str] = field(default_factory=list)


class SearchResults(list[SearchResult]):
    """What a search found: a list, best first.

    Args:
        found: The results.
        least_score: The score at which they end.
        best: The highest score of an image that the filter lets through.

    Attributes:
        least_score: The score at which results end; infinite if no image fits.
        best_score: The highest score of an image that the filter lets through. None: there is no such image.
    """

    def __init__(self, found: Sequence[SearchResult] = (), least_score: float = -math.inf, best: float | None = None):
        super().__init__(found)
        self.least_score, self.best_score = least_score, best


class ImageIndex(UpdatableIndex):
    """An index of images that are found by text and by image. `ImageIndex.open` opens or makes one.

    Args:
        tables: Its tables.
        model: HfClipModel. None: loaded when it is first needed.
        processor: Its processor.
        name: Where the model is. None: where the index was made of it.
        dtype: The name of the dtype in which a model computes that is loaded here.

    Example::

        index = ImageIndex.open("photos-index", model="clip-vit-b32")  # made if there is none
        index.add("~/Pictures")
        for result in index.search("a dog on a beach"):
            print(result.score, result.path)
    """

    computing: ComputingThread | None = None
    """The thread that compares queries with all images. None: the one that searches."""

    _matrix: EmbeddingMatrix | None = None
    _quantized: str | None = None
    _cutoff: ResultCutoff | None = None

    def matrix(self) -> EmbeddingMatrix:
        """All embeddings in memory, read again where the index has changed."""
        self.tables.refresh()
        if self._matrix is None or self._matrix.version != self.tables.images.version:
            if self._quantized is None:
                self._matrix = EmbeddingMatrix.read(self.tables)
            else:
                from .quantized_files import read_quantized  # imports what reads data sets

                self._matrix = read_quantized(self.tables, self._quantized)
        return self._matrix

    def use_quantized(self, which: str | None) -> None:
        """Search quantized embeddings from now on: faster, and in less memory.

        Args:
            which: "int8" or "bits", which `hf-clip quantize` wrote into the index, or a file of it. None: search exact
                embeddings again.

        Raises:
            QuantizedFileError: There is no such file, or it is damaged. A ValueError; its `path` is the file.
            SearchIndexError: The index has changed since it was quantized.
        """
        self._quantized, self._matrix = which, None
        self.matrix()

    def approximate_scan(self) -> ApproximateScan | None:
        """How the index is searched without comparing every image; None if it is searched exactly, or quantized."""
        self.tables.refresh()
        return None if self._quantized is not None else read_scan(self.tables)

    def build_approximate_scan(self) -> ApproximateScan:
        """Let searches compare a part of the images only, which pays from about a million images on.

        Recall@10 is measured against the exact scan, with images of the index and with texts: captions of images, or
        general nouns if there are none.

        Raises:
            SearchIndexError: The index has too few images, recall was below 0.95, or another process writes to it.
        """
        self.tables.refresh()
        places = sample_places(len(self), QUERIES, seed=2).tolist()
        captions = self.tables.rows_at(places, ["caption"])["caption"].to_pylist()
        texts = [caption for caption in captions if caption] or list(REFERENCE_TEXTS[::4])
        encoded = encode_texts(self.model, self.processor, texts, truncation=True).cpu()
        return build(self.tables, encoded)

    def direction(self, query: str | Sequence[QueryPart], templates: Any = None, exact: bool = False) -> Tensor:
        """Encode a query as one direction.

        Args:
            query: A text, the path of an image, an expression such as `2:"a beach" - "people"`; or parts of a query.
            templates: What a text is put into, see `encode_text_query`.
            exact: Whether to compare all images even if the index has an approximate scan.

        Returns:
            (D,) float32, of length one, which `search` takes as a query.

        Raises:
            QueryError: The query is empty or cannot be read.
        """
        parts = parse_query(query) if isinstance(query, str) else query
        known = self._known(None if exact else self.approximate_scan())
        return self._combine(parts, self._encode(parts, templates, known), known)

    def _known(self, scan: ApproximateScan | None) -> EmbeddingMatrix | EmbeddingsOfTables:
        return self.matrix() if scan is None else EmbeddingsOfTables(self.tables)

    def _encode(
        self, parts: Sequence[QueryPart], templates: Any, known: EmbeddingMatrix | EmbeddingsOfTables
    ) -> Tensor:
        of_ids = all(part.kind == "id" for part in parts)  # then no model is needed
        model, processor = (None, None) if of_ids else (self.model, self.processor)
        return encode_parts(model, processor, parts, known.of, templates)

    def _combine(
        self, parts: Sequence[QueryPart], vectors: Tensor, known: EmbeddingMatrix | EmbeddingsOfTables
    ) -> Tensor:
        sample = known.sample(SAMPLE if len(parts) > 1 else 0)
        return combine_parts(vectors, [part.weight for part in parts], sample)

    def search(
        self,
        query: str | Sequence[QueryPart] | Tensor,
        *,
        top: int = 20,
        where: str | None = None,
        templates: Any = None,
        folded: bool = True,
        cutoff: str | float | None = None,
        exact: bool = False,
    ) -> SearchResults:
        """Find images.

        Args:
            query: A text, the path of an image, an expression such as `2:"a beach" - "people"`; parts of a query; or a
                direction (D,).
            top: Largest number of results.
            where: A condition on the index's columns, such as `path LIKE '%2023%'`.
            templates: What a text is put into, see `encode_text_query`.
            folded: Whether near duplicates are shown once.
            cutoff: Where results end: "auto", judged for each query by the index itself (see `ResultCutoff`); a least
                score; or None, at `top`.
            exact: Whether to compare all images even if the index has an approximate scan.

        Returns:
            Results, best first. There are none if no image fits.

        Raises:
            QueryError: The query is empty or cannot be read.
            SearchIndexError: `where` is no condition.
        """
        if top < 1:
            raise ValueError(f"top is {top}, but must be at least 1.")
        if isinstance(cutoff, str) and cutoff != AUTO:
            raise ValueError(f'cutoff is {cutoff!r}, but must be "{AUTO}", a score, or None.')
        if where is not None:
            self.tables.check_condition(where)  # before a model is loaded and images are scored
        scan = None if exact else self.approximate_scan()
        known = self._known(scan)
        parts = vectors = None
        if isinstance(query, Tensor):
            direction = query
            if direction.shape != (self.tables.description.width,):
                raise QueryError(
                    f"The direction has the shape {tuple(direction.shape)}, but the index needs "
                    f"({self.tables.description.width},): encode it with the model of the index."
                )
        else:
            parts = parse_query(query) if isinstance(query, str) else query
            vectors = self._encode(parts, templates, known)
            direction = self._combine(parts, vectors, known)
        wanted = top * (EXTRA_RESULTS if folded else 1)
        matrix = self.matrix() if scan is None else candidates(self.tables, scan, direction, wanted, where)
        if len(matrix) == 0:
            return SearchResults()
        scores = self._scores(matrix, direction)
        if scan is None or cutoff != AUTO:
            least = self._least_score(cutoff, matrix, scores, parts, vectors, templates)
        else:
            whole = EstimatedScores(self.tables, scan)
            least = self._least_score(cutoff, whole, self._scores(whole, direction), parts, vectors, templates)
        if where is not None and scan is None:
            allowed = self.tables.rows(["id"], where)["id"].to_pylist()
            mask = torch.ones(len(matrix), dtype=torch.bool)
            mask[matrix.places_of(allowed)] = False
            scores = matrix.refine(scores.masked_fill(mask, -torch.inf)[None], direction[None])[0]
        found = scores.topk(min(len(scores), wanted))
        best = float(found.values[0])
        places = found.indices[(found.values > -torch.inf) & (found.values >= least)]
        results = self._results(matrix, places, scores, folded)[:top]
        return SearchResults(results, least, best if best > -math.inf else None)

    def _scores(self, matrix: EmbeddingMatrix | EstimatedScores, direction: Tensor) -> Tensor:
        """Similarities of a direction (D,) with all images, (I,)."""
        compare = partial(matrix.similarities, direction[None])
        return (compare() if self.computing is None else self.computing.run(compare))[0]

    def _least_score(
        self,
        cutoff: str | float | None,
        matrix: EmbeddingMatrix | EstimatedScores,
        scores: Tensor,
        parts: Sequence[QueryPart] | None,
        vectors: Tensor | None,
        templates: Any,
    ) -> float:
        if cutoff is None or isinstance(cutoff, (int, float)):
            return -math.inf if cutoff is None else float(cutoff)
        self._cutoff = self._cutoff or ResultCutoff(self.tables)
        encoder = lambda: (self.model, self.processor)  # noqa: E731  (loaded only if it is called)
        return self._cutoff.least_score(matrix, scores, parts, vectors, encoder, templates)

    def _results(self, matrix: EmbeddingMatrix, places: Tensor, scores: Tensor, folded: bool) -> list[SearchResult]:
        ids = matrix.ids[places].tolist()
        if not ids:
            return []
        by_id: dict[int, dict[str, Any]] = {}
        for first in range(0, len(ids), ROWS_AT_ONCE):
            listed = ", ".join(map(str, ids[first : first + ROWS_AT_ONCE]))
            by_id |= {row["id"]: row for row in self.tables.rows(SHOWN_COLUMNS, f"id IN ({listed})").to_pylist()}
        hashes = known_hashes([by_id[id]["perceptual_hash"] for id in ids])
        shown: list[tuple[int, list[int]]] = [(position, []) for position in range(len(ids))]
        if folded:
            shown = fold(places, matrix.embeddings[places], hashes)
        found = []
        for position, others in shown:
            row = by_id[ids[position]]
            found.append(
                SearchResult(
                    id=row["id"],
                    path=os.fsdecode(row["path_bytes"]),
                    score=float(scores[places[position]]),
                    duplicates=[os.fsdecode(by_id[ids[other]]["path_bytes"]) for other in others],
                    width=row["width"] or 0,
                    height=row["height"] or 0,
                    caption=row["caption"],
                    metadata=row["metadata"],
                    thumbnail=row["thumbnail"] or b"",
                )
            )
        return found

    def duplicates(self, *, similarity: float = LEAST_SIMILARITY, bits: int = MOST_BITS) -> list[list[SearchResult]]:
        """Group near duplicates, the largest image of each group first.

        Args:
            similarity: Least cosine similarity of two near duplicates.
            bits: Most bits, of 64, in which their perceptual hashes differ.

        Returns:
            Groups of at least two images. An image is in one group at most. Scores are those with the group's first
            image in the order of the index.
        """
        matrix = self.matrix()
        stored = self.tables.rows(["id", "perceptual_hash"])
        by_id = dict(zip(stored["id"].to_pylist(), stored["perceptual_hash"].to_pylist(), strict=True))
        hashes = known_hashes([by_id[id] for id in matrix.ids.tolist()])
        groups = group_duplicates(matrix.embeddings, hashes, similarity, bits)
        scores = torch.zeros(len(matrix))
        for group in groups:
            vectors = matrix.embeddings[group].float()
            scores[group] = vectors @ vectors[0]
        grouped = [place for group in groups for place in group]
        results = iter(self._results(matrix, torch.tensor(grouped, dtype=torch.int64), scores, folded=False))
        by_size = lambda result: (-result.width * result.height, result.path)  # noqa: E731
        return [sorted(islice(results, len(group)), key=by_size) for group in groups]


__all__ = ["ImageIndex", "SearchResult", "SearchResults"]
