"""An index that is opened when something has changed, and not before.

Opening takes seconds, since it imports LanceDB. What an index noted at its last update (`unchanged_folders`) tells
without it that a folder is up to date, so most updates of most people need not wait.
"""

from typing import Any

from .folder_scan import FolderScan
from .index_update import IndexChanges
from .unchanged_folders import UnchangedFolders
from .updatable_index import UpdatableIndex


class LateIndex:
    """An index that is brought up to date, and opened when that is needed.

    Args:
        place: The index.
        model: The model that was named. None: that of the index.
        dtype: The name of the dtype to compute in.
        exact: Whether large JPEGs are decoded in full. Whether they were stands in the tables, so the index is opened.
        takes_embeddings: Whether embeddings will be added, for which it is opened.
    """

    def __init__(self, place: str, *, model: str | None, dtype: str, exact: bool, takes_embeddings: bool):
        self.place, self.model, self.dtype, self.exact = place, model, dtype, exact
        self._opened: UpdatableIndex | None = None
        self._noted = None if exact or takes_embeddings else UnchangedFolders.read(place)
        if self._noted is None:
            self.open()

    @property
    def is_open(self) -> bool:
        """Whether the index has been opened."""
        return self._opened is not None

    def open(self) -> UpdatableIndex:
        """Open the index if it is not open, and return it."""
        if self._opened is None:  # one without images is false
            self._opened = UpdatableIndex.open(self.place, model=self.model, dtype=self.dtype)
        return self._opened

    @property
    def folders(self) -> list[str]:
        """The folders and data sets that the index knows."""
        return self.open().tables.noted("folders", []) if self._noted is None else self._noted.folders

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.open()) if self._noted is None or self.is_open else self._noted.images

    def add(self, scan: FolderScan, **how: Any) -> IndexChanges:
        """Bring the index up to date with a folder, see `UpdatableIndex.add`. It is opened if anything has changed."""
        changes = self._noted.changes(scan, self.model) if self._noted is not None else None
        if changes is None:
            changes = self.open().add(scan, exact=self.exact, **how)
            self._read_notes()
        return changes

    def add_data_set(self, source: str, **how: Any) -> IndexChanges:
        """Bring the index up to date with a data set, see `UpdatableIndex.add_data_set`. It is opened."""
        changes = self.open().add_data_set(source, exact=self.exact, **how)
        self._read_notes()
        return changes

    def _read_notes(self) -> None:
        """Read what is noted now: an update has ended what was noted before."""
        self._noted = None if self.exact else UnchangedFolders.read(self.place)


__all__ = ["LateIndex"]
