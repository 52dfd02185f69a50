"""A short name of the rows of tables, by what they hold.

Captions, labels, and the paths and addresses of images count with every letter. An image within the table counts with
the number of its bytes, a file of this machine with its size and the time when it was last written. The bytes
themselves count for some rows at even distances: to read all images at every start would take as long as training.

So data that were written anew nearly always have another name, and files whose times were not kept in a copy have
another too. What lies on the web or in another file system counts with its address alone.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ...data.columns import UnusableRowError
from ...data.images import find_local_file, image_content
from .pair_table import PairTable
from .pairs import Pairs

READ = 256
"""Rows whose images count with all bytes."""
AT_ONCE = 1024


def digest_of_rows(pairs: Pairs) -> list[dict[str, Any]]:
    """What each source's rows are, in words and digests.

    Args:
        pairs: Whose rows count that are drawn.
    """
    return [_describe(source) for source in pairs.sources]


def _describe(source: PairTable) -> dict[str, Any]:
    found = hashlib.blake2b(digest_size=16)
    for part in _contents(source):
        found.update(part)
    return {
        "image_column": source.image_column,
        "captions": source.captions.column,
        "rows": len(source.rows),
        "digest": found.hexdigest(),
    }


def _contents(source: PairTable) -> Iterator[bytes]:
    yield source.rows.astype("<i8").tobytes()
    for names in source.captions.names.values():
        yield repr(names).encode(errors="surrogatepass")
    is_drawn = np.zeros(len(source.table), dtype=bool)
    is_drawn[source.rows] = True
    for number, batch in enumerate(source.table.with_format("arrow").iter(AT_ONCE)):
        for name in source.columns:
            yield repr(_outline(batch.column(name).combine_chunks())).encode(errors="surrogatepass")
        paths = _paths(source, batch)
        drawn = np.flatnonzero(is_drawn[number * AT_ONCE : (number + 1) * AT_ONCE])
        yield repr([_state(paths[place], source) for place in drawn.tolist()] if paths else []).encode()
    places = np.unique(np.linspace(0, len(source.rows) - 1, min(READ, len(source.rows))).astype(int))
    for row in source.rows[places].tolist():
        stored = source.row(source.table[row], "").image
        path = stored.get("path") if isinstance(stored, dict) and stored.get("bytes") is None else stored
        if isinstance(path, str) and _local_file(path, source) is None:
            continue
        with suppress(UnusableRowError):
            yield hashlib.blake2b(image_content(stored, source.places)).digest()


def _paths(source: PairTable, batch: Any) -> list[Any]:
    """Of each row of an Arrow table the path or address of its image, None where its bytes are there."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import compute, types

    holder = source.image_holder or source.image_column
    column = batch.column(holder).combine_chunks()
    if holder != source.image_column:
        column = compute.struct_field(column, source.image_column.split(".")[1:])
    names = [each.name for each in column.type] if types.is_struct(column.type) else []
    if "path" in names:
        paths = compute.struct_field(column, "path")
        if "bytes" in names:
            has_bytes = compute.struct_field(column, "bytes").is_valid()
            paths = compute.if_else(has_bytes, pa.scalar(None, paths.type), paths)
        column = paths
    return column.to_pylist() if types.is_string(column.type) or types.is_large_string(column.type) else []


def _local_file(path: str, source: PairTable) -> Path | None:
    """The file of this machine that holds an image, such as an archive; None where there is none that may be opened."""
    target = path.rpartition("::")[2] if "://" in path else path
    if "://" in target and not target.startswith("file://"):
        return None
    try:
        return find_local_file(target, source.places)
    except (OSError, ValueError):  # it is missing, or no name of a file
        return None


def _state(path: Any, source: PairTable) -> tuple[int, int] | None:
    """Size of a file and when it was written, in nanoseconds."""
    file = _local_file(path, source) if isinstance(path, str) and path else None
    try:
        found = None if file is None else file.stat()
    except OSError:
        return None
    return None if found is None else (found.st_size, found.st_mtime_ns)


def _outline(column: Any) -> Any:
    """What stands in an Arrow column, with the lengths of bytes in place of the bytes."""
    from pyarrow import compute, types

    if types.is_binary(column.type) or types.is_large_binary(column.type):
        return compute.binary_length(column).to_pylist()
    if types.is_struct(column.type):
        return [column.is_null().to_pylist(), *map(_outline, column.flatten())]
    return column.to_pylist()


__all__ = ["digest_of_rows"]
