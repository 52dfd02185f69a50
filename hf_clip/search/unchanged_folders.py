"""A folder in which nothing has changed since it was indexed, known without opening the index.

What an index's tables were after an update, and what its folders held then, stand in one file of the index:

    INDEX/unchanged.json    a digest of the tables' versions, and of each folder's files with their sizes and times

If both are as they were, an update would find nothing to do, and its result is known. LanceDB, whose import takes
seconds, is not needed then. Each commit of LanceDB adds a file to `TABLE.lance/_versions`, whoever makes it: it ends
what is known, and so does a file that was added, written anew or removed. An index on object storage has no such file.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.whole_file import whole_file
from .folder_scan import FolderScan
from .index_model import model_files
from .index_table import FORMAT, IMAGES, NOTES, PROBLEMS, is_address
from .index_update import IndexChanges

NAME = "unchanged.json"


@dataclass
class UnchangedFolders:
    """What is known of an index while its tables are as they were.

    Attributes:
        tables: Digest of the tables' versions.
        images: How many images there are.
        folders: The folders that the index knows.
        model_files: See `model_files`.
        updated: Folder that was brought up to date → digest of its files, their number, and the problems of some.
        format: Number of the index's layout.
    """

    tables: str
    images: int
    folders: list[str]
    model_files: list[list[Any]] | None
    updated: dict[str, tuple[str, int, dict[str, str]]] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, place: str) -> "UnchangedFolders | None":
        """Read what is known of an index. None if its tables have changed since, or nothing is known."""
        try:
            known = cls(**json.loads((Path(place) / NAME).read_text(encoding="utf-8")))
            return known if known.format == FORMAT and known.tables == digest_of_tables(place) else None
        except (OSError, ValueError, TypeError):
            return None

    def changes(self, scan: FolderScan, model: str | None = None) -> IndexChanges | None:
        """What an update with a folder would return. None if it has to be made.

        Args:
            scan: The folder.
            model: The model that was named. None: that of the index.
        """
        digest, count, problems = self.updated.get(scan.folder, ("", 0, {}))
        if digest != _digest_of_files(scan):
            return None
        if model is not None and not (self.model_files and model_files(model) == self.model_files):
            return None
        return IndexChanges(unchanged=count, problems=dict(problems))


def remember_unchanged(
    place: str, scan: FolderScan, changes: IndexChanges, *, images: int, folders: list[str], model: Any
) -> None:
    """Note that a folder is up to date.

    Args:
        place: The index.
        scan: The folder, as it was compared.
        changes: What the update did. If it kept images whose files are gone, or met files that could not be read and
            may be by now, nothing is noted; nor if a file changed so lately that it may change again unseen.
        images: How many images the index has.
        folders: The folders that the index knows.
        model: The note of the model's files.
    """
    if is_address(place):
        return
    before = UnchangedFolders.read(place)  # none if this update has changed the tables
    known = UnchangedFolders(digest_of_tables(place), images, folders, model, before.updated if before else {})
    known.updated.pop(scan.folder, None)
    if not (changes.kept or changes.unread) and all(map(scan.is_settled, scan.files)):
        count = changes.unchanged + changes.added + changes.updated + changes.moved
        known.updated[scan.folder] = (_digest_of_files(scan), count, changes.problems)
    with suppress(OSError), whole_file(Path(place) / NAME) as unfinished:  # it saves time, and nothing else
        unfinished.write_text(json.dumps(asdict(known)), encoding="utf-8")


def digest_of_tables(place: str) -> str:
    """A digest of the versions of an index's tables. Any commit changes it."""
    state = hashlib.blake2b(digest_size=16)
    for table in (IMAGES, PROBLEMS, NOTES):
        with os.scandir(Path(place) / f"{table}.lance" / "_versions") as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                found = entry.stat()
                state.update(f"{table} {entry.name} {found.st_size} {found.st_mtime_ns}\0".encode())
    return state.hexdigest()


def _digest_of_files(scan: FolderScan) -> str:
    state = hashlib.blake2b(digest_size=16)
    for file in scan.files:
        state.update(os.fsencode(file.path) + f"\0{file.size} {file.mtime_ns} {file.ctime_ns}\0".encode())
    for place, problem in sorted(scan.unread.items()):
        state.update(os.fsencode(place) + f"\0{problem}\0".encode())
    return state.hexdigest()


__all__ = ["UnchangedFolders", "digest_of_tables", "remember_unchanged"]
