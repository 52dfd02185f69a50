"""The rows of a table with their numbers, and errors that name a row."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..data.columns import field_of
from ..data.sources import describe_columns, leave_undecoded, readable

BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
"""The part of an image that ARO shows to the model, in pixels: left, top, width and height."""

MOST_PIXELS = 1 << 26
"""Largest box. Pillow warns of images that are a third larger."""


class RowError(ValueError):
    """A row cannot be used.   index: the row's place, from 0"""

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message, index)
        self.index = index

    def __str__(self) -> str:
        return str(self.args[0])


class CaptionedRowError(RowError):
    """A row's captions or its box cannot be used."""


class NumberedRow(NamedTuple):
    """A row of a table.   place: from 0   title: for messages"""

    place: int
    title: str
    values: Mapping[str, Any]

    def field(self, name: str) -> Any:
        """Return the value of a column, or of a field within one."""
        return field_of(self.values, name)

    def refuse(self, what: str) -> CaptionedRowError:
        return CaptionedRowError(f"{self.title} {what}", self.place)

    def texts(self, column: str) -> list[str]:
        """Return the captions of a column, one or several."""
        value = self.values[column]
        texts = list(value) if isinstance(value, (list, tuple)) else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise self.refuse(f"has the caption {value!r:.80}, but a text is needed; leave the row out.")
        return texts

    def box(self) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the columns `BOX`."""
        given = [self.values[column] for column in BOX]
        if not all(
            isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < MOST_PIXELS for value in given
        ):
            raise self.refuse(f"has the box {given!r:.80}, but pixels are needed, {', '.join(BOX)}; leave the row out.")
        left, top, width, height = map(int, given)
        if width < 1 or height < 1 or width * height > MOST_PIXELS:
            raise self.refuse(
                f"has a box of {width}x{height} pixels, but one from 1x1 to {MOST_PIXELS:,} pixels in all is needed; "
                f"leave the row out."
            )
        return left, top, left + width, top + height


def describe_table(name: str, split: str, table: Any) -> tuple[Any, dict[str, Any], int | None]:
    """Return a table with images undecoded, its columns, and the number of its rows if that is known.

    Raises:
        ValueError: It has no rows.
    """
    with readable(name):
        features = describe_columns(table)
        table = leave_undecoded(table, features if table.features else ())
    count = len(table) if hasattr(table, "__len__") else None
    if not features or count == 0:
        raise ValueError(f"{name} has no rows{f' in its split {split!r}' if split else ''}.")
    return table, features, count


def numbered_rows(name: str, table: Any) -> Iterator[NumberedRow]:
    """Read the rows of a table or stream from the first on. What cannot be read is an error of one line."""
    with readable(name):
        for place, row in enumerate(table):
            yield NumberedRow(place, f"row {place} of {name}", row)


__all__ = ["BOX", "CaptionedRowError", "NumberedRow", "RowError", "describe_table", "numbered_rows"]
