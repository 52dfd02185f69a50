"""Where the results of a search end: judged by the index itself, since no score means the same for two queries.

1. Reference queries tell what scores over this index are like: general nouns for texts, images of the index for
   images. The spread of scores is the median of their standard deviations over the index.
2. A query fits the index if the level of its scores, the logarithm of their mean exponential, stands out among the
   levels of the reference queries. At a low sharpness the level tells of many images that fit somewhat, at a high one
   of few that fit well. A model that was trained on few words maps all nouns onto the few texts that it knows. Their
   levels are then those of texts that fit and tell nothing, so every text fits.
3. The images that fit hold the weight of a softmax over the index. Results end a few weighted standard deviations below
   the weighted mean, where hardly any of that weight is left. A query for many images has lower and wider scores than
   one for few, and its results end lower accordingly.

Invariant: adding a number to all scores, or multiplying them, changes no result. The gap between texts and images
(Liang et al. 2022) and the temperature of the model therefore do not matter.

All of this is numpy, so that a search can do without torch. Scores may come as tensors on the processor, too.

Dimensions: I images, Q queries, D embedding.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..zero_shot.prompts import read_templates
from .index_table import IndexTables
from .plain_scan import PlainMatrix, sampled
from .query import TEMPLATES, QueryPart, is_short_noun
from .reference_nouns import REFERENCE_TEXTS

if TYPE_CHECKING:
    from typing import TypeAlias

    from .approximate_scan import EstimatedScores
    from .exact_scan import EmbeddingMatrix

    Matrix: TypeAlias = EmbeddingMatrix | PlainMatrix | EstimatedScores

Encode = Callable[[Sequence[str]], Any]
"""Encodes texts T as (T, D) float32 of length one; a tensor on the processor, or an array."""

SHARPNESS = 6.0
"""Factor of a score, in units of the spread, before the softmax that gives images their weight."""

REACH = 3.5
"""Weighted standard deviations below the weighted mean at which results end."""

LEAST_REACH = 3.0
"""The same in logarithms of the weight, for few images of nearly equal scores."""

TEXT_GATES = ((1.5, 1.5), (10.0, 0.75))
"""Sharpness of a level, and how many steps above the median of the reference texts it has to be. One is enough."""

IMAGE_GATES = ((40.0, -1.5),)
"""The same for images. The reference images fit the index themselves: only what is far below them does not."""

LEAST_STEP = 0.02
"""Of the sharpness: levels of reference queries that are all alike tell nothing finer."""

FEWEST_IMAGES = 20
"""With fewer images nothing can be said about what scores are like, and all are results."""

REFERENCE_IMAGES = 64
SAMPLE = 4096
"""Images by which the spread is measured."""

BLOCK = 16
"""Reference queries that are compared with all images at once."""

SAME_TEXT = 0.95
"""Cosine similarity, less the mean of all, of two texts that a model does not tell apart. The median of it between a
reference text and its nearest one is at most 0.93 on small models of digits, scenes and photographs that know what they
were trained on, and at least 0.977 on models that know ten words."""

NOTE = "levels of reference queries"
SAMPLED_ROWS = 100
SIMILAR = 0.1
"""The reference scores are measured anew when this part of the index has changed: images that were added, removed or
written anew. Of the last two a sample of rows tells, by the checksums of their embeddings."""


@dataclass(frozen=True)
class ReferenceScores:
    """What the scores of reference queries over an index are like.

    Attributes:
        images: How many images the index had.
        spread: Median standard deviation of a query's scores.
        medians: For each gate the median of the levels.
        steps: For each gate the distance from there to the level that 16 % of the reference queries lie below, which is
            a standard deviation if levels are normally distributed.
        highest: The highest score of a reference query with an image.
        are_told_apart: Whether the model tells most reference texts from all others.
        rows: Ids of some images with the checksums of their embeddings, by which an index that has changed is known.
    """

    images: int
    spread: float
    medians: list[float]
    steps: list[float]
    highest: float
    are_told_apart: bool = True
    rows: list[tuple[int, int]] = field(default_factory=list)

    def lets_through(self, scores: Any, gates: Sequence[tuple[float, float]]) -> bool:
        """Whether a query's scores (I,) stand out at one of the gates.

        They do in any case if an image has a higher score than the reference queries have with any image, or if these
        tell nothing.
        """
        if not self.are_told_apart or float(scores.max()) > self.highest:
            return True
        scaled = np.asarray(scores, dtype=np.float32)[None] / np.float32(self.spread)
        levels = [float(level(scaled, sharpness)[0]) for sharpness, _ in gates]
        return any(
            found > median + least * step
            for found, median, step, (_, least) in zip(levels, self.medians, self.steps, gates, strict=True)
        )


NAMES = {each.name for each in fields(ReferenceScores)}
"""What a note of them holds. One of another version is not read."""


def level(scores: np.ndarray, sharpness: float) -> np.ndarray:
    """Logarithm of the mean of exp(sharpness · score) over the images: (Q, I) → (Q,). Scores of -inf do not count."""
    count = (scores > -np.inf).sum(axis=1)
    highest = scores.max(axis=1, keepdims=True)
    sums = np.exp(np.float32(sharpness) * (scores - highest)).sum(axis=1, dtype=np.float64)
    return sharpness * highest[:, 0] + np.log(sums / count)


def end_of_results(scores: Any, spread: float) -> float:
    """The least score of a result.

    Args:
        scores: (I,) of a query with all images.
        spread: Of the scores of such queries.
    """
    scores = np.asarray(scores, dtype=np.float32)
    scaled = scores * np.float32(SHARPNESS / spread)
    weights = np.exp(scaled - scaled.max())
    total = weights.sum(dtype=np.float64)
    mean = (weights * scaled).sum(dtype=np.float64) / total
    deviation = math.sqrt((weights * np.square(scaled - np.float32(mean))).sum(dtype=np.float64) / total)
    least = (mean - max(REACH * deviation, LEAST_REACH)) * (spread / SHARPNESS)
    return min(float(least), float(scores.max()))  # of rounding


def least_score(scores: Any, reference: ReferenceScores, gates: Sequence[tuple[float, float]]) -> float:
    """The least score of a result of one text or one image: inf if it does not fit the index."""
    return end_of_results(scores, reference.spread) if reference.lets_through(scores, gates) else math.inf


def measure_references(
    matrix: "EmbeddingMatrix | PlainMatrix", queries: Any, gates: Sequence[tuple[float, float]], places: Any = None
) -> ReferenceScores:
    """Compare reference queries with all images.

    Args:
        matrix: The embeddings of the index.
        queries: (Q, D) of length one, a tensor or an array.
        gates: Of their kind.
        places: Rows (Q,) of the index that the queries are, which are not compared with themselves.
    """
    queries = np.asarray(queries, dtype=np.float32)
    sample = np.asarray(matrix.sample(SAMPLE)).astype(np.float32)
    spread = max(float(_median((queries @ sample.T).std(axis=1, ddof=1, dtype=np.float64))), 1e-6)
    found, highest = [], -math.inf
    for first in range(0, len(queries), BLOCK):
        scores = np.asarray(matrix.similarities(queries[first : first + BLOCK])) / np.float32(spread)
        if places is not None:
            scores[np.arange(len(scores)), np.asarray(places[first : first + BLOCK])] = -np.inf
        highest = max(highest, float(scores.max()) * spread)
        found.append(np.stack([level(scores, sharpness) for sharpness, _ in gates]))
    levels = np.concatenate(found, axis=1)  # (gates, Q)
    medians = _median(levels)
    least_steps = [LEAST_STEP * sharpness for sharpness, _ in gates]
    steps = np.maximum(medians - np.quantile(levels, 0.16, axis=1), least_steps)
    # Images of the index are no words that a model may not know, and may be copies of one another.
    are_told_apart = places is not None or tells_apart(queries)
    return ReferenceScores(len(matrix), spread, medians.tolist(), steps.tolist(), highest, are_told_apart)


def _median(values: np.ndarray) -> np.ndarray:
    """The median of the last dimension; of an even number the lower one of the two in the middle."""
    return np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2]


def tells_apart(texts: Any) -> bool:
    """Whether a model tells most texts from all others.   texts: (T, D) of length one"""
    texts = np.asarray(texts, dtype=np.float32)
    centred = texts - texts.mean(axis=0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.float32(1e-12))
    similarities = centred @ centred.T
    np.fill_diagonal(similarities, -1.0)
    return float(_median(similarities.max(axis=1))) < SAME_TEXT


class ResultCutoff:
    """Says for each query over one index where its results end.

    What the reference queries gave is kept in the index, if it can be written to.

    Args:
        tables: The tables of the index.
    """

    def __init__(self, tables: IndexTables):
        self.tables = tables
        self._known: dict[str, ReferenceScores] = {}
        self._compared: dict[str, int] = {}  # kind → version of the table of images

    def references(self, kind: str, matrix: "Matrix", encode: Encode) -> ReferenceScores:
        """The scores of reference queries of a kind, "texts" or "images"; measured if they are not known."""
        if not self._known:
            noted = self.tables.noted(NOTE, {})
            self._known = {name: ReferenceScores(**values) for name, values in noted.items() if values.keys() == NAMES}
        known, version = self._known.get(kind), self.tables.images.version
        if known is not None and (self._compared.get(kind) == version or self._is_similar(known, len(matrix))):
            self._compared[kind] = version
            return known
        whole = matrix.whole()
        if kind == "texts":
            measured = measure_references(whole, encode(REFERENCE_TEXTS), TEXT_GATES)
        else:
            places = sampled(len(whole), REFERENCE_IMAGES)
            measured = measure_references(whole, np.asarray(whole.embeddings[places]), IMAGE_GATES, places)
        ids = whole.ids[sampled(len(whole), SAMPLED_ROWS)].tolist()
        measured = replace(measured, rows=sorted(self._checksums(ids).items()))
        self._known[kind], self._compared[kind] = measured, version
        self._keep()
        return measured

    def _is_similar(self, known: ReferenceScores, count: int) -> bool:
        """Whether an index of `count` images holds much the same as when reference scores were measured."""
        found = self._checksums([id for id, _ in known.rows])
        lost = sum(found.get(id) != checksum for id, checksum in known.rows) / max(1, len(known.rows))
        added = count - (1 - lost) * known.images
        return lost <= SIMILAR and added <= SIMILAR * known.images

    def _checksums(self, ids: Sequence[int]) -> dict[int, int]:
        """Checksums of the embeddings of those images that there are."""
        if not ids:
            return {}
        rows = PlainMatrix.of_table(self.tables.rows_of(["id", "embedding"], ids))
        return {id: zlib.crc32(row.tobytes()) for id, row in zip(rows.ids.tolist(), rows.embeddings, strict=True)}

    def _keep(self) -> None:
        # Where nobody may write, the next process measures it again. These are the errors that LanceDB has.
        with suppress(OSError, RuntimeError, ValueError):
            self.tables.note(NOTE, {name: asdict(values) for name, values in self._known.items()})

    def least_score(
        self,
        matrix: "Matrix",
        scores: Any,
        parts: Sequence[QueryPart] | None,
        vectors: Any,
        encode: Encode,
        templates: Any = None,
    ) -> float:
        """The least score of a result: -inf if all are results, inf if nothing fits.

        A query of several parts fits if one of those that are not subtracted does. What an image of the index is
        searched by, and a direction of which nothing else is known, always fits.

        Args:
            matrix: The embeddings of the index.
            scores: (I,) of the query with all images.
            parts: Of the query. None: of a direction that the caller gave.
            vectors: (parts, D), a vector for each part; None without parts.
            encode: Called if texts have to be encoded.
            templates: What the texts of the query were put into.
        """
        scores = np.asarray(scores, dtype=np.float32)
        deviation = float(scores.std(ddof=1, dtype=np.float64)) if len(scores) > 1 else 0.0
        if len(matrix) < FEWEST_IMAGES or not math.isfinite(deviation) or deviation < 1e-5:
            return -math.inf
        if parts is None or vectors is None:
            return end_of_results(scores, deviation)
        kinds = ["texts" if part.kind == "text" else "images" for part in parts]
        added = [place for place, part in enumerate(parts) if part.weight > 0]
        known = {kind: self.references(kind, matrix, encode) for kind in {kinds[place] for place in added}}
        is_single = len(parts) == 1
        fits = any(parts[place].kind == "id" for place in added)
        for place in added if not fits else ():
            if is_single and not _is_put_into_templates(parts[place], templates):
                own = scores
            else:
                vector = _as_reference(parts[place], vectors[place], encode, templates)
                own = matrix.similarities(vector[None])[0]
            gates = TEXT_GATES if kinds[place] == "texts" else IMAGE_GATES
            fits = fits or known[kinds[place]].lets_through(own, gates)
        if not fits:
            return math.inf
        return end_of_results(scores, known[kinds[0]].spread if is_single else deviation)


def _is_put_into_templates(part: QueryPart, templates: Any) -> bool:
    return part.kind == "text" and (templates is not None or is_short_noun(part.value))


def _as_reference(part: QueryPart, vector: Any, encode: Encode, templates: Any) -> Any:
    """A part's vector as the reference queries have theirs: of one prompt, since a mean of several scores higher."""
    if not _is_put_into_templates(part, templates):
        return vector
    functions, _ = read_templates(TEMPLATES if templates is None else templates)
    return encode([functions[0](part.value)])[0]


__all__ = [
    "ReferenceScores",
    "ResultCutoff",
    "end_of_results",
    "least_score",
    "measure_references",
    "tells_apart",
]
