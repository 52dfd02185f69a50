"""Shards of embeddings as files: parquet, safetensors with parquet beside, and the layout of clip-retrieval.

    parquet          OUT/embeddings-00000.parquet        id, path, caption, metadata, embedding, text_embedding
    safetensors      OUT/embeddings-00000.safetensors    embedding, text_embedding
                     OUT/rows-00000.parquet              id, path, caption, metadata
    clip-retrieval   OUT/img_emb/img_emb_00000.npy
                     OUT/text_emb/text_emb_00000.npy
                     OUT/metadata/metadata_00000.parquet image_path, caption, and the other columns by their names

`id` is the row's place in the source, which images that cannot be opened keep for themselves. `metadata` is JSON. A row
without a caption has no text embedding: null in parquet, zeros elsewhere.

Dimensions: I images of a shard, D embedding.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..model.checked_files import one_line
from .embedding_place import EmbeddingFilesError, FilePlace

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

LAYOUTS = ("parquet", "safetensors", "clip-retrieval")
DTYPES = ("float16", "float32")

IMAGES, TEXTS = "embedding", "text_embedding"
OF_CLIP_RETRIEVAL = ("image_path", "caption", "metadata")
PATHS = ("image_path", "path", "url", "key")
"""Columns of clip-retrieval's metadata that say where an image is, the best first."""


@dataclass(frozen=True)
class Shard:
    """Embeddings of some images.

    Attributes:
        ids: (I,) int64, places in the source.
        paths: Of the images.
        captions: Captions, or None.
        metadata: Other columns, as JSON, or None.
        embeddings: (I, D).
        text_embeddings: (I, D), zeros where there is no caption; or None.
    """

    ids: np.ndarray
    paths: list[str]
    captions: list[str | None]
    metadata: list[str | None]
    embeddings: np.ndarray
    text_embeddings: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)


def files_of(layout: str, number: int, has_texts: bool) -> list[str]:
    """The names of a shard's files."""
    if layout == "parquet":
        return [f"embeddings-{number:05}.parquet"]
    if layout == "safetensors":
        return [f"embeddings-{number:05}.safetensors", f"rows-{number:05}.parquet"]
    texts = [f"text_emb/text_emb_{number:05}.npy"] if has_texts else []
    return [f"img_emb/img_emb_{number:05}.npy", *texts, f"metadata/metadata_{number:05}.parquet"]


def write_shard(layout: str, number: int, shard: Shard, dtype: str) -> dict[str, bytes]:
    """A shard's files: names and contents."""
    arrays = {IMAGES: shard.embeddings.astype(dtype)}
    if shard.text_embeddings is not None:
        arrays[TEXTS] = shard.text_embeddings.astype(dtype)
    names = files_of(layout, number, TEXTS in arrays)
    if layout == "parquet":
        return {names[0]: _parquet(_row_table(shard, arrays))}
    if layout == "safetensors":
        from safetensors.numpy import save

        return {names[0]: save(arrays), names[1]: _parquet(_row_table(shard, {}))}
    contents = [_npy(array) for array in arrays.values()]
    return dict(zip(names, [*contents, _parquet(_metadata_table(shard))], strict=True))


def read_shard(
    place: FilePlace, layout: str, names: list[str], contents: Mapping[str, bytes] = MappingProxyType({})
) -> Shard:
    """Read a shard of its files.

    Args:
        place: Where they are.
        layout: How they are written.
        names: The shard's files.
        contents: What is in memory of them already. Others are read.

    Raises:
        EmbeddingFilesError: A file is missing or damaged, or their lengths differ.
    """
    if layout == "parquet":
        table = read_parquet(place, names[0], contents.get(names[0]))
        shard = _of_table(place.path(names[0]), table, _vectors(place.path(names[0]), table, IMAGES, True))
    elif layout == "safetensors":
        arrays = _tensors(place, names[0], contents.get(names[0]))
        table = read_parquet(place, names[1], contents.get(names[1]))
        shard = _of_table(place.path(names[0]), table, arrays[IMAGES], arrays.get(TEXTS))
    else:
        images, *texts = (read_npy(place, name, contents.get(name)) for name in names[:-1])
        table = read_parquet(place, names[-1], contents.get(names[-1]))
        shard = _of_metadata(place.path(names[0]), table, images, texts[0] if texts else None)
    return shard


