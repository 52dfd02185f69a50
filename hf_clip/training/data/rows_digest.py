"""A short name of the rows of tables, by what they hold.

Captions, labels and the paths of images count with every letter, images with the number of their bytes. The bytes
themselves count for some rows at even distances: to read all images at every start would take as long as training. So a
copy of the data has the same name, and data that were written anew nearly always have another.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

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
    for batch in source.table.with_format("arrow").iter(AT_ONCE):
        for name in source.columns:
            yield repr(_outline(batch.column(name).combine_chunks())).encode(errors="surrogatepass")
    places = np.unique(np.linspace(0, len(source.rows) - 1, min(READ, len(source.rows))).astype(int))
    for row in source.rows[places].tolist():
        stored = source.row(source.table[row], "").image
        content = stored.get("bytes") if isinstance(stored, dict) else stored
        if isinstance(content, bytes):
            yield hashlib.blake2b(content).digest()


def _outline(column: Any) -> Any:
    """What stands in an Arrow column, with the lengths of bytes in place of the bytes."""
    from pyarrow import compute, types  # type: ignore[import-untyped]

    if types.is_binary(column.type) or types.is_large_binary(column.type):
        return compute.binary_length(column).to_pylist()
    if types.is_struct(column.type):
        return [column.is_null().to_pylist(), *map(_outline, column.flatten())]
    return column.to_pylist()


__all__ = ["digest_of_rows"]
