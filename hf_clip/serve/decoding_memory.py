"""Bound what all images that are decoded at the same time take in memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DecodingMemory:
    """Counts the bytes of images that are decoded. Who finds no room waits, and is served in its turn.

    Args:
        most: Bytes that are allowed together. An image that alone has more is decoded when no other one is.
    """

    def __init__(self, most: int):
        self._most, self.held = most, 0
        self._turn, self._room = threading.Lock(), threading.Condition()

    @contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Hold so many bytes while the `with` block runs. Threads that come later wait behind one that waits."""
        with self._turn, self._room:
            self._room.wait_for(lambda: not self.held or self.held + count <= self._most)
            self.held += count
        try:
            yield
        finally:
            with self._room:
                self.held -= count
                self._room.notify()


__all__ = ["DecodingMemory"]
