"""Quantized embeddings of an index or of files of embeddings: where they are kept, and whether they still fit.

INDEX/quantized-int8.safetensors          of an index; fits while the index has not changed
EMBEDDINGS/_quantized-int8.safetensors    of files of embeddings
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .embedding_files import StoredEmbeddings
from .embedding_place import EmbeddingFilesError, holds_embeddings
from .exact_scan import EmbeddingMatrix
from .index_table import IndexTables, SearchIndexError, is_address
from .quantized_scan import KINDS, QuantizedFileError, QuantizedMatrix, kept_recall

RECALL_AT = 10


@dataclass(frozen=True)
class Quantized:
    """What was quantized, and what that costs and keeps.

    Attributes:
        path: The file.
        images: Number of embeddings.
        code_bytes: Memory that the codes take.
        float16_bytes: Memory that the embeddings take in float16.
        recall: Part of the exact scan's ten best that is found, measured with images as queries.
    """

    path: str
    images: int
    code_bytes: int
    float16_bytes: int
    recall: float


def quantize(place: str | Path, kind: str, into: str | Path | None = None) -> Quantized:
    """Quantize the embeddings of an index, or those that `hf-clip embed` or clip-retrieval wrote.

    Args:
        place: The index, or the folder of embeddings.
        kind: "int8" or "bits".
        into: The file to write. None: in the place itself, where `ImageIndex.use_quantized` finds it.

    Returns:
        What was done, with recall@10 as measured.

    Raises:
        SearchIndexError: There is no such index.
        EmbeddingFilesError: There are no such embeddings, or they are damaged.
        ValueError: `kind` is neither of both, or there are no embeddings.
    """
    place = os.path.expanduser(str(place)).rstrip("/")
    if kind not in KINDS:
        raise ValueError(f"Embeddings cannot be quantized to {kind!r}; choose {' or '.join(KINDS)}.")
    if is_address(place) and into is None:
        raise ValueError(f"{place} is no folder of this machine: name a file to write with --into.")
    is_stored = holds_embeddings(place)
    if not is_stored and not is_address(place) and not os.path.isdir(place):
        raise FileNotFoundError(f"There is no index and no folder of embeddings at {place}; check the path.")
    if is_stored:
        matrix, metadata = read_stored(StoredEmbeddings(place))
    else:
        tables = IndexTables.open(place)
        matrix, metadata = EmbeddingMatrix.read(tables), {"weights": tables.description.weights}
    found = QuantizedMatrix.quantize(matrix, kind)
    path = str(into) if into is not None else quantized_file(place, kind, is_stored)
    found.save(path, metadata)
    size = matrix.embeddings.numel() * matrix.embeddings.element_size()
    return Quantized(path, len(matrix), found.code_bytes, size, kept_recall(found, RECALL_AT))


def quantized_file(place: str, kind: str, is_stored: bool = False) -> str:
    """The file in which an index, or a folder of embeddings, keeps what is quantized."""
    return os.path.join(place, f"{'_' if is_stored else ''}quantized-{kind}.safetensors")


def read_stored(stored: StoredEmbeddings) -> tuple[EmbeddingMatrix, dict[str, str]]:
    """All embeddings of files in memory, of length one, their ids being their places in the files; and their model."""
    parts: list[torch.Tensor] = []
    for shard in stored:
        part = torch.from_numpy(np.array(shard.embeddings, dtype=np.float32))  # a copy: a mapped file is read-only
        if parts and part.shape[1] != parts[0].shape[1]:
            raise EmbeddingFilesError(
                f"{stored.place.name} holds embeddings of {parts[0].shape[1]} numbers, and of {part.shape[1]}: they do "
                f"not belong together.",
                stored.place.name,
            )
        parts.append(torch.nn.functional.normalize(part, dim=1).nan_to_num().half())
    embeddings = torch.cat(parts)
    metadata = {"weights": stored.description.weights} if stored.description is not None else {}
    return EmbeddingMatrix(torch.arange(len(embeddings)), embeddings), metadata


def read_quantized(tables: IndexTables, which: str) -> QuantizedMatrix:
    """The quantized embeddings of an index.

    Args:
        tables: The index.
        which: "int8", "bits", or a file.

    Raises:
        QuantizedFileError: There is no such file, or it is damaged.
        SearchIndexError: The index has changed since, or the file is of another index.
    """
    path = quantized_file(tables.place, which) if which in KINDS else os.path.expanduser(which)
    if which in KINDS and not os.path.isfile(path):
        raise QuantizedFileError(
            f"The index {tables.place} was not quantized to {which}: make it with `hf-clip quantize {tables.place} "
            f"--to {which}`.",
            path,
        )
    found = QuantizedMatrix.open(path)
    if found.metadata.get("weights") != tables.description.weights:
        raise SearchIndexError(f"{path} is of another model than the index {tables.place}.", tables.place)
    if found.version != tables.images.version or len(found) != tables.images.count_rows():
        raise SearchIndexError(
            f"The index {tables.place} has changed since it was quantized: run `hf-clip quantize {tables.place} --to "
            f"{found.kind}` again.",
            tables.place,
        )
    return found


__all__ = ["Quantized", "quantize", "quantized_file", "read_quantized", "read_stored"]
