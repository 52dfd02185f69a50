"""One source of pairs: a table whose columns are found, a draw from it, and what the drawn row holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...data.columns import (
    CaptionReader,
    UnusableRowError,
    field_of,
)
from ...data.images import NOWHERE, ImagePlaces
from .negative_captions import read_negatives

ANY = -1
"""Stands for the caption that is drawn when the row is read."""


class Draw(NamedTuple):
    """A row to be read.

    Attributes:
        source: The number of its source.
        row: Its number in the source.
        caption: Which of its captions, or `ANY`.
        round: How often its source was gone through before.
        stored: The row itself, of a stream.
    """

    source: int
    row: int
    caption: int
    round: int
    stored: "Row | None" = None


@dataclass
class Row:
    """What a row holds, before anything is decoded."""

    name: str
    image: Any
    captions: list[str]
    label: int | None = None
    places: ImagePlaces = NOWHERE
    reason: str | None = None
    """Why it cannot be used, where that is known already."""
    negatives: list[str] = field(default_factory=list)
    """Wrong captions, any number."""


@dataclass
class PairTable:
    """One source with its columns found. `table` is a Dataset or an IterableDataset; `rows` those of it that count."""

    name: str
    table: Any
    image_column: str
    captions: CaptionReader
    label_column: str | None = None
    places: ImagePlaces = NOWHERE
    weight: float | None = None
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    image_holder: str | None = None
    """The column of records where `image_column` is a field."""
    replay: float | None = None
    """The share of all draws that this source has, where it is replayed beside the others."""
    negatives: Sequence[CaptionReader] = ()
    """Of wrong captions."""

    @property
    def columns(self) -> list[str]:
        """Those that are read."""
        return list(dict.fromkeys([self.image_holder or self.image_column, *self.columns_of_texts]))

    @property
    def columns_of_texts(self) -> list[str]:
        """Those of captions, right and wrong ones, and of labels."""
        more = [self.label_column] if self.label_column else []
        readers = (self.captions, *self.negatives)
        return list(dict.fromkeys([*(name for reader in readers for name in reader.columns), *more]))

    def row(self, stored: dict[str, Any], name: str) -> Row:
        label = stored.get(self.label_column) if self.label_column else None
        row = Row(name, field_of(stored, self.image_column), [], label, self.places)
        try:
            row.captions = self.captions(stored)
            row.negatives = read_negatives(self.negatives, stored)
            if self.label_column and label is None:
                raise UnusableRowError(f"its {self.label_column} is missing")
        except UnusableRowError as error:
            row.reason = str(error)
        return row
