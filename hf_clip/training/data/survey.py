"""A look at some rows before a model is loaded: are columns swapped, do captions say enough?

Of a table rows are taken at even distances, since files are often sorted. Of a stream the first rows are taken.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from ...data.columns import UnusableRowError
from ...data.content import tokens_id
from ...data.images import image_content, open_content
from .collator import PairCollator, texts_of
from .pair_table import PairTable, Row
from .pairs import Pairs, PairStream

LOOKED_AT = 1000
"""Rows whose captions are looked at: as many as a stream's shuffle buffer reads before the first batch anyway."""

OPENED = 16
"""Rows of each source of which one must be usable."""

MANY_CUT = 0.03
"""The part of cut captions from which on it is a warning."""

_ADDRESS = re.compile(r"https?://\S+|\S+\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)


@dataclass
class Look:
    """What was seen of the data.

    Attributes:
        draws: How often an epoch draws a row. Of a stream: how many rows were read before the look ended.
        is_whole: Whether those are all there are.
        captions: Of the rows that were looked at.
        negatives: Of each row that was looked at: its number of negative captions.
        texts: Rows with negative captions, without all else.
    """

    draws: int = 0
    is_whole: bool = True
    captions: list[str] = field(default_factory=list)
    negatives: list[int] = field(default_factory=list)
    texts: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.captions += [caption for caption in row.captions if caption]
        self.negatives.append(len(row.negatives))
        if row.negatives:
            self.texts.append(Row(row.name, None, row.captions, negatives=row.negatives))


def look_at(pairs: Pairs | PairStream, count: int = LOOKED_AT) -> Look:
    """Look at some rows with captions, and open an image of each source.

    Args:
        pairs: The data.
        count: About how many rows.

    Raises:
        ValueError: No row of a source that was looked at can be used, or its captions are paths or URLs of images.
    """
    if isinstance(pairs, Pairs):
        look = Look(len(pairs))
        each = -(-count // len(pairs.sources))
        for source in pairs.sources:
            for row in _captioned(source, each):
                look.add(row)
            _check(source, _spread(source, OPENED))
        return look
    look = Look()
    first: dict[int, list[Row]] = {}
    drawn = pairs.draws(0, shuffle=False)
    for draw in islice(drawn, count):
        look.draws += 1
        row = pairs.read(draw)
        look.add(row)
        if len(rows := first.setdefault(draw.source, [])) < OPENED:
            rows.append(row)
    look.is_whole = look.draws < count
    for place, rows in first.items():
        _check(pairs.sources[place], iter(rows))
    return look


def _places(source: PairTable, count: int) -> np.ndarray:
    """(≤ count,) rows at even distances."""
    return source.rows[np.unique(np.linspace(0, len(source.rows) - 1, min(count, len(source.rows))).astype(int))]


def _captioned(source: PairTable, count: int) -> Iterator[Row]:
    """Rows without their images, which need not be read for it."""
    table = source.table.select_columns(source.columns_of_texts)
    stored = table[_places(source, count).tolist()]  # column → values
    for values in zip(*stored.values(), strict=True):
        yield source.row(dict(zip(stored, values, strict=True)), "")


def _spread(source: PairTable, count: int) -> Iterator[Row]:
    for place in _places(source, count).tolist():
        yield source.row(source.table[place], f"row {place} of {source.name}")


def _check(source: PairTable, rows: Iterator[Row]) -> None:
    """Refuse a source of whose rows none can be used, or whose captions are no texts."""
    faults: list[str] = []
    captions: list[str] = []
    is_usable = False
    for row in rows:
        captions += row.captions
        if not is_usable:
            try:
                _open(row)
                is_usable = True
            except UnusableRowError as error:
                faults.append(f"{row.name}: {error}")
    texts = [caption for caption in captions if caption]
    columns = f"image_column is {source.image_column!r} and caption_column {source.captions.column!r}"
    advice = "Name the columns of images and texts with --image_column and --caption_column."
    if texts and all(_ADDRESS.fullmatch(text) for text in texts):
        swapped = "" if is_usable else ", and no image was found either: the two columns may be swapped"
        raise ValueError(
            f"{source.name}: the captions are paths or URLs of images, such as {texts[0][:100]!r}{swapped} "
            f"({columns}). {advice}"
        )
    if faults and not is_usable:
        raise ValueError(
            f"{source.name}: none of the {len(faults)} rows that were looked at can be used; {faults[0]} ({columns}). "
            f"Check the data. {advice}"
        )


def _open(row: Row) -> None:
    """Raises UnusableRowError. What would be fetched from a server is left for the training."""
    if row.reason is not None:
        raise UnusableRowError(row.reason)
    if not (isinstance(row.image, str) and row.image.startswith(("http://", "https://"))):
        open_content(image_content(row.image, row.places))


def check_negatives(look: Look, columns: list[str]) -> None:
    """Refuse data whose named columns have no negative caption.

    Args:
        look: At the data.
        columns: Those that were named.

    Raises:
        ValueError: No row that was looked at has any.
    """
    if columns and not any(look.negatives):
        raise ValueError(
            f"--negative_caption_column {' '.join(columns)} would have no effect: none of the {len(look.negatives)} "
            f"rows that were looked at has a text there. Name another column, or leave it out."
        )


def describe_found_columns(pairs: Pairs | PairStream) -> list[str]:
    """A line that says which columns were found to hold the captions, where others hold negative ones."""
    found = [source.captions.column for source in pairs.sources if source.negatives]
    if not found:
        return []
    return [f"note: captions are those of {' and '.join(dict.fromkeys(found))}, since no --caption_column is given."]


def describe_negatives(look: Look, collator: PairCollator, *, is_masked: bool) -> list[str]:
    """Lines that say how many negative captions there are, where there are any.

    Args:
        look: At the data.
        collator: Of the model.
        is_masked: Whether an image is kept from being pushed from its own caption.
    """
    if not (total := sum(look.negatives)):
        return []
    rows, without = len(look.negatives), look.negatives.count(0)
    lines = [
        f"note: {total / rows:.3g} negative captions a row; {without} of {rows} rows that were looked at have none. "
        f"The reported accuracy is among the pairs alone."
    ]
    known = collator.encode_together(texts_of(look.texts))
    if own := sum(len(collator.own_negatives(row, known)) for row in look.texts):
        kind = "warning: all" if own == total else f"note: {own} of"
        lines.append(
            f"{kind} {total} negative captions that were looked at equal a caption of their own row"
            + (", and are left out." if is_masked else "; --mask_duplicates off keeps them.")
        )
    if not is_masked:
        lines.append(
            "note: --mask_duplicates off: an image is pushed from its own caption where that is a negative of another."
        )
    return lines


def describe_captions(captions: list[str], collator: PairCollator, *, is_masked: bool) -> list[str]:
    """Lines that say how many captions are cut, become equal by it, or repeat.

    Args:
        captions: Those that were looked at.
        collator: Of the model.
        is_masked: Whether equal ones are kept from being negatives of each other.
    """
    by_text: dict[str, tuple[int, bool]] = {}
    for caption in dict.fromkeys(captions):
        try:
            ids, is_cut = collator.encode(caption)
        except UnusableRowError:  # counted where it is drawn
            continue
        by_text[caption] = tokens_id(ids), is_cut
    read = [caption for caption in captions if caption in by_text]
    if not read:
        return []
    lines = []
    number, longest = len(read), collator.tokenizer.model_max_length
    cut = sum(by_text[caption][1] for caption in read)
    texts_of = Counter(key for key, is_cut in by_text.values() if is_cut)
    merged = sum(by_text[caption][1] and texts_of[by_text[caption][0]] > 1 for caption in read)
    if cut:
        kind = "warning" if merged or cut > MANY_CUT * number else "note"
        same = f", and {merged} of those differ from others only behind the cut" if merged else ""
        lines.append(
            f"{kind}: {cut} of {number} captions that were looked at are cut at the model's {longest} tokens{same}. "
            f"Shorten them, or take a model of longer texts (--max_text_length)."
        )
    times = Counter(by_text[caption][0] for caption in read)
    repeated = sum(count for count in times.values() if count > 1)
    if len(times) == 1 and number > 1:
        lines.append(
            f"warning: all {number} captions that were looked at are one text to the model; it learns nothing."
        )
    elif repeated:
        how = f"{repeated} of {number} captions that were looked at come several times; equal ones in a batch are"
        lines.append(
            f"note: {how} no negatives of each other (--mask_duplicates off makes them so)."
            if is_masked
            else f"note: {how} negatives of each other, as --mask_duplicates off says."
        )
    return lines
