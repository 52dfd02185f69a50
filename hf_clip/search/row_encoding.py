"""Open the images of a source in threads, and encode them batch by batch, with their captions.

    rows = open_image_rows("shards/{000..099}.tar")
    for found in embed_rows(rows, rows.content, model, processor):
        found.row.path, found.embedding, found.problem

Only a few batches are in memory at once, however large the source is.

Dimensions: B batch, D embedding, C channels, Y × X pixels.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.checked_files import one_line
from ..model.open_image import UnreadableImageError, open_image
from ..zero_shot.features import encode_pixels, encode_texts, image_processor_of
from ..zero_shot.files import MOST_THREADS, in_order
from .image_rows import ImageRow

CAPTIONS_AHEAD = 256
"""Rows whose captions are encoded together, those of about one length in a batch."""


@dataclass(frozen=True)
class EmbeddedRow:
    """An image with its embedding, or with the reason why it has none.

    Attributes:
        row: The image.
        embedding: (D,) float32, of length one; None if the image cannot be opened.
        problem: What is wrong with the image, in one line; None if nothing is.
        seen: What `look` returned.
        text_embedding: (D,) float32 of the caption, of length one; None without a caption, or if none was asked for.
    """

    row: ImageRow
    embedding: np.ndarray | None
    problem: str | None = None
    seen: Any = None
    text_embedding: np.ndarray | None = None


def draft_for(image_processor: Any, exact: bool) -> int | None:
    """The shorter side that a JPEG needs, or None if it is to be decoded in full."""
    return None if exact else image_processor.steps().draft_side()


def problem_of(error: Exception) -> str:
    """What is wrong with an image whose name stands beside this, in one line."""
    if isinstance(error, UnreadableImageError):
        return one_line(error.problem.lstrip(": ").removesuffix("; replace it, or leave it out.").removesuffix("."))
    return one_line(getattr(error, "strerror", None) or error)


@torch.no_grad()
def embed_rows(
    rows: Iterable[ImageRow],
    content: Callable[[Any], bytes],
    model: Any,
    processor: Any,
    *,
    batch_size: int = 16,
    exact: bool = False,
    threads: int | None = None,
    look: Callable[[bytes, Image.Image], Any] | None = None,
) -> Iterator[EmbeddedRow]:
    """Open images in threads, and encode one batch after the other.

    Args:
        rows: The images; read as they are needed.
        content: Reads the bytes of what a row stores: the method `content` of the opened source.
        model: HfClipModel.
        processor: HfClipProcessor or HfClipImageProcessor.
        batch_size: Images encoded at once.
        exact: Whether to decode large JPEGs in full, and not at a half, a quarter or an eighth of their size.
        threads: How many open images. None: one for each core, at most 8.
        look: Called in a thread with each image's bytes and the opened image; what it returns comes with the row.

    Yields:
        Each row in its order, with its embedding or with what is wrong with it.
    """
    threads = threads or min(os.cpu_count() or 1, MOST_THREADS)
    image_processor = image_processor_of(processor)
    draft = draft_for(image_processor, exact)

    def make(stored: Any) -> tuple[Tensor, Any]:
        data = content(stored)
        image = open_image(data, draft=draft)
        seen = None if look is None else look(data, image)
        return image_processor([image], return_tensors="pt")["pixel_values"][0], seen

    waiting = in_order(((row, row.stored) for row in rows), make, threads, ahead=2 * batch_size + threads)
    while batch := list(islice(waiting, batch_size)):
        made: list[tuple[Tensor, Any] | None] = []
        problems: list[str | None] = []
        for _, future in batch:
            try:
                made.append(future.result())
                problems.append(None)
            except (ValueError, OSError) as error:
                made.append(None)
                problems.append(problem_of(error))
        opened = [image for image in made if image is not None]
        if opened:
            embeddings = iter(encode_pixels(model, torch.stack([pixels for pixels, _ in opened])).cpu().numpy())
        for (row, _), image, problem in zip(batch, made, problems, strict=True):
            if image is None:
                yield EmbeddedRow(row, None, problem)
            else:
                yield EmbeddedRow(row, next(embeddings), None, image[1])


def embed_captions(
    found: Iterable[EmbeddedRow], model: Any, processor: Any, *, batch_size: int = 64
) -> Iterator[EmbeddedRow]:
    """The same rows with the embeddings of their captions. Captions that are too long for the model are cut off.

    Args:
        found: What `embed_rows` yields.
        model: HfClipModel.
        processor: HfClipProcessor.
        batch_size: Captions encoded at once, of `CAPTIONS_AHEAD` rows that are read for it.

    Yields:
        Each row in its order. `text_embedding` is None without a caption.
    """
    waiting = iter(found)
    while part := list(islice(waiting, CAPTIONS_AHEAD)):
        places = [place for place, one in enumerate(part) if one.embedding is not None and one.row.caption is not None]
        texts = [part[place].row.caption or "" for place in places]
        vectors = encode_texts(model, processor, texts, batch_size=batch_size, truncation=True).cpu().numpy()
        for place, vector in zip(places, vectors, strict=True):
            part[place] = replace(part[place], text_embedding=vector)
        yield from part


__all__ = ["EmbeddedRow", "draft_for", "embed_captions", "embed_rows", "problem_of"]
