"""Encode texts and images in batches, as features of length one.

Texts are encoded in batches of about one length (`text_batches`). The features are returned in the order in which the
texts were given.

The text tower runs without an attention mask. It is causal, and padding stands to the right of each text, so a text's
feature never depends on its padding.

Calls share no state. Several threads may use one model and one processor at the same time.

Dimensions: B batch, I images, T texts, L text length, D embedding, Y × X pixels.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..model.matryoshka import check_truncate_dim
from ..model.open_image import UNREADABLE, UnreadableImageError, at_place
from . import text_batches
from .progress import progress_bar
from .text_batches import check_batch_size, in_batches


def image_processor_of(processor: Any) -> Any:
    """Return the image processor of a processor. An image processor is returned as it is."""
    return getattr(processor, "image_processor", processor)


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor. A tokenizer is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def text_limit(model: Any) -> int:
    """Return the number of tokens that a model's text tower takes."""
    return getattr(model.config, "text_config", model.config).max_position_embeddings


def check_texts(model: Any, processor: Any, texts: Iterable[str], total: int, settings: dict[str, Any]) -> None:
    """Refuse a bad text now and not after hours, see `text_batches.check_texts`."""
    text_batches.check_texts(tokenizer_of(processor), text_limit(model), texts, total, settings)


