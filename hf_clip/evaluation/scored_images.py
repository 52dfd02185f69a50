"""Data sets of images with a score, such as their aesthetic quality: whatever the trainer opens.

Images stay undecoded until they are encoded.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from ..data.columns import column_of, describe_feature, find_image_column
from ..data.images import NOWHERE, ImagePlaces, find_image_places
from ..data.sources import folder_of
from .fingerprint import fingerprint_of
from .labelled_images import open_source_of
from .numbered_row import NumberedRow, RowError, describe_table, numbered_rows

LARGEST = 1e30
"""A head's layers are float32 numbers, which end at 3e38. The distances of two scores must lie below that, too."""


class ScoreError(RowError):
    """A row's score cannot be used."""


class ScoredRow(NamedTuple):
    """A row.   name: for messages   image: undecoded   score: a finite number"""

    name: str
    image: Any
    score: float


@dataclass(frozen=True)
class ScoredImages:
    """A data set of images with a score.

    Attributes:
        name: As the user named it.
        split: The split's name.
        score_column: Name of the score.
        rows: A function that reads the rows from the first on.
        count: Number of rows. None if it isn't known.
        places: Where paths in the rows may lead.
        fingerprint: A text that changes with the data. None if it isn't known.
    """

    name: str
    split: str
    score_column: str
    rows: Callable[[], Iterator[ScoredRow]]
    count: int | None = None
    places: ImagePlaces = NOWHERE
    fingerprint: str | None = None


def _read_score(row: NumberedRow, column: str) -> float:
    value = row.values[column]
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ScoreError(
            f"{row.title} has {value!r:.60} in its column {column!r}, but a score, a finite number, is needed: correct "
            f"the row, or leave it out.",
            row.place,
        )
    score = float(value)
    if abs(score) > LARGEST:
        raise ScoreError(
            f"{row.title} has {value!r:.60} in its column {column!r}, but a score from -{LARGEST:g} to {LARGEST:g} is "
            f"needed, since a head computes in float32: divide all scores by one number.",
            row.place,
        )
    return score


def open_scored(
    source: Any,
    split: str | None = None,
    *,
    score_column: str,
    image_column: str | None = None,
    image_folders: Sequence[str] = (),
) -> ScoredImages:
    """Open a data set of images with a score.

    Args:
        source: Whatever the trainer opens, or a `datasets.Dataset` or `IterableDataset`.
        split: Name of the split. None: the only one, or `test`, or `validation`.
        score_column: The column of scores.
        image_column: The column of images. None: the only one that can be it.
        image_folders: Folders besides the source's own that paths in its rows may lead to.

    Returns:
        The data set. Its rows raise ScoreError where a score is no finite number.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: A split or a column is missing, the column holds no numbers, or the split is empty.
    """
    name, chosen, places, fingerprint = "the data set", split or "", NOWHERE, None
    if hasattr(source, "features") and hasattr(source, "select_columns"):
        table = source
    else:
        name = str(source)
        chosen, table = open_source_of(name, split)
        places, fingerprint = find_image_places(name, folder_of(name), image_folders), fingerprint_of(name, chosen)
    table, features, count = describe_table(name, chosen, table)
    if score_column not in features:
        raise ValueError(
            f"{name} has no column {score_column!r}; its columns are {', '.join(features)}. Name the right one with "
            f"--score-column."
        )
    feature = features[score_column]
    is_number = str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float"))
    if feature is not None and (not is_number or describe_feature(feature) == "label"):
        raise ValueError(
            f"{name}: the column {score_column!r} holds {feature}, but scores, numbers, are needed. Of "
            f"classes a head is trained with --label-column."
        )
    images = find_image_column(name, features, image_column)

    selected = table.select_columns([column_of(images, features), score_column])

    def rows() -> Iterator[ScoredRow]:
        for row in numbered_rows(name, selected):
            yield ScoredRow(row.title, row.field(images), _read_score(row, score_column))

    return ScoredImages(name, chosen, score_column, rows, count, places, fingerprint)


__all__ = ["ScoreError", "ScoredImages", "ScoredRow", "open_scored"]