def _row_table(shard: Shard, arrays: dict[str, np.ndarray]) -> "pyarrow.Table":
    import pyarrow as pa

    columns = {"id": pa.array(shard.ids, pa.int64()), "path": pa.array(shard.paths, pa.string())}
    columns |= {
        name: pa.array(getattr(shard, kind), pa.string())
        for name, kind in (("caption", "captions"), ("metadata", "metadata"))
    }
    for name, array in arrays.items():
        missing = pa.array([name == TEXTS and caption is None for caption in shard.captions])
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1], mask=missing)
    return pa.table(columns)


def _metadata_table(shard: Shard) -> "pyarrow.Table":
    """The table that clip-retrieval reads: `image_path`, `caption`, and the columns that the metadata name."""
    import pyarrow as pa

    columns: dict[str, Any] = {"image_path": pa.array(shard.paths, pa.string())}
    columns["caption"] = pa.array(shard.captions, pa.string())
    rows = [json.loads(text) if text else {} for text in shard.metadata]
    for name in dict.fromkeys(name for row in rows for name in row if name not in OF_CLIP_RETRIEVAL):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # of several types
            columns[name] = pa.array([None if value is None else str(value) for value in values], pa.string())
    return pa.table(columns)


def _parquet(table: "pyarrow.Table") -> bytes:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    file = BytesIO()
    # Neither a dictionary nor a compression makes embeddings much smaller, and both take time.
    others = [name for name in table.column_names if name not in (IMAGES, TEXTS)]
    pq.write_table(
        table,
        file,
        compression={name: "zstd" if name in others else "none" for name in table.column_names},
        use_dictionary=others,
    )
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def read_parquet(place: FilePlace, name: str, content: bytes | None = None) -> "pyarrow.Table":
    """A parquet file, of its content if that is given. Raises EmbeddingFilesError if it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = place.read(name) if content is None and place.is_address else content
    try:
        return pq.read_table(place.path(name) if content is None else pa.BufferReader(content), partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise damaged(place.path(name), "parquet", error) from error


def read_npy(place: FilePlace, name: str, content: bytes | None = None) -> np.ndarray:
    """An array of rows, of its content if that is given. Else of a folder's file only what is used is read.

    Raises:
        EmbeddingFilesError: It is missing or damaged.
    """
    content = place.read(name) if content is None and place.is_address else content
    try:
        if content is not None:
            found = np.load(BytesIO(content), allow_pickle=False)
        else:
            found = np.load(place.path(name), mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise damaged(place.path(name), "npy", error) from error
    if found.ndim != 2 or found.dtype.kind != "f":
        raise EmbeddingFilesError(
            f"{place.path(name)} holds an array {found.shape} of {found.dtype}, but embeddings are rows of "
            f"floating-point numbers (images, D).",
            place.path(name),
        )
    return found


def _tensors(place: FilePlace, name: str, content: bytes | None = None) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(place.read(name) if content is None else content)
    except SafetensorError as error:
        raise damaged(place.path(name), "safetensors", error) from error
    if IMAGES not in found:
        raise EmbeddingFilesError(
            f"{place.path(name)} has no tensor {IMAGES!r}, but {', '.join(found) or 'none'}: it holds no embeddings.",
            place.path(name),
        )
    return found


def damaged(path: str, kind: str, error: BaseException) -> EmbeddingFilesError:
    """The error for a file that cannot be read as what its name says."""
    return EmbeddingFilesError(
        f"{path} is no whole {kind} file ({one_line(error).rstrip('.')}): copy it again, or remove it and embed anew.",
        path,
    )


def _vectors(path: str, table: "pyarrow.Table", name: str, is_needed: bool) -> np.ndarray:
    """A column of lists of one length as (I, D)."""
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    if name not in table.column_names:
        raise EmbeddingFilesError(
            f"{path} has no column {name!r}; its columns are {', '.join(table.column_names)}: it holds no embeddings.",
            path,
        )
    kind, chunks = table[name].type, table[name].chunks
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    column = pa.concat_arrays(chunks) if chunks else pa.array([], kind)
    widths = set(pc.list_value_length(column).drop_null().to_pylist()) if is_list else set()
    if pa.types.is_fixed_size_list(kind):
        widths.add(kind.list_size)
    if (
        len(widths) != 1
        or 0 in widths
        or not pa.types.is_floating(kind.value_type)
        or (is_needed and column.null_count)
    ):
        raise EmbeddingFilesError(
            f"{path}: the column {name!r} holds {kind}, but lists of floating-point numbers of one length are needed, "
            f"one in each row.",
            path,
        )
    (width,) = widths
    found = np.zeros((len(column), width), dtype=kind.value_type.to_pandas_dtype())
    is_there = np.asarray(column.is_valid())
    found[is_there] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return found


def _texts_of(table: "pyarrow.Table", name: str) -> list[str | None]:
    if name not in table.column_names:
        return [None] * len(table)
    return [None if value is None else str(value) for value in table[name].to_pylist()]


def _of_table(path: str, table: "pyarrow.Table", images: np.ndarray, texts: np.ndarray | None = None) -> Shard:
    if texts is None and TEXTS in table.column_names:
        texts = _vectors(path, table, TEXTS, False)
    check_lengths(path, len(table), images, texts)
    if "path" not in table.column_names:
        raise EmbeddingFilesError(f"{path} has no column 'path', which says where each image is.", path)
    ids = table["id"].to_numpy() if "id" in table.column_names else np.arange(len(table))
    paths = [text or "" for text in _texts_of(table, "path")]
    return Shard(ids, paths, _texts_of(table, "caption"), _texts_of(table, "metadata"), images, texts)


def _of_metadata(path: str, table: "pyarrow.Table", images: np.ndarray, texts: np.ndarray | None) -> Shard:
    check_lengths(path, len(table), images, texts)
    place = next((name for name in PATHS if name in table.column_names), None)
    if place is None:
        raise EmbeddingFilesError(
            f"The metadata beside {path} have none of the columns {', '.join(PATHS)}, which say where each image is; "
            f"their columns are {', '.join(table.column_names)}.",
            path,
        )
    others = [name for name in table.column_names if name not in (place, "caption") and not re.match("__index", name)]
    rows = table.select(others).to_pylist()
    metadata = [_as_json({name: value for name, value in row.items() if value is not None}) for row in rows]
    paths = [text or "" for text in _texts_of(table, place)]
    return Shard(np.arange(len(table)), paths, _texts_of(table, "caption"), metadata, images, texts)


def _as_json(values: dict[str, Any]) -> str | None:
    return json.dumps(values, ensure_ascii=False, default=str) if values else None


def check_lengths(path: str, rows: int, images: np.ndarray, texts: np.ndarray | None) -> None:
    """Raise EmbeddingFilesError if the files of a shard have different numbers of rows."""
    if len(images) != rows or (texts is not None and len(texts) != rows):
        also = "" if texts is None else f", {len(texts):,} text embeddings"
        raise EmbeddingFilesError(
            f"{path} holds {len(images):,} embeddings{also}, and the table beside it {rows:,} rows: they do not belong "
            f"together. Copy all files of the shard again.",
            path,
        )


__all__ = [
    "DTYPES",
    "LAYOUTS",
    "Shard",
    "check_lengths",
    "files_of",
    "read_npy",
    "read_parquet",
    "read_shard",
    "write_shard",
]