def tokenized_batches(
    model: Any, processor: Any, texts: Iterable[str], *, batch_size: int, settings: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokenize texts and put those of about one length into a batch, shorter ones first.

    Yields:
        For each batch the places of its texts (B,), and their ids (B, L), on the CPU.
    """
    batches = text_batches.text_batches(
        tokenizer_of(processor), text_limit(model), texts, batch_size=batch_size, settings=settings
    )
    for places, ids in batches:
        yield torch.from_numpy(places), torch.from_numpy(ids)


@torch.no_grad()
def encode_text_batches(
    model: Any, processor: Any, texts: Iterable[str], *, batch_size: int, settings: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encode texts batch by batch, see `tokenized_batches`.

    Yields:
        For each batch the places of its texts (B,), on the CPU, and their features (B, D), float32, of length one.
    """
    for places, ids in tokenized_batches(model, processor, texts, batch_size=batch_size, settings=settings):
        yield places, normalize(model(input_ids=ids.to(model.device)).text_embeds.float(), dim=-1)


def no_features(model: Any, count: int = 0) -> Tensor:
    """Return zeros (count, D), float32, on the model's device."""
    return torch.zeros(count, model.config.projection_dim, dtype=torch.float32, device=model.device)


def check_width(model: Any, truncate_dim: int | None) -> None:
    """Refuse a width that a model's features do not have, and warn of one that it was not trained at."""
    if truncate_dim is not None:
        # The configuration of a text tower alone does not tell the widths.
        trained = getattr(model.config, "matryoshka_dims", [truncate_dim])
        check_truncate_dim(truncate_dim, model.config.projection_dim, trained)


def truncated(features: Tensor, width: int | None) -> Tensor:
    """Take the first numbers of features of length one, as features of length one.

    Args:
        features: (…, D) of length one.
        width: How many numbers. None: all.

    Returns:
        (…, width), or the features as they are if they have no more numbers.
    """
    if width is None or width >= features.shape[-1]:
        return features
    return normalize(features[..., :width], dim=-1)


@torch.no_grad()
def encode_texts(
    model: Any,
    processor: Any,
    texts: Iterable[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    truncate_dim: int | None = None,
    **settings: Any,
) -> Tensor:
    """Encode texts as features of length one, whose dot products are cosine similarities.

    Gradients are not computed. The model keeps its mode: call `model.eval()` before.

    Args:
        model: HfClipModel or HfClipTextModelWithProjection, compiled or not.
        processor: HfClipProcessor or HfClipTokenizer.
        texts: A text, or any iterable of T texts.
        batch_size: Number of texts encoded at once.
        progress: Whether to show a progress bar.
        truncate_dim: How many of a feature's first numbers to return, for a model that was trained at that width
            (`config.matryoshka_dims`). They are normalised by themselves. None: all.
        **settings: Arguments for the tokenizer, e.g. `truncation=True`.

    Returns:
        Features (T, D) or (T, truncate_dim), float32, on the model's device. (0, D) for no texts.

    Raises:
        TextTooLongError: A text is longer than the model takes, and `truncation=True` was not given. A ValueError; its
            `index` is the text's place.
        TextError: A text cannot be tokenized. A ValueError; its `index` is the text's place.
        ValueError: An item is no text, `batch_size` is below 1, or `truncate_dim` is not from 1 to D.

    Example::

        features = encode_texts(model, processor, ["a cat", "a dog"])  # (2, 512) for ViT-B/32
    """
    check_batch_size(batch_size)
    check_width(model, truncate_dim)
    texts = [texts] if isinstance(texts, str) else list(texts)
    check_texts(model, processor, texts, len(texts), settings)
    found = no_features(model, len(texts))
    with progress_bar("Encoding texts", "text", len(texts), progress) as update:
        batches = encode_text_batches(model, processor, texts, batch_size=batch_size, settings=settings)
        for places, features in batches:
            found[places.to(found.device)] = features.to(found.device)
            update(len(places))
    return truncated(found, truncate_dim)


def is_single_image(images: Any) -> bool:
    """Whether this is one image, or the path, URL or content of one, and not several."""
    if isinstance(images, (str, bytes, bytearray, dict, os.PathLike, Image.Image)) or hasattr(images, "read"):
        return True
    return getattr(images, "ndim", 4) in (0, 2, 3)


def check_images(images: Any) -> None:
    """Raise ValueError for an argument that cannot be an image or an iterable of images."""
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
    """Raise UnreadableImageError for a list or a batch where a single image is needed."""
    if isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) > 3:
        raise UnreadableImageError(" holds several images; pass one image or a flat list of images.")


def _check_settings(settings: Iterable[str]) -> None:
    """Raise TypeError for a name that is no setting of the image processor."""
    from ..model.image_processing_hf_clip import HfClipImageProcessorKwargs  # imports transformers, for seconds

    if unknown := set(settings) - HfClipImageProcessorKwargs.__annotations__.keys():
        raise TypeError(
            f"{min(unknown)!r} is neither an argument here nor a setting of the image processor, such as fit or "
            f"backend."
        )


def as_read(images: Iterable[Any]) -> Iterator[Any]:
    """Yield the images one after the other. If the data set or iterator fails, the error names the image's place."""
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
    """Return the error for an image that its data set or iterator could not deliver."""
    problem = f" could not be read from where it comes ({type(error).__name__}: {error}); replace it, or leave it out."
    return UnreadableImageError(problem, index)


@torch.no_grad()
def encode_pixels(model: Any, pixels: Tensor) -> Tensor:
    """Encode what the image processor returned: (B, 3, Y, X) → features of length one (B, D), float32."""
    pixels = pixels.to(model.device, model.dtype)
    # An optimized model's `encode_image` does less work than a call; `torch.compile` compiles nothing but calls.
    is_optimized = "encode_image" in vars(model)
    embeds = model.encode_image(pixels) if is_optimized else model(pixel_values=pixels).image_embeds
    return normalize(embeds.float(), dim=-1)


@torch.no_grad()
def encode_images(
    model: Any,
    processor: Any,
    images: Any,
    *,
    batch_size: int = 16,
    progress: bool = False,
    truncate_dim: int | None = None,
    **settings: Any,
) -> Tensor:
    """Encode images as features of length one, whose dot products are cosine similarities.

    Gradients are not computed. The model keeps its mode: call `model.eval()` before.

    Args:
        model: HfClipModel or HfClipVisionModelWithProjection, compiled or not.
        processor: HfClipProcessor or HfClipImageProcessor.
        images: An image, or any iterable of I images. An image is a Pillow image, an array, a path, a URL, bytes, or
            a row of an image column of `datasets`.
        batch_size: Number of images encoded at once.
        progress: Whether to show a progress bar.
        truncate_dim: How many of a feature's first numbers to return, as in `encode_texts`. None: all.
        **settings: Arguments for the image processor, e.g. `fit="pad"` or `backend="torch"`.

    Returns:
        Features (I, D) or (I, truncate_dim), float32, on the model's device. (0, D) for no images.

    Raises:
        UnreadableImageError: An image cannot be read. A ValueError; its `index` is the image's place.
        TypeError: A setting is unknown to the image processor.
        ValueError: `images` holds no images, `batch_size` is below 1, or `truncate_dim` is not from 1 to D.

    Example::

        features = encode_images(model, processor, ["cat.jpg", "dog.jpg"])  # (2, 512) for ViT-B/32
    """
    if settings:
        _check_settings(settings)
    check_batch_size(batch_size)
    check_width(model, truncate_dim)
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
                error.index = None if is_one else done + (error.index or 0)
                raise
            features.append(encode_pixels(model, pixels))
            done += len(batch)
            update(len(batch))
    return truncated(torch.cat(features), truncate_dim)
