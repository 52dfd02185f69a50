"""Texts and images → features of length one, in batches.

Texts are tokenized some thousands at once and sorted by length, so that no batch is padded far; the features come back
in the order of the texts. Padding stands behind the end of a text, where the causal tower's feature cannot see it, so
no mask is needed.

Nothing is shared between calls, so that several threads may call these functions with one model and processor.

Dimensions: T texts, I images, B those of one batch, L text length, D embedding.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from ..model.image_processing_hf_clip import HfClipImageProcessorKwargs
from ..model.open_image import UNREADABLE, UnreadableImageError, at_place
from ..model.repair_text import TextError

TEXTS_AT_ONCE = 4096
"""Texts that are tokenized and sorted together; their ids are all that is held of them."""


class TextTooLongError(ValueError):
    """A text has more tokens than the text tower takes.

    Attributes:
        index: its place among the texts; of a prompt, its label's place among labels and then background labels.
        length: its tokens, start and end included.
        limit: the tokens that the tower takes.
    """

    def __init__(self, message: str, index: int = -1, length: int = -1, limit: int = -1):
        super().__init__(message, index, length, limit)
        self.index, self.length, self.limit = index, length, limit

    def __str__(self) -> str:
        return str(self.args[0])


def image_processor_of(processor: Any) -> Any:
    """The image processor within a processor, or the one given."""
    return getattr(processor, "image_processor", processor)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer within a processor, or the one given."""
    return getattr(processor, "tokenizer", processor)


