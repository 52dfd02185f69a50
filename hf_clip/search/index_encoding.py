"""Open and encode the images that an update found new, batch by batch, and write them.

Threads read and open the next images while the model encodes a batch.

Dimensions: B batch, D embedding.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..zero_shot.features import encode_pixels, image_processor_of
from ..zero_shot.files import MOST_THREADS, in_order
from .folder_scan import FileState
from .image_rows import read_file
from .index_table import IndexTables
from .index_update import COMMIT_AT, NOT_READ, PLACE, IndexChanges, UpdatePlan, next_free_id
from .indexed_image import IndexedImage, prepare
from .interruption import interruption
from .row_encoding import draft_for, problem_of

OF_THE_IMAGE = ("content", "width", "height", "perceptual_hash", "thumbnail")
"""Columns that are found by opening an image."""


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
        return prepare(read_file(file.path), image_processor, draft)

    items = ((plan.columns_of_place(file), replaced, file) for file, replaced in plan.to_encode)
    return encode_rows(tables, items, make, model, batch_size=batch_size, threads=threads, advance=advance)


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
        make: Opens an image, in a thread. Raises ValueError or OSError.
        model: HfClipModel.
        batch_size: Images encoded at once.
        threads: How many open images. None: one for each core, at most 8.
        advance: Called with a number of images as they are encoded.

    Raises:
        KeyboardInterrupt: It was interrupted: the batch was ended, and what was encoded is written.
    """
    threads = threads or min(os.cpu_count() or 1, MOST_THREADS)
    changes, next_id = IndexChanges(), next_free_id(tables)
    named = (((row, replaced), source) for row, replaced, source in items)
    waiting = in_order(named, make, threads, ahead=2 * batch_size + threads)
    added: list[dict[str, Any]] = []
    replaced_rows: list[dict[str, Any]] = []
    problems: list[dict[str, Any]] = []
    with interruption() as interrupted, closing(waiting):
        while not interrupted.is_set() and (batch := list(islice(waiting, batch_size))):
            opened = []
            for (row, replaced), future in batch:
                try:
                    opened.append((row, replaced, future.result()))
                except (ValueError, OSError) as error:
                    problem = problem_of(error)
                    changes.problems[os.fsdecode(row["path_bytes"])] = problem
                    state = {name: row.get(name) for name in PLACE} | {"problem": problem}
                    is_unread = isinstance(error, OSError) and error.errno is not None
                    changes.unread += is_unread
                    problems.append(state | ({"mtime_ns": NOT_READ} if is_unread else {}))
            for (known, replaced, image), embedding in zip(opened, _embeddings_of(model, opened), strict=True):
                id = next_id if replaced is None else replaced
                found = {name: getattr(image, name) for name in OF_THE_IMAGE} | {"embedding": embedding}
                (added if replaced is None else replaced_rows).append({"id": id} | known | found)
                next_id += replaced is None
            if len(added) + len(replaced_rows) + len(problems) >= COMMIT_AT:
                _write(tables, changes, added, replaced_rows, problems)
            advance(len(batch))
        _write(tables, changes, added, replaced_rows, problems)
        if interrupted.is_set():
            raise KeyboardInterrupt(
                f"interrupted after {changes.added + changes.updated:,} images, which are indexed; the same command "
                f"goes on there"
            )
    return changes


def _embeddings_of(model: Any, opened: list[tuple[Any, Any, IndexedImage]]) -> np.ndarray:
    """Encode a batch of images, which may be empty: (B, D) float16."""
    if not opened:
        return np.empty((0, 0), np.float16)
    return encode_pixels(model, torch.stack([image.pixels for _, _, image in opened])).cpu().numpy().astype(np.float16)


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


__all__ = ["encode_planned", "encode_rows"]
