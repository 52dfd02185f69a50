"""Sources brought together: the order in which their rows are drawn, and what a drawn row is.

Tables. An item is a row, or with captions="all" a row with one of its captions. An epoch draws as often as there are
items. Without weights every item comes once. With weights each source has its share of the draws. It goes through its
items as often as that takes, and begins where it ended in the epoch before. The order is a function of (seed, epoch),
and any place of it can be reached without reading what stands before. Replayed pairs come on top: an epoch is as long
as it takes to draw the others as often as without them.

Streams. `datasets` interleaves the sources and shuffles rows within a buffer. The order is a function of (seed, epoch)
too, but to reach its n-th row those before are read, undecoded. An epoch ends when every source was read to its end.
With weights, sources that end earlier are read again.

Invariant: what a `Draw` becomes depends on the draw alone: its source, row, caption and round.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ...data.columns import (
    CaptionReader,
    UnusableRowError,
    check_label_column,
    column_of,
    describe_feature,
    field_of,
    find_caption_column,
    find_image_column,
    with_fields,
)
from ...data.images import NOWHERE, ImagePlaces, find_image_places
from ...data.sources import (
    Source,
    describe_columns,
    folder_of,
    import_datasets,
    leave_undecoded,
    open_source,
    parse_sources,
    readable,
)
from .negative_captions import negative_readers, read_negatives, without_columns

AT_ONCE = 4096

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


def _items(source: PairTable, captions: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a source's items and the captions' places in them, both (items,)."""
    if captions == "one" or source.captions.is_template:
        return source.rows, np.full(len(source.rows), ANY)
    name, features = source.captions.column, source.table.features
    if describe_feature(with_fields(features)[name]) != "texts":
        return source.rows, np.full(len(source.rows), ANY)
    from pyarrow import compute  # type: ignore[import-untyped]

    holder = column_of(name, features)
    column = source.table.select_columns([holder]).with_format("arrow")[:].column(0)
    if holder != name:
        column = compute.struct_field(column, name.split(".")[1:])
    counts = compute.fill_null(compute.list_value_length(column), 0).to_numpy().astype(np.int64)
    counts = np.maximum(counts, 1)[source.rows]  # a row without captions is met once, and then reported
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(source.rows, counts), np.arange(len(starts)) - starts


class Pairs:
    """Rows that can be read in any order."""

    is_stream = False

    def __init__(self, sources: Sequence[PairTable], captions: str = "one"):
        self.sources, self.captions = list(sources), captions
        self.items = [_items(source, captions) for source in self.sources]

    @property
    def has_several_captions(self) -> bool:
        """Whether rows were made of a column's several captions."""
        return any(bool((places != ANY).any()) for _, places in self.items)

    @property
    def name(self) -> str:
        return " and ".join(source.name for source in self.sources)

    def __len__(self) -> int:
        """Draws in an epoch."""
        return sum(self.shares())

    def shares(self) -> list[int]:
        """How many draws of an epoch each source has."""
        own = [source for source in self.sources if source.replay is None]  # which stand before the others
        counts = [len(rows) for rows, _ in self.items[: len(own)]]
        total = sum(counts)
        if own[0].weight is not None:
            weights = np.array([source.weight for source in own])
            ends = np.round(np.cumsum(weights) / weights.sum() * total).astype(int)
            counts = np.diff(ends, prepend=0).tolist()
        shares = [source.replay for source in self.sources if source.replay is not None]
        return counts + [max(1, round(total * share / (1 - share))) for share in shares]

    def draws(self, epoch: int, *, seed: int = 0, shuffle: bool = True, first: int = 0) -> Iterator[Draw]:
        """The draws of an epoch from number `first` on; without shuffling every item once, in order."""
        columns = []
        for place, ((rows, captions), share) in enumerate(zip(self.items, self.shares(), strict=True)):
            if not shuffle or share == len(rows):
                items, rounds = np.arange(len(rows)), np.full(len(rows), epoch)
            else:
                numbers = np.arange(epoch * share, (epoch + 1) * share)
                items, rounds = numbers % len(rows), numbers // len(rows)
                for number in np.unique(rounds):
                    order = np.random.default_rng((seed, place, int(number), 1)).permutation(len(rows))
                    items[rounds == number] = order[items[rounds == number]]
            columns.append(np.stack([np.full(len(items), place), rows[items], captions[items], rounds]))
        table = np.concatenate(columns, axis=1)  # (4, draws)
        order = np.arange(table.shape[1])
        if shuffle:
            order = np.random.default_rng((seed, epoch)).permutation(order)
        for start in range(first, len(order), AT_ONCE):
            for draw in table[:, order[start : start + AT_ONCE]].T.tolist():
                yield Draw(*draw)

    def read(self, draw: Draw) -> Row:
        source = self.sources[draw.source]
        return source.row(source.table[draw.row], f"row {draw.row} of {source.name}")


