"""Groups of images that show the same: copies in other sizes, formats and qualities.

Two images are near duplicates if their embeddings are almost equal, and their perceptual hashes differ in few bits.
Each alone would err: two photos of one beach have close embeddings, and two plain images have close hashes.

All pairs are compared, tile by tile. The hashes come first: a pair of them costs about a twentieth of a pair of
embeddings. Embeddings are compared of the pairs that are left: one by one where these are few. A tile that is full of
them is multiplied as matrices, unless most are in one group already. Memory does not grow with the pairs.

Dimensions: I images, D embedding, N pairs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .set_bits import count_ones

LEAST_SIMILARITY = 0.95
MOST_BITS = 10
"""Of 64. Two unrelated images differ in 32 on average, two sizes of one image in 0 to 4."""

TILE_ROWS, TILE_COLUMNS = 1024, 2048
"""Images that are compared at once."""

STRIP_ROWS = 128
"""Of a tile, whose hashes are compared at once: 2 MB of differences, which stay in the processor's cache."""

MOST_SINGLES = 0.02
"""Of a tile's pairs. If more are near by their hashes, a product of matrices is faster than one pair after another."""

PAIRS_AT_ONCE = 4096


class Groups:
    """Sets of places that belong together, joined pair by pair (union–find).

    Attributes:
        parents: (I,) int64. A place that is its own parent leads its group, and is the smallest of it.
    """

    def __init__(self, count: int):
        self.parents = np.arange(count)

    def leaders(self, places: np.ndarray | slice) -> np.ndarray:
        """The places that lead the groups of some places."""
        found = self.parents[places]
        while True:
            above = self.parents[found]
            if np.array_equal(above, found):
                self.parents[places] = found
                return found
            found = above

    def join(self, pairs: np.ndarray) -> None:
        """Join the groups of both places of each pair (N, 2)."""
        while True:
            found = np.sort(self.leaders(pairs), axis=1)
            pairs = found[found[:, 0] < found[:, 1]]
            if not len(pairs):
                return
            # Each leader is led by one other at once; the next round joins what is left.
            joined, chosen = np.unique(pairs[:, 1], return_index=True)
            self.parents[joined] = pairs[chosen, 0]

    def lists(self) -> list[list[int]]:
        """The groups of more than one place, each in order."""
        leaders = self.leaders(np.arange(len(self.parents)))
        order = np.argsort(leaders, kind="stable")
        starts = np.flatnonzero(np.diff(leaders[order], prepend=-1))
        return [group.tolist() for group in np.split(order, starts[1:]) if len(group) > 1]


def group_duplicates(
    embeddings: Any, hashes: np.ndarray, similarity: float = LEAST_SIMILARITY, bits: int = MOST_BITS
) -> list[list[int]]:
    """Group near duplicates.

    Args:
        embeddings: (I, D), of length one up to float16's rounding; a tensor or an array.
        hashes: (I,) int64 perceptual hashes.
        similarity: Least cosine similarity of two near duplicates.
        bits: Most bits in which their hashes differ.

    Returns:
        Groups of at least two places, each in order, by their first places.
    """
    groups = Groups(len(hashes))
    for first in range(0, len(hashes), TILE_ROWS):
        rows = slice(first, first + TILE_ROWS)
        for start in range(first, len(hashes), TILE_COLUMNS):
            columns = slice(start, start + TILE_COLUMNS)
            is_near = _have_near_hashes(hashes[rows], hashes[columns], bits)
            if start == first:
                is_near = np.triu(is_near, 1)
            if _are_many(is_near):
                is_near &= groups.leaders(rows)[:, None] != groups.leaders(columns)
            if _are_many(is_near):
                products = _widened(embeddings[rows]) @ _widened(embeddings[columns]).T
                pairs = _pairs_in(is_near & np.asarray(products >= similarity), first, start)
            else:
                pairs = _pairs_in(is_near, first, start)
                pairs = pairs[_are_close(embeddings, pairs, similarity)]
            groups.join(pairs)
    return groups.lists()


def _have_near_hashes(rows: np.ndarray, columns: np.ndarray, bits: int) -> np.ndarray:
    """Whether the hashes of two images differ in few bits, for all pairs: (rows, columns)."""
    found = np.empty((len(rows), len(columns)), dtype=bool)
    words = columns.view(np.uint64)
    for first in range(0, len(rows), STRIP_ROWS):
        strip = slice(first, first + STRIP_ROWS)
        np.less_equal(count_ones(rows[strip, None].view(np.uint64) ^ words), bits, out=found[strip])
    return found


def _are_many(tile: np.ndarray) -> bool:
    return bool(np.count_nonzero(tile) > MOST_SINGLES * tile.size)


def _pairs_in(tile: np.ndarray, first: int, start: int) -> np.ndarray:
    """The places (N, 2) of what is true in a tile."""
    found = np.flatnonzero(tile)  # much faster than `np.argwhere`
    return np.stack([found // tile.shape[1] + first, found % tile.shape[1] + start], axis=1)


def _widened(rows: Any) -> Any:
    """Rows in float32: by torch if they are a tensor, which converts float16 faster than numpy."""
    return rows.astype(np.float32) if isinstance(rows, np.ndarray) else rows.float()


def _are_close(embeddings: Any, pairs: np.ndarray, similarity: float) -> np.ndarray:
    """Whether the embeddings of each pair (N, 2) are similar: (N,)."""
    is_close = np.empty(len(pairs), dtype=bool)
    for first in range(0, len(pairs), PAIRS_AT_ONCE):
        part = slice(first, first + PAIRS_AT_ONCE)
        one, other = (_widened(embeddings[places]) for places in pairs[part].T)
        if isinstance(embeddings, np.ndarray):
            products = np.einsum("nd,nd->n", one, other)
        else:
            import torch

            products = torch.einsum("nd,nd->n", one, other).numpy()
        is_close[part] = products >= similarity
    return is_close


def known_hashes(stored: Sequence[int | None]) -> np.ndarray:
    """Perceptual hashes (I,) int64. A missing one becomes a random number, which is near to no other."""
    found = np.random.default_rng(0).integers(-(2**63), 2**63, len(stored), dtype=np.int64)
    for place, value in enumerate(stored):
        if value is not None:
            found[place] = value
    return found


def fold(places: Sequence[int] | np.ndarray, embeddings: Any, hashes: np.ndarray) -> list[tuple[int, list[int]]]:
    """Show each group of near duplicates once, in the place of its best.

    Args:
        places: Places of results in the index, best first.
        embeddings: Of the results, in their order.
        hashes: Of the results, in their order.

    Returns:
        For each result that is shown its position among `places`, and the positions of its near duplicates.
    """
    groups = {group[0]: group[1:] for group in group_duplicates(embeddings, hashes)}
    hidden = {position for others in groups.values() for position in others}
    return [(position, groups.get(position, [])) for position in range(len(places)) if position not in hidden]


__all__ = ["LEAST_SIMILARITY", "MOST_BITS", "fold", "group_duplicates", "known_hashes"]
