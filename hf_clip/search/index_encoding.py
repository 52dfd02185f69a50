"""Open and encode the images that an update found new, batch by batch, and write them.

Threads read and open the next images while the model encodes a batch.

Dimensions: B batch, D embedding.
"""

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..model.checked_files import one_line
from ..model.open_image import UnreadableImageError
from ..zero_shot.features import encode_pixels, image_processor_of
from ..zero_shot.files import MOST_THREADS, in_order
from .folder_scan import FileState
from .index_table import IndexTables
from .index_update import COMMIT_AT, PLACE, IndexChanges, UpdatePlan, columns_of_place, next_free_id
from .indexed_image import MOST_BYTES, IndexedImage, prepare

OF_THE_IMAGE = ("content", "width", "height", "perceptual_hash", "thumbnail")
"""Columns that are found by opening an image."""


class UnreadableFileError(ValueError):
    """A file cannot be read, or is no image."""


def _read_and_prepare(file: FileState, image_processor: Any, draft: int | None) -> IndexedImage:
    """Raises UnreadableFileError with what is wrong, in one line."""
    try:
        if file.size > MOST_BYTES:
            raise UnreadableFileError(f"it has {file.size:,} bytes, and at most {MOST_BYTES:,} are read")
        return prepare(Path(file.path).read_bytes(), image_processor, draft)
    except UnreadableImageError as error:
        problem = error.problem.lstrip(": ").removesuffix("; replace it, or leave it out.").removesuffix(".")
        raise UnreadableFileError(one_line(problem)) from error
    except OSError as error:
        raise UnreadableFileError(one_line(error.strerror or error)) from error


def encode_planned(
    tables: IndexTables,
    plan: UpdatePlan,
    model: Any,
    processor: Any,
    *,
    batch_size: int,
    exact: bool,
    threads: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> IndexChanges:
    """Encode the files that a plan lists, see `encode_rows`. `exact`: whether to decode large JPEGs in full."""
    image_processor = image_processor_of(processor)
    draft = draft_for(image_processor, exact)

    def make(file: FileState) -> IndexedImage:
        return _read_and_prepare(file, image_processor, draft)

    items = ((columns_of_place(file), replaced, file) for file, replaced in plan.to_encode)
    return encode_rows(tables, items, make, model, batch_size=batch_size, threads=threads, advance=advance)


def draft_for(image_processor: Any, exact: bool) -> int | None:
    """The shorter side that a JPEG needs, or None if it is to be decoded in full."""
    return None if exact else image_processor.steps().draft_side()


@torch.no_grad()
def encode_rows(
    tables: IndexTables,
    items: Iterable[tuple[dict[str, Any], int | None, Any]],
    make: Callable[[Any], IndexedImage],
    model: Any,
    *,
    batch_size: int,
    threads: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> IndexChanges:
    """Open and encode images, and write each `COMMIT_AT` of them in one commit.

    Args:
        tables: The index.
        items: For each image the columns that are known of it, the id of the row that it replaces or None, and what
            `make` opens.
        make: Opens an image, in a thread. Raises UnreadableFileError.
        model: HfClipModel.
        batch_size: Images encoded at once.
        threads: How many open images. None: one for each core, at most 8.
        advance: Called with a number of images as they are encoded.
    """
    threads = threads or min(os.cpu_count() or 1, MOST_THREADS)
    changes, next_id = IndexChanges(), next_free_id(tables)
    named = (((row, replaced), source) for row, replaced, source in items)
    waiting = in_order(named, make, threads, ahead=2 * batch_size + threads)
    added: list[dict[str, Any]] = []
    replaced_rows: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    while batch := list(islice(waiting, batch_size)):
        opened = []
        for (row, replaced), future in batch:
            try:
                opened.append((row, replaced, future.result()))
            except UnreadableFileError as error:
                changes.problems[os.fsdecode(row["path_bytes"])] = str(error)
                problems.append({name: row.get(name) for name in PLACE} | {"problem": str(error)})
        if opened:
            pixels = torch.stack([image.pixels for _, _, image in opened])
            embeddings = encode_pixels(model, pixels).cpu().numpy().astype(np.float16)
            for (known, replaced, image), embedding in zip(opened, embeddings, strict=True):
                id = next_id if replaced is None else replaced
                found = {name: getattr(image, name) for name in OF_THE_IMAGE} | {"embedding": embedding}
                (added if replaced is None else replaced_rows).append({"id": id} | known | found)
                next_id += replaced is None
        if len(added) + len(replaced_rows) + len(problems) >= COMMIT_AT:
            _write(tables, changes, added, replaced_rows, problems)
        advance(len(batch))
    _write(tables, changes, added, replaced_rows, problems)
    return changes


def _write(
    tables: IndexTables, changes: IndexChanges, added: list[Any], replaced: list[Any], problems: list[Any]
) -> None:
    """Write what waits, and empty the lists."""
    tables.add(added)
    tables.put(replaced)
    tables.put_problems(problems)
    changes.added, changes.updated = changes.added + len(added), changes.updated + len(replaced)
    for waiting in (added, replaced, problems):
        waiting.clear()


__all__ = ["UnreadableFileError", "draft_for", "encode_planned", "encode_rows"]
