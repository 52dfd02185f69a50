"""Embed a folder of images or a data set into files, in shards that appear whole.

1. Open the source and the model, and what an earlier run has written: the run goes on behind its last shard.
2. Encode, batch by batch, while threads open the next images. Only one shard is in memory.
3. Ctrl-C ends at the next image: what is encoded is written as a shorter shard.

Dimensions: D embedding.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..extras import require
from ..zero_shot.progress import progress_bar
from .embedding_files import EmbeddingDescription, EmbeddingWriter
from .embedding_layouts import DTYPES, LAYOUTS
from .embedding_place import FilePlace
from .image_rows import ImageRows, Position, open_image_rows, rows_from
from .index_model import describe, hash_of_tensors, loaded, name_of, text_weights
from .index_writer import only_writer
from .interruption import interruption
from .row_encoding import EmbeddedRow, embed_captions, embed_rows

SHARD_ROWS = 10_000
"""Images of a shard: 10 MB in float16 at D = 512."""


@dataclass(frozen=True)
class RayOptions:
    """Where and how Ray embeds.

    Attributes:
        address: Of a cluster, as `ray.init` takes it. None: what `RAY_ADDRESS` names, else this machine.
        workers: How many processes hold a model. None: one for each GPU, else one for each four cores.
    """

    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True)
class EmbeddedSource:
    """What a run did.

    Attributes:
        rows: Number of images with embeddings in the files, those of earlier runs too.
        added: Number of those that this run added.
        problems: Number of images that could not be opened.
        shards: Number of shards.
        is_complete: Whether the source was gone through to its end.
        reasons: For each image that could not be opened, its path and why; read as they are needed.
    """

    rows: int
    added: int
    problems: int
    shards: int
    is_complete: bool
    reasons: Iterator[tuple[str, str]]


def embed_source(
    source: str | Path,
    out: str | Path,
    *,
    model: Any,
    processor: Any = None,
    layout: str = "parquet",
    dtype: str = "float16",
    texts: bool = False,
    shard_rows: int = SHARD_ROWS,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_folders: Sequence[str] = (),
    batch_size: int = 16,
    exact: bool = False,
    threads: int | None = None,
    progress: bool | None = False,
    ray: RayOptions | None = None,
) -> EmbeddedSource:
    """Embed the images of a folder or a data set into files.

    If an earlier run was interrupted, this one goes on after the last shard that is whole.

    Args:
        source: A folder of images; a repository on the Hub, a saved data set, CSV, JSON lines, parquet or webdataset
            files, which are streamed.
        out: A new or empty folder, an earlier run's, or an address such as s3://bucket/folder.
        model: HfClipModel, or where one is: a folder, a repository on the Hub, a checkpoint file. With `ray` where one
            is, which all machines have to see.
        processor: HfClipProcessor, if `model` is a model.
        layout: "parquet", "safetensors" or "clip-retrieval".
        dtype: "float16" or "float32".
        texts: Whether captions are encoded too.
        shard_rows: Images of a shard.
        split: The split of a data set. None: "train".
        image_column: The column that holds the images. None: the only one that can be it.
        caption_column: The column of captions, or a template over columns. None: the only one that can be it, if there
            is one.
        image_folders: Folders outside of the data set's own whose images its rows may name.
        batch_size: Images encoded at once.
        exact: Whether to decode large JPEGs in full, and not at a half, a quarter or an eighth of their size.
        threads: How many open images. None: one for each core, at most 8.
        progress: Whether to show a progress bar. None: if standard error is a terminal.
        ray: How to embed on many machines through Ray Data. None: in this process.

    Returns:
        What was done.

    Raises:
        EmbeddingFilesError: `out` holds other things, or embeddings of another model or source. A ValueError; its
            `place` is the folder or file.
        OSError: There is no such source.
        ValueError: The source has no such split or column; a layout or dtype is unknown.
        ImportError: A package is missing.
        KeyboardInterrupt: The run was interrupted; what it encoded is written.
    """
    _check_choices(layout, dtype, shard_rows)
    require("Embeddings in files", "search", ["pyarrow"])
    if ray is not None:
        require("Embedding on many machines", "ray")
    rows = open_image_rows(
        os.path.expanduser(source),
        split=split,
        image_column=image_column,
        caption_column=caption_column,
        image_folders=image_folders,
    )
    if texts and not rows.has_captions:
        raise ValueError(
            f"The captions of {source} are to be encoded, but it has none: name their column, or leave texts out."
        )
    place, name = FilePlace(out), name_of(model)
    model, processor = loaded(model, processor)
    identity = describe(model, processor, name)
    settings: dict[str, Any] = {"exact": exact, "image_column": image_column, "caption_column": caption_column}
    if image_folders:  # they may hold what could not be opened without them
        settings["image_folders"] = [os.path.abspath(folder) for folder in image_folders]
    if rows.fingerprint is None and split:  # which is part of a fingerprint
        settings["split"] = split
    description = EmbeddingDescription(
        layout=layout,
        dtype=dtype,
        width=identity.width,
        weights=identity.weights,
        processor=identity.processor,
        model=identity.model,
        text_weights=hash_of_tensors(text_weights(model)) if texts else None,
        source=rows.name,
        data=rows.fingerprint,
        settings=settings,
    )
    encoding = {"batch_size": batch_size, "exact": exact, "threads": threads}
    with only_writer(place.name, "folder"):
        writer = EmbeddingWriter(place, description, shard_rows)
        before = writer.rows
        if not writer.is_complete:
            if ray is None:
                found = _embedded_here(rows, writer.position, model, processor, texts, encoding)
            else:
                from .embed_with_ray import embedded_by_ray

                del model, processor  # each worker loads its own
                found = embedded_by_ray(rows, writer.position, identity, texts, encoding, ray)
            _write_all(found, writer, rows.total, sys.stderr.isatty() if progress is None else progress)
        added = writer.rows - before
        problems, reasons = writer.problems + len(rows.unread), chain(writer.read_problems(), rows.unread.items())
        return EmbeddedSource(writer.rows, added, problems, writer.shards, writer.is_complete, reasons)


def _check_choices(layout: str, dtype: str, shard_rows: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"There is no format {layout!r}; embeddings are written as {', '.join(LAYOUTS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} for embeddings; they are written as {' or '.join(DTYPES)}.")
    if shard_rows < 1:
        raise ValueError(f"shard_rows is {shard_rows}, but must be at least 1.")


def _embedded_here(
    rows: ImageRows, position: Position, model: Any, processor: Any, texts: bool, encoding: dict[str, Any]
) -> Iterator[EmbeddedRow]:
    found = embed_rows(rows_from(rows, position), rows.content, model, processor, **encoding)
    return embed_captions(found, model, processor) if texts else found


def _write_all(found: Iterator[EmbeddedRow], writer: EmbeddingWriter, total: int | None, is_shown: bool) -> None:
    """Write what comes, until it ends or the user interrupts it."""
    left = None if total is None else max(0, total - writer.position.number)
    with progress_bar("Embedding images", "image", left, is_shown) as advance, interruption() as interrupted:
        for one in found:
            writer.add(one)
            advance(1)
            if interrupted.is_set():
                writer.write()
                raise KeyboardInterrupt(
                    f"interrupted after {writer.position.number:,} images, which are written; the same command goes on "
                    f"there"
                )
        writer.write(is_complete=True)


__all__ = ["EmbeddedSource", "RayOptions", "embed_source"]
