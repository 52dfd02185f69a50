"""Sources are opened, their columns found, and rows held out of them or replayed beside them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...data.columns import CaptionReader, check_label_column, column_of, find_caption_column, find_image_column
from ...data.images import find_image_places
from ...data.sources import (
    Source,
    describe_columns,
    folder_of,
    leave_undecoded,
    open_source,
    parse_sources,
    readable,
)
from .negative_captions import check_taken, check_templates, negative_readers, without_columns
from .pair_table import PairTable
from .pairs import Pairs, PairStream


def load_pairs(
    sources: str | Source | Sequence[str | Source],
    *,
    split: str | None = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    negative_caption_column: Sequence[str] = (),
    passed_over: Sequence[str] = (),
    label_column: str | None = None,
    captions: str = "one",
    streaming: bool = False,
    buffer: int = 1000,
    image_folders: Sequence[str] = (),
) -> Pairs | PairStream:
    """Open sources of pairs, find their columns, and mix them.

    Args:
        sources: One or several `path` or `path=weight`, see `Source`.
        split: The split to take of each. None takes the one to evaluate on, see `open_source`.
        image_column: Images, their bytes, paths (relative ones begin at the source's folder) or URLs.
        caption_column: Texts, lists of texts, or a template over the row's columns such as "a photo of a {label}."
        negative_caption_column: Columns or templates of wrong captions, read in the same way. Every source has them.
        passed_over: Columns among which images and captions are not looked for, where a source has them.
        label_column: A column of whole numbers to carry along as `labels`.
        captions: Of a row with several, "one" is drawn in each epoch, or "all" make a row each.
        streaming: Read the sources as they come, instead of preparing tables on disk first.
        buffer: Rows of a stream among which the next is drawn.
        image_folders: Folders outside of the source's own whose images its rows may name; see `images`.

    Returns:
        `PairStream` when streaming, else `Pairs`.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: A split or column is missing, or there is a choice of columns.
    """
    if captions not in ("one", "all"):
        raise ValueError(
            f"captions is {captions!r}, but must be 'one' (drawn in each epoch) or 'all' (a row for each)."
        )
    if buffer < 1:
        raise ValueError(f"The shuffle buffer is {buffer}, but must hold at least 1 row.")
    found = []
    for source in parse_sources(sources):
        table = open_source(source.path, split, streaming)
        with readable(source.path):
            table = leave_undecoded(table, table.features or ())
            features = describe_columns(table)
        if not features or (not streaming and not len(table)):
            which = "" if split is None else f" in its split {split!r}"
            raise ValueError(f"{source.path} has no rows{which}.")
        choices = without_columns(features, [*negative_caption_column, *passed_over])
        check_taken(source.path, features, negative_caption_column, image_column, caption_column)
        images = find_image_column(source.path, features if image_column else choices, image_column)
        texts = find_caption_column(source.path, features if caption_column else choices, caption_column, images)
        reader = CaptionReader(source.path, texts, features)
        negatives = negative_readers(source.path, features, negative_caption_column, images, texts)
        check_templates([reader, *negatives], images)
        if label_column is not None:
            check_label_column(source.path, features, label_column)
        places = find_image_places(source.path, folder_of(source.path), image_folders)
        pair_table = PairTable(source.path, table, images, reader, label_column, places, source.weight)
        pair_table.negatives = negatives
        pair_table.image_holder = column_of(images, features)
        pair_table.table = table.select_columns(pair_table.columns)
        if not streaming:
            pair_table.rows = np.arange(len(table))
        found.append(pair_table)
    return PairStream(found, captions, buffer) if streaming else Pairs(found, captions)


def with_replay(pairs: Pairs | PairStream, old: Pairs | PairStream, share: float) -> Pairs | PairStream:
    """Mix old pairs into others, so that a model does not forget them.

    Args:
        pairs: What is learned.
        old: One source, read in the same way.
        share: The part of all draws that the old pairs have, between 0 and 1.

    Returns:
        Both. An epoch draws of `pairs` what it draws without the old ones.

    Raises:
        ValueError: Several sources without weights are read as a stream.
    """
    sources = [*pairs.sources, *(replace(source, weight=None, replay=share) for source in old.sources)]
    if isinstance(pairs, Pairs):
        return Pairs(sources, pairs.captions)
    if len(pairs.sources) > 1 and pairs.sources[0].weight is None:
        raise ValueError(
            f"--replay has a share of a stream, whose other sources need theirs: give each --dataset a weight, as in "
            f"{pairs.sources[0].name}=1."
        )
    return PairStream(sources, pairs.captions, pairs.buffer)


def read_validation(text: str) -> str | int | float:
    """What `--validation` means: `"500"` is a number of rows to hold out, `"0.05"` a part of them, all else a name."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    return text


def hold_out(pairs: Pairs | PairStream, amount: int | float, seed: int = 0) -> tuple[Any, Any]:
    """Split pairs into those to train on and those held out.

    Of tables, whole rows with all of their captions are drawn by `seed`. Of a stream, the first rows are held out, of
    every source as many. The order of a stream's files then stays as it is, and only its buffer is shuffled.

    Args:
        pairs: What is split.
        amount: Rows, or if below 1 a part of all rows. Of a stream it is a number of rows.
        seed: Of the choice.

    Returns:
        Pairs to train on and pairs held out.

    Raises:
        ValueError: Nothing would be held out, or nothing be left.
    """
    wanted = f"--validation {amount}"
    if isinstance(pairs, PairStream):
        if not isinstance(amount, int) or amount < 1:
            raise ValueError(
                f"{wanted}: the length of a stream isn't known; hold out a number of its rows, or a split."
            )
        each, more = divmod(amount, len(pairs.sources))
        counts = [each + (place < more) for place in range(len(pairs.sources))]
        # Of every source, and not of their mixture, which is another one in each epoch.
        rest = [replace(s, table=s.table.skip(n)) for s, n in zip(pairs.sources, counts, strict=True)]
        first = [replace(s, table=s.table.take(n)) for s, n in zip(pairs.sources, counts, strict=True) if n]
        streams = [PairStream(sources, pairs.captions, pairs.buffer) for sources in (rest, first)]
        return streams[0], streams[1]
    total = sum(len(source.rows) for source in pairs.sources)
    count = amount if isinstance(amount, int) else round(total * amount)
    if not 1 < count < total or (isinstance(amount, float) and amount >= 1):  # one pair alone is always found
        raise ValueError(f"{wanted} would hold out {count} of {total} rows; take at least 2, and leave at least 1.")
    is_held = np.zeros(total, dtype=bool)
    is_held[np.random.default_rng((seed, 2)).choice(total, count, replace=False)] = True
    parts: list[list[PairTable]] = [[], []]
    start = 0
    for source in pairs.sources:
        chosen = is_held[start : start + len(source.rows)]
        start += len(source.rows)
        for part, mask in zip(parts, (~chosen, chosen), strict=True):
            if mask.any():
                part.append(replace(source, rows=source.rows[mask]))
    return Pairs(parts[0], pairs.captions), Pairs(parts[1], pairs.captions)
