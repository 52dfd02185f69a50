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
from typing import TYPE_CHECKING, Any

import numpy as np

from .approximate_note import ApproximateScan, read_scan
from .known_text_tower import known_text_tower
from .near_duplicates import LEAST_SIMILARITY, MOST_BITS, fold, group_duplicates, known_hashes
from .plain_scan import PlainMatrix, best_places, sampled
from .query import AUTO, QueryError, QueryPart, combine_parts, encode_parts, encode_plain_parts, parse_query
from .reference_nouns import REFERENCE_TEXTS
from .result_cutoff import ResultCutoff
from .updatable_index import UpdatableIndex

if TYPE_CHECKING:
    from torch import Tensor

    from ..inference.computing_thread import ComputingThread
    from ..zero_shot.plain_text_tower import PlainTextTower
    from .approximate_scan import EmbeddingsOfTables
    from .exact_scan import EmbeddingMatrix

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

    computing: "ComputingThread | None" = None
    """The thread that compares queries with all images. None: the one that searches."""

    _matrix: Any = None
    _quantized: str | None = None
    _cutoff: ResultCutoff | None = None
    _tower: "PlainTextTower | None" = None
    _is_plain = False

    def matrix(self) -> "EmbeddingMatrix":
        """All embeddings in memory, read again where the index has changed."""
        self.tables.refresh()
        if self._matrix is None or self._matrix.version != self.tables.images.version:
            if self._is_plain:
                self._matrix = PlainMatrix.read(self.tables)
            elif self._quantized is None:
                from .exact_scan import EmbeddingMatrix

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

    def avoid_torch(self, parts: Sequence[QueryPart], exact: bool = False) -> bool:
        """Do without torch and transformers from now on, if queries of such parts can be answered so.

        Texts are encoded in numpy where the index knows its model's text tower, see `known_text_tower`; images need the
        model. Results are the same, and a program that searches once has them sooner.

        Args:
            parts: A query. Later ones may hold parts of the same kinds.
            exact: As for `search`.

        Returns:
            Whether it can.
        """
        kinds = {part.kind for part in parts}
        if self._model is not None or "image" in kinds:
            return False
        self._tower = known_text_tower(self.tables, self._named_model) if "text" in kinds else None
        if self._tower is None and "text" in kinds:
            return False
        # Quantized embeddings and candidates of an approximate scan are compared by torch.
        self._is_plain = self._quantized is None and (exact or self.approximate_scan() is None)
        if self._is_plain:
            self._matrix = None
        return True

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
        from ..zero_shot.features import encode_texts
        from .approximate_scan import QUERIES, build

        self.tables.refresh()
        places = sampled(len(self), QUERIES, seed=2).tolist()
        captions = self.tables.rows_at(places, ["caption"])["caption"].to_pylist()
        texts = [caption for caption in captions if caption] or list(REFERENCE_TEXTS[::4])
        encoded = encode_texts(self.model, self.processor, texts, truncation=True).cpu()
        return build(self.tables, encoded)

    def direction(self, query: str | Sequence[QueryPart], templates: Any = None, exact: bool = False) -> "Tensor":
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
        import torch

        parts = parse_query(query) if isinstance(query, str) else query
        known = self._known(None if exact else self.approximate_scan())
        return torch.as_tensor(self._combine(parts, self._encode(parts, templates, known), known))

    def _known(self, scan: ApproximateScan | None) -> "EmbeddingMatrix | EmbeddingsOfTables":
        if scan is None:
            return self.matrix()
        from .approximate_scan import EmbeddingsOfTables

        return EmbeddingsOfTables(self.tables)

    def _encode(self, parts: Sequence[QueryPart], templates: Any, known: "EmbeddingMatrix | EmbeddingsOfTables") -> Any:
        """A vector for each part, (parts, D): an array where torch is avoided, and else a tensor."""
        kinds = {part.kind for part in parts}
        if "image" not in kinds and (self._tower is not None or (self._is_plain and "text" not in kinds)):
            return encode_plain_parts(self._tower, parts, known.of, templates)
        model, processor = (None, None) if kinds == {"id"} else (self.model, self.processor)
        return encode_parts(model, processor, parts, known.of, templates)

    def _encode_texts(self, texts: Sequence[str]) -> Any:
        """(T, D) float32, of length one."""
        if self._tower is not None:
            return self._tower.encode(texts)
        from ..zero_shot.features import encode_texts

        return encode_texts(self.model, self.processor, texts, truncation=True).cpu()

    def _combine(self, parts: Sequence[QueryPart], vectors: Any, known: "EmbeddingMatrix | EmbeddingsOfTables") -> Any:
        sample = known.sample(SAMPLE if len(parts) > 1 else 0)
        return combine_parts(vectors, [part.weight for part in parts], sample)

    def search(
        self,
        query: "str | Sequence[QueryPart] | Tensor",
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
        direction: Any
        if not isinstance(query, (str, Sequence)):
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
        if scan is None:
            matrix = self.matrix()
        else:
            from .approximate_scan import EstimatedScores, candidates

            matrix = candidates(self.tables, scan, direction, wanted, where)
        if len(matrix) == 0:
            return SearchResults()
        similarities = self._scores(matrix, direction)
        if scan is None or cutoff != AUTO:
            least = self._least_score(cutoff, matrix, similarities, parts, vectors, templates)
        else:
            whole = EstimatedScores(self.tables, scan)
            least = self._least_score(cutoff, whole, self._scores(whole, direction), parts, vectors, templates)
        if where is not None and scan is None:
            allowed = self.tables.rows(["id"], where)["id"].to_pylist()
            similarities = matrix.only(similarities, allowed, direction)
        scores = np.asarray(similarities)
        places = best_places(scores, wanted)
        best = float(scores[places[0]])
        places = places[(scores[places] > -np.inf) & (scores[places] >= least)]
        results = self._results(matrix, places, scores, folded)[:top]
        return SearchResults(results, least, best if best > -math.inf else None)

    def _scores(self, matrix: Any, direction: Any) -> Any:
        """Similarities of a direction (D,) with all images, (I,)."""
        compare = partial(matrix.similarities, direction[None])
        return (compare() if self.computing is None else self.computing.run(compare))[0]

    def _least_score(
        self,
        cutoff: str | float | None,
        matrix: Any,
        scores: Any,
        parts: Sequence[QueryPart] | None,
        vectors: Any,
        templates: Any,
    ) -> float:
        if cutoff is None or isinstance(cutoff, (int, float)):
            return -math.inf if cutoff is None else float(cutoff)
        self._cutoff = self._cutoff or ResultCutoff(self.tables)
        return self._cutoff.least_score(matrix, scores, parts, vectors, self._encode_texts, templates)

    def _results(self, matrix: Any, places: np.ndarray, scores: np.ndarray, folded: bool) -> list[SearchResult]:
        ids = matrix.ids[places].tolist()
        if not ids:
            return []
        by_id: dict[int, dict[str, Any]] = {}
        for first in range(0, len(ids), ROWS_AT_ONCE):
            rows = self.tables.rows_of(SHOWN_COLUMNS, ids[first : first + ROWS_AT_ONCE])
            by_id |= {row["id"]: row for row in rows.to_pylist()}
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
                    thumbnail=row.get("thumbnail") or b"",
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
        scores = np.zeros(len(matrix), np.float32)
        for group in groups:
            vectors = np.asarray(matrix.embeddings[group]).astype(np.float32)
            scores[group] = vectors @ vectors[0]
        grouped = [place for group in groups for place in group]
        results = iter(self._results(matrix, np.array(grouped, dtype=np.int64), scores, folded=False))
        by_size = lambda result: (-result.width * result.height, result.path)  # noqa: E731
        return [sorted(islice(results, len(group)), key=by_size) for group in groups]


__all__ = ["ImageIndex", "SearchResult", "SearchResults"]
