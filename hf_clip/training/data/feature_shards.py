"""Features of rows on disk: columns that `datasets` reads, in shards that are written whole or not at all.

    FOLDER/description.json    what the features were made of; FOLDER is named by a digest of it
    FOLDER/00000/features.arrow, SHA256SUMS
    FOLDER/00001/...

Shard n has rows n · 1,024 to (n + 1) · 1,024 − 1 of all. A row has one entry (an image), or several (its captions). The
columns of an entry::

    source, row     int64              where it comes from
    place           int64              which of the row's captions it is; 0 for an image
    id              int64              `content_id` of the image, `tokens_id` of the caption
    is_cut          bool               whether the caption was longer than the model takes
    reason          string             why it has no features; null where it has
    view_0, ...     W float32 each     the features; of several views of an image one column each

Invariant: a shard that has its name is whole, and its checksum tells whether it still is. What a shard holds depends
on its rows alone, not on the processes that computed it or on what was computed before.

Dimensions: W width of a feature.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.whole_file import write_json
from ...checkpoints.whole_folder import DiskFullError, free_bytes
from ...data.sources import import_datasets
from ...model.checked_files import read_json
from ..checksums import UNFINISHED, check_checksums, checked_folder

ROWS = 1024
"""Of a shard: what a killed computation loses at most, for each process."""

DESCRIPTION = "description.json"
FILE = "features.arrow"
BESIDES = 64
"""Bytes of an entry beside its features, about."""

logger = logging.getLogger(__name__)


@dataclass
class Entries:
    """Some entries with their features.

    Attributes:
        sources, rows, places, ids: (entries,) int64.
        is_cut: (entries,) bool.
        reasons: of each, why it has no features, or None.
        views: (entries, W) float32 each; zeros where there are no features.
    """

    sources: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    ids: np.ndarray
    is_cut: np.ndarray
    reasons: list[str | None]
    views: list[np.ndarray]


class FeatureShards:
    """The shards of one folder.

    Attributes:
        folder: Where they lie, by an absolute path.
        description: What the features are made of.
        rows: How many there are in all.
        width: W.
        views: Of each image.
    """

    def __init__(self, root: str | Path, kind: str, description: dict[str, Any], rows: int, width: int, views: int):
        self.description, self.rows, self.width, self.views = description, rows, width, views
        self.folder = Path(root).resolve() / f"{kind}-{digest_of(description)}"

    def __len__(self) -> int:
        return -(-self.rows // ROWS)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05}"

    def prepare(self) -> list[int]:
        """Make the folder, and find out which shards are missing. Damaged ones are removed with a warning.

        Raises:
            DiskFullError: There is no room for those that are missing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".*{UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)
        if not self._is_described():
            for path in self.folder.glob("[0-9]*"):
                shutil.rmtree(path)
            write_json(self.folder / DESCRIPTION, self.description)
        missing = [number for number in range(len(self)) if not self._is_whole(number)]
        needed = len(missing) * ROWS * self.views * (4 * self.width + BESIDES)
        free = free_bytes(self.folder)
        if free is not None and free < needed:
            raise DiskFullError(self.folder, needed, free)
        return missing

    def _is_described(self) -> bool:
        try:
            return read_json(self.folder / DESCRIPTION) == self.description
        except (OSError, ValueError, RecursionError):
            return False

    def _is_whole(self, number: int) -> bool:
        path = self.path(number)
        if not path.is_dir():
            return False
        try:
            check_checksums(path)
        except (OSError, ValueError) as error:
            logger.warning("The stored features %s are damaged (%s); they are computed again.", path, error)
            shutil.rmtree(path)
            return False
        return True

    def write(self, number: int, entries: Entries) -> None:
        """Write a shard, which is on the disk when it has its name.

        Raises:
            DiskFullError: There is no room; nothing of it is left.
        """
        with checked_folder(self.path(number)) as unfinished:
            _write_table(unfinished / FILE, entries, self.width)

    def reasons(self, number: int) -> list[str]:
        """Why entries of a shard have no features, of each that has none."""
        found = import_datasets().Dataset.from_file(str(self.path(number) / FILE)).with_format("arrow")
        return found.data.column("reason").drop_null().to_pylist()

    def read(self, number: int) -> Entries:
        """Read a shard. Its features stay on the disk until they are asked for."""
        table = import_datasets().Dataset.from_file(str(self.path(number) / FILE)).with_format("arrow")[:]
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        sources, rows, places, ids, is_cut = (
            columns[name].to_numpy(zero_copy_only=False) for name in ("source", "row", "place", "id", "is_cut")
        )
        views = [
            columns[f"view_{view}"].flatten().to_numpy().reshape(len(table), self.width) for view in range(self.views)
        ]
        return Entries(sources, rows, places, ids, is_cut, columns["reason"].to_pylist(), views)


def digest_of(description: dict[str, Any]) -> str:
    """A short name of what features are made of."""
    text = json.dumps(description, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _write_table(path: Path, entries: Entries, width: int) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]

    datasets = import_datasets()
    columns: dict[str, Any] = {
        "source": pa.array(entries.sources, pa.int64()),
        "row": pa.array(entries.rows, pa.int64()),
        "place": pa.array(entries.places, pa.int64()),
        "id": pa.array(entries.ids, pa.int64()),
        "is_cut": pa.array(entries.is_cut, pa.bool_()),
        "reason": pa.array(entries.reasons, pa.string()),
    }
    kinds = {"source": "int64", "row": "int64", "place": "int64", "id": "int64", "is_cut": "bool", "reason": "string"}
    features: dict[str, Any] = {name: datasets.Value(kind) for name, kind in kinds.items()}
    for view, values in enumerate(entries.views):
        flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
        columns[f"view_{view}"] = pa.FixedSizeListArray.from_arrays(flat, width)
        features[f"view_{view}"] = datasets.List(datasets.Value("float32"), length=width)
    schema = datasets.Features(features).arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))


def joined(parts: Sequence[Entries]) -> Entries:
    """Several entries one behind the other."""
    return Entries(
        np.concatenate([part.sources for part in parts]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.places for part in parts]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.is_cut for part in parts]),
        [reason for part in parts for reason in part.reasons],
        [np.concatenate(columns) for columns in zip(*(part.views for part in parts), strict=True)],
    )


__all__ = ["ROWS", "Entries", "FeatureShards", "digest_of", "joined"]
