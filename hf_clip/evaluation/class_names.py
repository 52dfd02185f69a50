"""The names of a data set's classes, and which class a stored label is.

Dimensions: K classes.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..zero_shot.prompts import LabelError, read_labels


def read_class_names(given: Any) -> list[list[str]]:
    """Read the names of classes.

    Args:
        given: A list of names, or of lists of names; a mapping from classes to names; a `datasets.ClassLabel`; or the
            path of a file: JSON, or a text with one class a line.

    Returns:
        For each class its names, the first of which is its own.

    Raises:
        LabelError: A class is empty or appears twice.
        ValueError: The file cannot be read, or there are fewer than two classes.
    """
    if isinstance(given, (str, Path)):
        path = Path(given)
        try:
            text = path.read_text(encoding="utf-8-sig")
            given = (
                json.loads(text) if path.suffix == ".json" else [s for line in text.splitlines() if (s := line.strip())]
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"The class names {str(path)!r} cannot be read ({error}).") from error
    names = [list(dict.fromkeys(found)) for found in read_labels(given).values()]
    if len(names) < 2:
        raise ValueError(
            f"There is only one class, {names[0][0]!r}: every image would be right. Name at least two classes."
        )
    return names


def resolve_names(source: str, own: Sequence[str] | None, given: Any) -> list[list[str]]:
    """Choose between the names that came with the data and those of the user, and compare their numbers.

    Raises:
        ValueError: There are none, or their numbers differ.
    """
    if given is None and own is None:
        raise ValueError(
            f"{source} does not name its classes: pass class names, a file with one class a line "
            f"(--class-names classnames.txt)."
        )
    if given is None:
        return read_class_names(own)
    names = read_class_names(given)
    if own is not None and len(own) != len(names):
        raise ValueError(
            f"{source} has {len(own)} classes, {own[0]!r} to {own[-1]!r}, but {len(names)} class names were given, "
            f"{names[0][0]!r} to {names[-1][0]!r}: one for each is needed, in the order of the labels."
        )
    return names


def _wrong_label(row: str, label: Any, count: int, place: int) -> LabelError:
    hint = " A negative number often stands for a label that is kept secret: take another split." if label == -1 else ""
    return LabelError(
        f"{row} has the label {label!r}, but there are {count} classes: a number from 0 to {count - 1} is needed, or a "
        f"class's name.{hint}",
        place,
    )


def label_reader(class_names: list[list[str]], is_multi_label: bool) -> Callable[[str, Any, int], tuple[int, ...]]:
    """Return a function from a row's name, its stored label and its place to the places of its classes."""
    places = {name: place for place, names in enumerate(class_names) for name in names}
    count = len(class_names)

    def read_one(row: str, label: Any, place: int) -> int:
        found = places.get(label, -1) if isinstance(label, str) else label
        if isinstance(found, bool) or not isinstance(found, (int, np.integer)) or not 0 <= found < count:
            raise _wrong_label(row, label, count, place)
        return int(found)

    def read(row: str, label: Any, place: int) -> tuple[int, ...]:
        if not is_multi_label:
            return (read_one(row, label, place),)
        values = [] if label is None else list(label)
        return tuple(dict.fromkeys(read_one(row, value, place) for value in values))

    return read