class PairStream:
    """Rows that can only be read one after the other.   buffer: rows among which the next one is drawn"""

    is_stream = True

    def __init__(self, sources: Sequence[PairTable], captions: str = "one", buffer: int = 1000):
        self.sources, self.captions, self.buffer = list(sources), captions, buffer

    @property
    def name(self) -> str:
        return " and ".join(source.name for source in self.sources)

    def _mixed(self, seed: int, is_weighted: bool) -> Any:
        """All sources as one stream of rows, each with its source's number; without weights every row comes once."""
        datasets = import_datasets()
        text, number = datasets.Value("string"), datasets.Value("int64")
        fields = {"source": number, "bytes": datasets.Value("binary"), "path": text, "label": number, "reason": text}
        features = datasets.Features({**fields, "captions": datasets.List(text), "negatives": datasets.List(text)})
        streams = []
        for place, source in enumerate(self.sources):
            given = {"source": source, "place": place}
            streams.append(
                source.table.map(_flatten, fn_kwargs=given, remove_columns=source.columns, features=features)
            )
        if len(streams) == 1:
            return streams[0]
        if not is_weighted or (self.sources[0].weight is None and self.sources[-1].replay is None):
            return datasets.interleave_datasets(streams, stopping_strategy="all_exhausted_without_replacement")
        shares = self._probabilities()
        return datasets.interleave_datasets(streams, shares, seed=seed, stopping_strategy="all_exhausted")

    def _probabilities(self) -> list[float]:
        """Of each source, that the next row is one of its. Without weights there is one that is not replayed."""
        replayed = sum(source.replay or 0.0 for source in self.sources)
        weights = [source.weight or 1.0 for source in self.sources if source.replay is None]
        own = [(1 - replayed) * weight / sum(weights) for weight in weights]
        return own + [source.replay for source in self.sources if source.replay is not None]

    def draws(self, epoch: int, *, seed: int = 0, shuffle: bool = True, first: int = 0) -> Iterator[Draw]:
        """The draws of an epoch from number `first` on, in front of which rows are read and dropped."""
        stream = self._mixed(seed, is_weighted=shuffle)
        if shuffle:
            stream = stream.shuffle(seed=seed, buffer_size=self.buffer)
            stream.set_epoch(epoch)
        return islice(self._expand(stream, epoch), first, None)

    def _expand(self, stream: Any, epoch: int) -> Iterator[Draw]:
        for number, stored in enumerate(stream):
            source = self.sources[stored["source"]]
            image = stored["path"] if stored["bytes"] is None else stored["bytes"]
            where = f" ({stored['path']})" if stored["path"] else ""
            name = f"row {number} that was read of {source.name}{where} in epoch {epoch}"
            row = Row(name, image, stored["captions"], stored["label"], source.places, stored["reason"])
            row.negatives = stored["negatives"]
            count = len(row.captions) if self.captions == "all" and row.captions else 0
            for caption in range(count) if count else [ANY]:
                yield Draw(stored["source"], number, caption, epoch, row)

    def read(self, draw: Draw) -> Row:
        assert draw.stored is not None
        return draw.stored


def _flatten(stored: dict[str, Any], source: PairTable, place: int) -> dict[str, Any]:
    """A row of a stream in the common columns."""
    row = source.row(stored, "")
    image = row.image if isinstance(row.image, dict) else {}
    content = row.image if isinstance(row.image, bytes) else image.get("bytes")
    path = row.image if isinstance(row.image, str) else image.get("path")
    fields = {"source": place, "bytes": content, "path": path, "label": row.label, "reason": row.reason}
    return {**fields, "captions": row.captions, "negatives": row.negatives}


def load_pairs(
    sources: str | Source | Sequence[str | Source],
    *,
    split: str | None = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    negative_caption_column: Sequence[str] = (),
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
        choices = without_columns(features, negative_caption_column)
        images = find_image_column(source.path, features if image_column else choices, image_column)
        texts = find_caption_column(source.path, features if caption_column else choices, caption_column, images)
        reader = CaptionReader(source.path, texts, features)
        negatives = negative_readers(source.path, features, negative_caption_column, images, texts)
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
