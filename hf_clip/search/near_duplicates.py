"""Groups of images that show the same: copies in other sizes, formats and qualities.

Two images are near duplicates if their embeddings are almost equal, and their perceptual hashes differ in few bits.
Each alone would err: two photos of one beach have close embeddings, and two plain images have close hashes.

Dimensions: I images, D embedding.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .indexed_image import hamming_distances

LEAST_SIMILARITY = 0.95
MOST_BITS = 10
"""Of 64. Two unrelated images differ in 32 on average, two sizes of one image in 0 to 4."""

ROWS_AT_ONCE = 1024


class Groups:
    """Sets of places that belong together, joined pair by pair (union–find)."""

    def __init__(self, count: int):
        self.parents = list(range(count))

    def find(self, place: int) -> int:
        while self.parents[place] != place:
            self.parents[place] = self.parents[self.parents[place]]
            place = self.parents[place]
        return place

    def join(self, first: int, second: int) -> None:
        """Join the groups of two places; the smaller place leads."""
        first, second = sorted((self.find(first), self.find(second)))
        self.parents[second] = first

    def lists(self) -> list[list[int]]:
        """The groups of more than one place, each in order."""
        found: dict[int, list[int]] = defaultdict(list)
        for place in range(len(self.parents)):
            found[self.find(place)].append(place)
        return [group for group in found.values() if len(group) > 1]


def group_duplicates(
    embeddings: Tensor, hashes: np.ndarray, similarity: float = LEAST_SIMILARITY, bits: int = MOST_BITS
) -> list[list[int]]:
    """Group near duplicates.

    Args:
        embeddings: (I, D), of length one up to float16's rounding.
        hashes: (I,) int64 perceptual hashes.
        similarity: Least cosine similarity of two near duplicates.
        bits: Most bits in which their hashes differ.

    Returns:
        Groups of at least two places, each in order, by their first places.
    """
    groups = Groups(len(embeddings))
    for first in range(0, len(embeddings), ROWS_AT_ONCE):
        rows = embeddings[first : first + ROWS_AT_ONCE].float()
        for start in range(first, len(embeddings), ROWS_AT_ONCE):
            columns = embeddings[start : start + ROWS_AT_ONCE].float()
            close = (rows @ columns.T >= similarity).nonzero().numpy() + np.array([first, start])
            close = close[close[:, 0] < close[:, 1]]
            differing = hamming_distances(hashes[close[:, 0]], hashes[close[:, 1]])
            for one, other in close[differing <= bits].tolist():
                groups.join(one, other)
    return groups.lists()


def known_hashes(stored: Sequence[int | None]) -> np.ndarray:
    """Perceptual hashes (I,) int64. A missing one becomes a random number, which is near to no other."""
    found = np.random.default_rng(0).integers(-(2**63), 2**63, len(stored), dtype=np.int64)
    for place, value in enumerate(stored):
        if value is not None:
            found[place] = value
    return found


def fold(places: Tensor, embeddings: Tensor, hashes: np.ndarray) -> list[tuple[int, list[int]]]:
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
