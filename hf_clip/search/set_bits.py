"""How many bits of a word are set. A file by itself, since searches that import no torch compare hashes by it."""

import numpy as np

_ONES_OF_16_BITS = (
    np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8)).reshape(2**16, 16).sum(1, dtype=np.uint8)
)


def count_ones_by_table(words: np.ndarray) -> np.ndarray:
    """The number of bits that are set in each word uint64 of an array, by a table: for numpy before 2.0."""
    return _ONES_OF_16_BITS[words.view(np.uint16).reshape(*words.shape, 4)].sum(-1, dtype=np.uint8)


count_ones = getattr(np, "bitwise_count", count_ones_by_table)

__all__ = ["count_ones", "count_ones_by_table"]
