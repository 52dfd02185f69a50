"""Features that were computed before training, looked up by the draws of a run.

They stay on the disk, from where the system reads what a batch asks for. What is in memory is a few numbers of each
row. In a worker process that does not share this one's memory they are opened anew.

Dimensions: B batch, W width of a feature.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.columns import UnusableRowError
from .collator import EMPTY
from .feature_shards import FeatureShards
from .pair_table import ANY, Draw


class StoredFeatures:
    """The features of the rows of one `Pairs`.

    Args:
        shards: All of which are written.

    Attributes:
        ids: (entries,) int64, see `feature_shards`.
        is_cut: (entries,) bool.
    """

    def __init__(self, shards: FeatureShards):
        self.shards = shards
        parts = [shards.read(number) for number in range(len(shards))]
        self._views = [part.views for part in parts]
        self._bounds = np.cumsum([0, *(len(part.rows) for part in parts)])  # of the shards' entries
        self.ids, self.is_cut, sources, rows = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "is_cut", "sources", "rows")
        )
        reasons = [reason for part in parts for reason in part.reasons]
        self._reasons = {entry: reason for entry, reason in enumerate(reasons) if reason is not None}
        self._is_usable = np.ones(len(reasons), dtype=bool)
        self._is_usable[list(self._reasons)] = False
        is_first = np.ones(len(rows), dtype=bool)  # of its row, whose entries follow each other
        is_first[1:] = (rows[1:] != rows[:-1]) | (sources[1:] != sources[:-1])
        starts = np.flatnonzero(is_first)
        self._counts = np.diff(starts, append=len(rows))
        self._starts = starts
        self._places = []  # of each source: row → its place among `_starts`
        for source in range(int(sources.max()) + 1):
            places = np.flatnonzero(sources[starts] == source)
            of_source = rows[starts[places]]
            lookup = np.full(int(of_source.max()) + 1 if len(of_source) else 0, -1, dtype=np.int64)
            lookup[of_source] = places
            self._places.append(lookup)

    def __reduce__(self) -> tuple[type, tuple[FeatureShards]]:
        return type(self), (self.shards,)

    def entry(self, draw: Draw, place: int = 0) -> int:
        """The number of an entry.

        Args:
            draw: Of its row.
            place: Of a caption in its row.

        Raises:
            UnusableRowError: It has no features.
        """
        number = self._places[draw.source][draw.row]
        # A row without any caption that can be used has one entry, however many captions it has.
        entry = int(self._starts[number]) + (place if place < self._counts[number] else 0)
        if entry in self._reasons:
            raise UnusableRowError(self._reasons[entry])
        return entry

    def entries(self, sources: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """The entries of rows with one entry each, (B,); None where one has several, or has no features.

        Args:
            sources, rows: (B,) of the draws.
        """
        numbers = np.empty(len(rows), dtype=np.int64)
        for source in range(len(self._places)):
            is_of = sources == source
            numbers[is_of] = self._places[source][rows[is_of]]
        found = self._starts[numbers]
        return found if bool((self._counts[numbers] == 1).all() and self._is_usable[found].all()) else None

    def spoken(self, draw: Draw) -> list[int]:
        """The places of a row's captions that are not empty, of which there is at least one."""
        row = self._places[draw.source][draw.row]
        count, first = int(self._counts[row]), int(self._starts[row])
        if count == 1:
            return [0]
        return [place for place in range(count) if self._reasons.get(first + place) != EMPTY] or [0]

    def gather(self, entries: list[int], rounds: list[int]) -> Tensor:
        """The features of some entries.

        Args:
            entries: Their numbers.
            rounds: How often the source of each was gone through before, which decides what view is taken.

        Returns:
            (B, W), float32.
        """
        shards = np.searchsorted(self._bounds, np.asarray(entries), side="right") - 1
        found = np.empty((len(entries), self.shards.width), dtype=np.float32)
        count = self.shards.views
        for place, (entry, shard, number) in enumerate(zip(entries, shards.tolist(), rounds, strict=True)):
            found[place] = self._views[shard][number % count][entry - self._bounds[shard]]
        return torch.from_numpy(found)


def choose_place(features: StoredFeatures, draw: Draw, seed: tuple[int, ...]) -> int:
    """The caption that is drawn, as it would be from the texts themselves.

    Args:
        features: Of captions.
        draw: Of the row.
        seed: Of what is drawn for it.
    """
    if draw.caption != ANY:
        return draw.caption
    spoken = features.spoken(draw)
    return spoken[0] if len(spoken) == 1 else spoken[int(np.random.default_rng(seed).integers(len(spoken)))]


def labels_of(source: Any) -> np.ndarray | None:
    """The labels of all rows of a `PairTable` that carries some along; those that are missing are -1."""
    if source.label_column is None:
        return None
    column = source.table.select_columns([source.label_column]).with_format("arrow")[:].column(0)
    return column.fill_null(-1).to_numpy()


__all__ = ["StoredFeatures", "choose_place", "labels_of"]
