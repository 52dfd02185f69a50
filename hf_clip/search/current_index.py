"""An index that is open for long, and removed, made anew or updated meanwhile by other processes."""

from ..inference.computing_thread import ComputingThread
from .image_index import ImageIndex
from .index_model import check_model
from .index_table import IndexTables, is_address, made_at


class CurrentIndex:
    """An index as it is now. One thread at a time may ask for it and use it, since it reads itself anew.

    Args:
        index: The index, with its model in memory.
        computing: The thread that compares queries with all images. None: the one that searches.
    """

    def __init__(self, index: ImageIndex, computing: ComputingThread | None = None):
        self._index = index
        self._index.computing = self._computing = computing

    @property
    def place(self) -> str:
        """Its folder or address."""
        return self._index.tables.place

    def get(self) -> ImageIndex:
        """The index with all that was written since; opened again where another one was made in its place.

        Raises:
            SearchIndexError: It is gone or damaged, or the new one is of another model.
        """
        place = self.place
        if is_address(place) or made_at(place) == self._index.tables.made_at:
            self._index.tables.refresh()
            return self._index
        tables = IndexTables.open(place)
        check_model(tables, self._index.tables.description)
        self._index = ImageIndex(tables, self._index.model, self._index.processor)
        self._index.computing = self._computing
        return self._index


__all__ = ["CurrentIndex"]