@contextmanager
def progress_bar(title: str, unit: str, total: int | None, is_shown: bool) -> Iterator[Callable[[int], Any]]:
    """Yields what is to be called with the number of things done."""
    if not is_shown:
        # Not `disable=True`: tqdm takes a lock of the whole process all the same, and a process that is forked while
        # another thread holds it would wait for ever.
        yield lambda count: None
        return
    with tqdm(desc=title, unit=unit, total=total, leave=False) as bar:
        yield bar.update


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1.")


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def tokenize(
    model: Any, processor: Any, texts: list[str], settings: dict[str, Any], first: int = 0
) -> tuple[Tensor, Tensor]:
    """Texts → input_ids (B, L), padded on the right, and the length of each (B,).

    first: the first text's place, for the error

    Raises TextError; and TextTooLongError, unless the settings say truncation=True.
    """
    for place, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise ValueError(f"texts[{place}] is {text!r:.60}, a {type(text).__name__}, but a text is needed.")
    tokenizer = tokenizer_of(processor)
    text_config = getattr(model.config, "text_config", model.config)
    limit = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    settings = settings | {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    is_cut = settings.get("truncation") not in (None, False, "do_not_truncate")
    if not is_cut:
        settings |= {"truncation": True, "max_length": limit + 1}  # one more than fits is enough to tell
    try:
        tokens = tokenizer(texts, **settings)
    except TextError as error:
        if error.index is None:
            raise
        place = first + error.index
        raise TextError(error.problem, place, f"texts[{place}] ({texts[error.index][:80]!r})") from error
    lengths = tokens["attention_mask"].sum(dim=1)
    if not is_cut and (too_long := lengths > limit).any():
        row = int(too_long.int().argmax())
        length = 2 + len(tokenizer(texts[row], add_special_tokens=False, padding=False)["input_ids"])
        raise TextTooLongError(
            f"texts[{first + row}] ({texts[row][:80]!r}) has {length} tokens, start and end included, but the model "
            f"takes {limit}. Shorten it, or pass truncation=True, which keeps the end of the text marked.",
            index=first + row,
            length=length,
            limit=limit,
        )
    return tokens["input_ids"], lengths


def check_texts(model: Any, processor: Any, texts: Iterable[str], total: int, settings: dict[str, Any]) -> None:
    """Raise now what `encode_text_batches` would raise after hours, because it reads so many texts in parts."""
    if total <= TEXTS_AT_ONCE:
        return
    first = 0
    for chunk in in_batches(texts, TEXTS_AT_ONCE):
        tokenize(model, processor, chunk, settings, first)
        first += len(chunk)


@torch.no_grad()
def encode_text_batches(
    model: Any, processor: Any, texts: Iterable[str], *, batch_size: int, settings: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Texts → the places (B,), on the CPU, and features (B, D) of one batch after the other, shorter texts first.

    Only TEXTS_AT_ONCE texts are read and held at a time.
    """
    first = 0
    for chunk in in_batches(texts, TEXTS_AT_ONCE):
        ids, lengths = tokenize(model, processor, chunk, settings, first)
        for rows in lengths.argsort(stable=True).split(batch_size):
            input_ids = ids[rows, : int(lengths[rows].max())].to(model.device)
            features = normalize(model(input_ids=input_ids).text_embeds.float(), dim=-1)
            yield rows + first, features
        first += len(chunk)


def no_features(model: Any, count: int = 0) -> Tensor:
    """(count, D) float32 zeros on the model's device."""
    return torch.zeros(count, model.config.projection_dim, dtype=torch.float32, device=model.device)


@torch.no_grad()
def encode_texts(
    model: Any,
    processor: Any,
    texts: Iterable[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    **settings: Any,
) -> Tensor:
    """Texts → features of length one.

    Args:
        model: HfClipModel or HfClipTextModelWithProjection, compiled or not; it is put into no other mode.
        processor: HfClipProcessor or HfClipTokenizer.
        texts: a text, or any iterable of texts.
        batch_size: texts encoded at once.
        progress: show a progress bar.
        **settings: for the tokenizer, e.g. truncation=True.

    Returns:
        (T, D) float32 on the model's device; (0, D) for no texts.

    Raises:
        TextTooLongError: a ValueError whose `index` is the place of a text that is longer than the model takes.
        TextError: a ValueError whose `index` is the place of a text that cannot be tokenized.
    """
    check_batch_size(batch_size)
    texts = [texts] if isinstance(texts, str) else list(texts)
    check_texts(model, processor, texts, len(texts), settings)
    found = no_features(model, len(texts))
    with progress_bar("Encoding texts", "text", len(texts), progress) as update:
        batches = encode_text_batches(model, processor, texts, batch_size=batch_size, settings=settings)
        for places, features in batches:
            found[places.to(found.device)] = features.to(found.device)
            update(len(places))
    return found


def is_single_image(images: Any) -> bool:
    """Whether this is one image, or a way to one, and not several."""
    if isinstance(images, (str, bytes, bytearray, dict, os.PathLike, Image.Image)) or hasattr(images, "read"):
        return True
    return getattr(images, "ndim", 4) in (0, 2, 3)


def check_images(images: Any) -> None:
    """Refuse what holds no images, as a whole."""
    if hasattr(images, "column_names"):  # a data set of `datasets`
        raise ValueError(
            f"images is a {type(images).__name__} of rows with {images.column_names}, but images are needed: pass one "
            f'column, e.g. dataset["image"].'
        )
    if not (is_single_image(images) or isinstance(images, Iterable) or hasattr(images, "__getitem__")):
        raise ValueError(
            f"images is of type {type(images).__name__}, but images are needed: Pillow images, paths, URLs, bytes or "
            f"arrays, one or any iterable of them."
        )


def check_single(item: Any) -> None:
    """Refuse a list, or a batch, where one image is needed. Raises UnreadableImageError."""
    if isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) > 3:
        raise UnreadableImageError("the image", " holds several images; pass one image or a flat list of images.")


def as_read(images: Iterable[Any]) -> Iterator[Any]:
    """The images one after the other; a data set or an iterator that fails to give one says which it was."""
    iterator = iter(images)
    for index in count():
        try:
            item = next(iterator)
        except StopIteration:
            return
        except UnreadableImageError:
            raise
        except UNREADABLE as error:
            raise unread(index, error) from error
        yield item


def unread(index: int, error: BaseException) -> UnreadableImageError:
    """What to raise where an image's own source fails."""
    problem = f" could not be read from where it comes ({type(error).__name__}: {error}); replace it, or leave it out."
    return UnreadableImageError(f"images[{index}]", problem, index)


@torch.no_grad()
def encode_images(
    model: Any, processor: Any, images: Any, *, batch_size: int = 16, progress: bool = False, **settings: Any
) -> Tensor:
    """Images → features of length one.

    Args:
        model: HfClipModel or HfClipVisionModelWithProjection, compiled or not; it is put into no other mode.
        processor: HfClipProcessor or HfClipImageProcessor.
        images: an image or any iterable of images: Pillow images, paths, URLs, bytes, arrays, a column of `datasets`.
        batch_size: images encoded at once.
        progress: show a progress bar.
        **settings: for the image processor, e.g. fit="pad" or backend="torch".

    Returns:
        (I, D) float32 on the model's device; (0, D) for no images.

    Raises:
        UnreadableImageError: a ValueError whose `index` is the place, among all of them, of an image that cannot be
            read.
    """
    if unknown := settings.keys() - HfClipImageProcessorKwargs.__annotations__.keys():
        raise TypeError(
            f"{min(unknown)!r} is neither an argument here nor a setting of the image processor, such as fit or "
            f"backend."
        )
    check_batch_size(batch_size)
    check_images(images)
    is_one = is_single_image(images)
    items = [images] if is_one else images
    image_processor, features, done = image_processor_of(processor), [no_features(model)], 0
    total = len(items) if hasattr(items, "__len__") else None
    with progress_bar("Encoding images", "image", total, progress) as update:
        for batch in in_batches(as_read(items), batch_size):
            for place, item in enumerate(batch, start=done):
                with at_place(place):
                    check_single(item)
            try:
                pixels = image_processor(batch, return_tensors="pt", **settings)["pixel_values"]
            except UnreadableImageError as error:
                error.place(None if is_one else done + (error.index or 0))
                raise
            pixels = pixels.to(model.device, model.dtype)
            if "encode_image" in vars(model):  # optimized
                embeds = model.encode_image(pixels)  # for which such a model leaves out what is not needed
            else:
                embeds = model(pixel_values=pixels).image_embeds  # which a compiled model compiles
            features.append(normalize(embeds.float(), dim=-1))
            done += len(batch)
            update(len(batch))
    return torch.cat(features)
