"""The sets that a run is evaluated on, as `--validation` names them: `coco=coco/val flickr=flickr/val`, `500`, `test`.

The figures of the first set have their plain names, `recall@1`. Those of each other set have its name in front,
`flickr_recall@1`.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.sources import names_a_source
from .data.load_pairs import read_validation
from .data.pairs import Pairs, PairStream

HELD_OUT = "held_out"
"""What rows are called that are held out of the data to train on."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

TAKEN = ("guard", "image_to_text", "text_to_image")
"""What begins the names of other figures."""


@dataclass(frozen=True)
class ValidationSet:
    """One set.

    Attributes:
        name: What it is called, in front of its figures.
        source: A split, a number or a part of the rows to hold out, or a source of its own, as it was given.
    """

    name: str
    source: str


@dataclass(frozen=True)
class ValidationPairs:
    """One set, opened.

    Attributes:
        name: What it is called.
        pairs: Its pairs.
        class_prompts: Each class's caption, in the order of the labels, where the captions are made of labels.
    """

    name: str
    pairs: Pairs | PairStream
    class_prompts: list[str] | None


def _read(text: str) -> ValidationSet:
    """`source` or `name=source`. What exists under its whole name, like `data/year=2020`, is a source."""
    given = re.fullmatch(rf"({NAME})=(.+)", text)
    if given is not None and not os.path.exists(os.path.expanduser(text)):
        return ValidationSet(given[1], given[2])
    if not isinstance(read_validation(text), str):
        return ValidationSet(HELD_OUT, text)
    last = Path(text.rstrip("/")).name if names_a_source(text) else text
    last = last.partition(":")[0] if "/" in text else last  # of user/name:configuration
    return ValidationSet(re.sub(r"[^A-Za-z0-9._-]+", "_", last.partition(".")[0]).strip("._-") or "validation", text)


def parse_validation(texts: Sequence[str]) -> list[ValidationSet]:
    """Read `--validation`.

    Args:
        texts: Its words.

    Returns:
        The sets, in their order.

    Raises:
        ValueError: Two sets have one name or one source, or a name is that of other figures.
    """
    sets = [_read(text) for text in texts]
    if len(sets) < 2:
        return sets
    amounts = [one.source for one in sets if not isinstance(read_validation(one.source), str)]
    if len(amounts) > 1:
        raise ValueError(
            f"--validation holds out rows {len(amounts)} times ({', '.join(amounts)}), but once is enough: the data "
            f"are the same."
        )
    for place, one in enumerate(sets):
        for other in sets[:place]:
            if one.source == other.source:
                raise ValueError(f"--validation names {one.source} twice: leave one out.")
            if one.name == other.name:
                raise ValueError(
                    f"--validation names two sets {one.name!r}, {other.source} and {one.source}: give each a name of "
                    f"its own, as in --validation first={other.source} second={one.source}."
                )
        if one.name.startswith("guard_") or one.name.endswith(TAKEN):
            raise ValueError(
                f"--validation names a set {one.name!r}, but figures of that name are others: call it something else, "
                f"as in --validation first={one.source}."
            )
    return sets


def place_of(figure: str, sets: Sequence[ValidationSet]) -> int:
    """The place of the set that a figure is of, by what stands in front of its name."""
    found = [place for place in range(1, len(sets)) if figure.startswith(prefix_of(sets, place))]
    return max(found, key=lambda place: len(sets[place].name), default=0)


def prefix_of(sets: Sequence[ValidationSet], place: int) -> str:
    """What stands in front of the figures of the set at this place."""
    return f"{sets[place].name}_" if place else ""
