"""Put embeddings of files into an index: no image is opened, so the index has no thumbnails and no sizes of them.

An image is known by its path. What an earlier run put there from files is replaced; what is gone from the files stays.

Dimensions: I images, D embedding.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .embedding_files import StoredEmbeddings
from .embedding_layouts import Shard
from .embedding_place import EmbeddingFilesError
from .index_model import check_model
from .index_table import IndexDescription, IndexTables
from .index_update import IndexChanges, next_free_id

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

ROWS_OF_A_COMMIT = 8192


def check_embeddings(tables: IndexTables, stored: StoredEmbeddings) -> None:
    """Refuse embeddings that cannot be compared with those of an index.

    Raises:
        SearchIndexError: They are of another model, or were made with other settings of the image processor.
        EmbeddingFilesError: Their width is another. Nothing else is known of files that other programs wrote.
    """
    if (made := stored.description) is not None:
        check_model(tables, IndexDescription(made.width, made.weights, made.processor, made.model))
        return  # each shard is compared with this width as it is read
    width = stored.read(0).embeddings.shape[1]
    if width != tables.description.width:
        raise EmbeddingFilesError(
            f"{stored.place.name} holds embeddings of {width} numbers, and the index {tables.place} of "
            f"{tables.description.width}: they are of another model. Name another index.",
            stored.place.name,
        )


def update_from_embeddings(
    tables: IndexTables, stored: StoredEmbeddings, advance: Callable[[int], Any] = lambda count: None
) -> IndexChanges:
    """Put embeddings into an index, some thousand in a commit.

    Args:
        tables: The index.
        stored: The embeddings; see `check_embeddings`.
        advance: Called with a number of images as they are written.

    Raises:
        EmbeddingFilesError: A file is missing or damaged. What was read before it stays in the index.
    """
    note = f"embeddings {stored.place.name}"
    known = tables.rows(["id", "path"], "size IS NULL AND content IS NULL")
    ids = dict(zip(known["path"].to_pylist(), known["id"].to_pylist(), strict=True))
    if stored.fingerprint and tables.noted(note) == stored.fingerprint:
        return IndexChanges(unchanged=stored.rows or 0)
    next_id = next_free_id(tables)
    changes, width = IndexChanges(), tables.description.width
    for number, shard in enumerate(stored):
        if shard.embeddings.shape[1] != width:
            raise EmbeddingFilesError(
                f"A file of {stored.place.name} holds embeddings of {shard.embeddings.shape[1]} numbers, and others "
                f"{width}: they do not belong together.",
                stored.place.name,
            )
        for first in range(0, len(shard), ROWS_OF_A_COMMIT):
            places = range(first, min(first + ROWS_OF_A_COMMIT, len(shard)))
            vectors = np.asarray(shard.embeddings[first : places.stop], dtype=np.float32)
            with np.errstate(over="ignore"):  # a length that is not finite is told below
                lengths = np.linalg.norm(vectors, axis=1)
            is_usable = np.isfinite(lengths) & (lengths > 0)
            chosen: dict[str, int] = {}  # a path that comes twice counts once
            for place in places:
                path = shard.paths[place] or f"{stored.place.name}#{number}.{place}"
                if is_usable[place - first]:
                    chosen[path] = place
                else:
                    changes.problems[path] = "its embedding is zero or not finite"
            is_new = [path not in ids for path in chosen]
            for path in chosen:
                if path not in ids:
                    ids[path], next_id = next_id, next_id + 1
            rows = np.fromiter(chosen.values(), dtype=np.int64, count=len(chosen))
            scaled = vectors[rows - first] / lengths[rows - first, None]
            table = _as_table(tables, [ids[path] for path in chosen], list(chosen), shard, rows, scaled)
            mask = np.array(is_new, dtype=bool)
            tables.add_table(table.filter(mask))
            tables.put_table(table.filter(~mask))
            changes.added, changes.updated = changes.added + sum(is_new), changes.updated + len(chosen) - sum(is_new)
            advance(len(places))
    if stored.fingerprint:
        tables.note(note, stored.fingerprint)
    return changes


def _as_table(
    tables: IndexTables, ids: list[int], paths: list[str], shard: Shard, rows: np.ndarray, vectors: np.ndarray
) -> "pyarrow.Table":
    import pyarrow as pa

    schema = tables.images.schema
    flat = pa.array(vectors.astype(np.float16).reshape(-1), pa.float16())
    columns = {
        "id": ids,
        "path": paths,
        "path_bytes": [path.encode() for path in paths],
        "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        "caption": [shard.captions[row] for row in rows],
        "metadata": [shard.metadata[row] for row in rows],
    }
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(len(ids), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


__all__ = ["check_embeddings", "update_from_embeddings"]
