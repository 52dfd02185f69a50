"""Sources brought together: the order in which their rows are drawn.

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

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ...data.columns import column_of, describe_feature, with_fields
from ...data.sources import import_datasets
from .pair_table import ANY, Draw, PairTable, Row

AT_ONCE = 4096


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
