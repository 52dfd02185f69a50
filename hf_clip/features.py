"""Texts and pictures → features of length one, in batches.

Texts are sorted by length first, so that no batch is padded far; the features come back in the order of the texts.
Padding stands behind the end of a text, where the causal tower's feature cannot see it, so no mask is needed.

Dimensions: N texts or pictures, D embedding.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from .image_processing_hf_clip import HfClipImageProcessorKwargs


def image_processor_of(processor: Any) -> Any:
    """The image processor within a processor, or the one given."""
    return getattr(processor, "image_processor", processor)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer within a processor, or the one given."""
    return getattr(processor, "tokenizer", processor)


def _progress_bar(title: str, unit: str, total: int | None, is_shown: bool) -> tqdm:
    hidden = {} if is_shown else {"disable": True}  # not False, which would overrule TQDM_DISABLE
    return tqdm(desc=title, unit=unit, total=total, leave=False, **hidden)


@torch.no_grad()
def encode_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    **settings: Any,
) -> Tensor:
    """Texts → (N, D) float32 of length one, on the model's device.

    model:     HfClipModel or HfClipTextModelWithProjection, compiled or not; it is put into no other mode
    processor: HfClipProcessor or HfClipTokenizer
    progress:  show a progress bar
    settings:  for the tokenizer, e.g. truncation=True

    Raises ValueError for a text that is longer than the model takes.
    """
    check_batch_size(batch_size)
    settings = settings | {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    tokens = tokenizer_of(processor)(list(texts), **settings)
    lengths = tokens["attention_mask"].sum(dim=1)
    order = lengths.argsort(stable=True)
    features: list[Tensor] = []
    with _progress_bar("Encoding texts", "text", len(order), progress) as bar:
        for rows in order.split(batch_size):
            input_ids = tokens["input_ids"][rows, : int(lengths[rows].max())].to(model.device)
            features.append(normalize(model(input_ids=input_ids).text_embeds.float(), dim=-1))
            bar.update(len(rows))
    return torch.cat(features)[order.argsort().to(features[0].device)]


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1.")


def is_single_picture(images: Any) -> bool:
    """Whether this is one picture, or a way to one, and not several."""
    if isinstance(images, (str, bytes, bytearray, dict, os.PathLike, Image.Image)) or hasattr(images, "read"):
        return True
    return getattr(images, "ndim", 4) < 4


def _in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@torch.no_grad()
def encode_images(
    model: Any, processor: Any, images: Any, *, batch_size: int = 16, progress: bool = False, **settings: Any
) -> Tensor:
    """Pictures → (N, D) float32 of length one, on the model's device.

    model:     HfClipModel or HfClipVisionModelWithProjection, compiled or not; it is put into no other mode
    processor: HfClipProcessor or HfClipImageProcessor
    images:    a picture or any iterable of pictures: Pillow pictures, paths, URLs, bytes, arrays, rows of `datasets`
    progress:  show a progress bar
    settings:  for the image processor, e.g. fit="pad" or backend="torch"

    Raises ValueError that names a picture which cannot be read by its place among all of them.
    """
    if unknown := settings.keys() - HfClipImageProcessorKwargs.__annotations__.keys():
        raise TypeError(
            f"{min(unknown)!r} is neither an argument here nor a setting of the image processor, such as fit or "
            f"backend."
        )
    check_batch_size(batch_size)
    items = [images] if is_single_picture(images) else images
    image_processor, features, done = image_processor_of(processor), [], 0
    total = len(items) if hasattr(items, "__len__") else None
    with _progress_bar("Encoding pictures", "picture", total, progress) as bar:
        for batch in _in_batches(items, batch_size):
            for place, item in enumerate(batch, start=done):
                if isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) > 3:
                    raise ValueError(f"images[{place}] holds several pictures; pass a flat list of single ones.")
            try:
                pixels = image_processor(batch, return_tensors="pt", **settings)["pixel_values"]
            except ValueError as error:
                renumbered = re.sub(r"^images\[(\d+)\]", lambda match: f"images[{int(match[1]) + done}]", str(error))  # noqa: B023
                raise ValueError(renumbered) from error
            pixels = pixels.to(model.device, model.dtype)
            if "encode_image" in vars(model):  # optimized
                embeds = model.encode_image(pixels)  # for which such a model leaves out what is not needed
            else:
                embeds = model(pixel_values=pixels).image_embeds  # which a compiled model compiles
            features.append(normalize(embeds.float(), dim=-1))
            done += len(batch)
            bar.update(len(batch))
    if not features:
        raise ValueError("There are no pictures to encode; pass at least one.")
    return torch.cat(features)
