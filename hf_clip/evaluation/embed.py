"""Encode the rows of a data set: threads open and prepare images while the model encodes those before.

Every model of the CLIP family will do: ours, transformers' CLIP and SigLIP, and others with `get_image_features` and
`get_text_features`. Features have length one, are float32 and lie on the CPU.

Dimensions: B batch, I images, T texts, D embedding.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..data.columns import UnusableRowError
from ..data.images import NOWHERE, ImagePlaces, ImageRegion, image_content, open_content
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.open_image import UnreadableImageError
from ..zero_shot.features import check_batch_size, check_texts, image_processor_of, text_batches, tokenizer_of
from ..zero_shot.files import in_order
from .feature_cache import CachedRows, FeatureCache

MOST_UNREADABLE = 0.01
"""The part of a data set's images that may be unreadable. More would change the figures."""

SHOWN = 3
"""Number of unreadable images that an error names."""

MOST_THREADS = 16


class UnreadableImagesError(ValueError):
    """More images cannot be opened than a measurement may leave out.

    Attributes:
        count: Number of images that cannot be opened.
        total: Number of images that were looked at.
        reasons: For each of them its name and what is wrong.
    """

    def __init__(self, message: str, count: int = 0, total: int = 0, reasons: list[str] | None = None):
        super().__init__(message, count, total, reasons)
        self.count, self.total, self.reasons = count, total, reasons or []

    def __str__(self) -> str:
        return str(self.args[0])


class NotFiniteFeaturesError(ValueError):
    """The model gives a feature that holds NaN or infinity.   name: of the image or text"""

    def __init__(self, message: str, name: str = ""):
        super().__init__(message, name)
        self.name = name

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Unreadable:
    """The images of a data set that cannot be opened."""

    source: str
    total: int | None = None
    seen: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Count an image. Raises UnreadableImagesError once there are too many of a data set of known size."""
        self.reasons.append(f"{name}: {reason}")
        if self.total is not None:
            self.check(self.total)

    def check(self, total: int) -> None:
        """Raise UnreadableImagesError if too many of `total` images cannot be opened."""
        count = len(self.reasons)
        if count <= MOST_UNREADABLE * total:
            return
        shown = "; ".join(self.reasons[:SHOWN])
        raise UnreadableImagesError(
            f"{self.source}: {count} of {total} images cannot be opened, more than {MOST_UNREADABLE:.0%}, so the "
            f"figures would be of other data. Replace them, or leave them out: {shown}.",
            count,
            total,
            self.reasons,
        )


def open_stored(stored: Any, places: ImagePlaces = NOWHERE) -> Image.Image:
    """Open an image, or a region of one, as a row holds it. Raises UnusableRowError if it cannot be opened."""
    if isinstance(stored, ImageRegion):
        return open_stored(stored.stored, places).crop(stored.box)
    return stored if isinstance(stored, Image.Image) else open_content(image_content(stored, places))


def _is_ours(model: Any) -> bool:
    # By its methods: compiled models and those of remote code are of other classes.
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def _of_length_one(found: Any) -> Tensor:
    """Return features (B, D) of length one, float32, on the CPU, out of what a model gives."""
    found = found if isinstance(found, Tensor) else found.pooler_output
    return normalize(found.float(), dim=-1).cpu()


def _processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Row(NamedTuple):
    """What is encoded: a row of a data set with the place it has there, among all rows from 0."""

    place: int
    row: Any


class Embedder:
    """Encodes images and texts with one model.

    Args:
        model: A model of the CLIP family, in evaluation mode; `evaluating` puts it there.
        processor: Its processor.
        batch_size: Number of images in a batch; one of texts has twice as many.
        threads: Number of threads that open and prepare images. None: the number of processors.

    Attributes:
        at_once: Number of "images" and of "texts" that are encoded at once since a GPU ran out of memory.
    """

    def __init__(self, model: Any, processor: Any, *, batch_size: int = 32, threads: int | None = None):
        check_batch_size(batch_size)
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(model, method):
                raise ValueError(
                    f"The model is a {type(model).__name__}, which has no {method}: load a whole model of the CLIP "
                    f"family, with AutoModel.from_pretrained."
                )
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.at_once: dict[str, int] = {}
        self.threads = threads or min(_processors(), MOST_THREADS)

    @property
    def precision(self) -> str:
        """The dtype that the model computes in, such as "float32"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def text_limit(self) -> int:
        """Number of tokens that the text tower takes."""
        config = self.model.config
        return int(getattr(config, "text_config", config).max_position_embeddings)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep the model in evaluation mode within a `with` block."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def prepare(self, image: Image.Image) -> Tensor:
        """Turn an image into pixel values (C, Y, X)."""
        processor = image_processor_of(self.processor)
        own = {"num_threads": 1} if isinstance(processor, HfClipImageProcessor) else {}
        return processor(images=[image], return_tensors="pt", **own)["pixel_values"][0]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixel values (B, C, Y, X) → (B, D). A batch that does not fit a GPU's memory is divided."""
        return self._in_parts("images", lambda part: self._image_features(part["pixels"]), {"pixels": pixels})

    def _in_parts(
        self, kind: str, features_of: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]
    ) -> Tensor:
        """Encode B inputs of a kind → (B, D), as many at once as fit a GPU's memory, which is remembered."""
        count = len(next(iter(inputs.values())))
        found: list[Tensor] = []
        start = 0
        while start < count:
            stop = min(count, start + self.at_once.get(kind, count))
            try:
                found.append(features_of({name: values[start:stop] for name, values in inputs.items()}))
                start = stop
                continue
            except torch.OutOfMemoryError:
                if stop - start == 1:
                    raise
            self.at_once[kind] = (stop - start + 1) // 2
            torch.cuda.empty_cache()  # when the error is gone, which holds tensors
        return torch.cat(found)

    def _image_features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.device, self.model.dtype)
        if _is_ours(self.model):
            return _of_length_one(self.model.encode_image(pixels))
        return _of_length_one(self.model.get_image_features(pixel_values=pixels))

    def _text_features(self, tokens: dict[str, Tensor]) -> Tensor:
        tokens = {name: values.to(self.model.device) for name, values in tokens.items()}
        if _is_ours(self.model):
            return _of_length_one(self.model(**tokens).text_embeds)
        return _of_length_one(self.model.get_text_features(**tokens))

    @torch.inference_mode()
    def texts(self, texts: Iterable[str], *, truncation: bool = False) -> Tensor:
        """Encode texts. A batch that does not fit a GPU's memory is divided.

        Args:
            texts: T texts.
            truncation: Whether texts that are too long are cut. Otherwise they are an error for our models.

        Returns:
            (T, D), float32.

        Raises:
            TextTooLongError: A text is too long.
            NotFiniteFeaturesError: A feature holds NaN.
        """
        given = list(texts)
        found = torch.zeros(0, 0)
        for places, tokens in self._text_batches(given, {"truncation": True} if truncation else {}):
            features = self._in_parts("texts", self._text_features, tokens)
            if not found.numel():
                found = torch.zeros(len(given), features.shape[1])
            found[places] = features
        if not found.isfinite().all():
            place = int((~found.isfinite()).any(1).int().argmax())
            raise NotFiniteFeaturesError(
                f"The model's feature of the text {given[place][:80]!r} holds NaN: its weights are broken, or "
                f"{self.precision} is too coarse for it.",
                given[place],
            )
        return found

    def _text_batches(self, texts: list[str], settings: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the places of texts and their tokens, batch by batch."""
        size = 2 * self.batch_size
        if _is_ours(self.model):
            check_texts(self.model, self.processor, texts, len(texts), settings)
            for places, ids in text_batches(self.model, self.processor, texts, batch_size=size, settings=settings):
                yield places, {"input_ids": ids}
            return
        for places in torch.arange(len(texts)).split(size) if texts else ():
            yield places, self._foreign_tokens([texts[place] for place in places.tolist()])

    def _foreign_tokens(self, texts: list[str]) -> dict[str, Tensor]:
        settings: dict[str, Any] = {"truncation": True, "max_length": self.text_limit, "return_tensors": "pt"}
        if "siglip" in str(self.model.config.model_type):  # trained on texts that are padded to the full length
            tokens = dict(tokenizer_of(self.processor)(texts, padding="max_length", **settings))
            return {"input_ids": tokens["input_ids"]}
        return dict(tokenizer_of(self.processor)(texts, padding=True, **settings))

    def _prepared(self, rows: Iterable[Row], places: ImagePlaces) -> Iterator[tuple[Row, "Future[Tensor]"]]:
        """Return rows with their pixel values, which threads compute up to two batches ahead."""

        def prepare(stored: Any) -> Tensor:
            return self.prepare(open_stored(stored, places))

        items = ((row, row.row.image) for row in rows)
        return in_order(items, prepare, self.threads, ahead=2 * self.batch_size + self.threads)

    def _batches(
        self, rows: Iterable[Row], places: ImagePlaces, unreadable: Unreadable
    ) -> Iterator[tuple[list[Row], list[int], Tensor]]:
        """Yield rows that can be read, the places of those that cannot, and features (B, D)."""
        kept: list[Row] = []
        pixels: list[Tensor] = []
        lost: list[int] = []
        for row, future in itertools.chain(self._prepared(rows, places), [(None, None)]):
            if row is not None and future is not None:
                try:
                    pixels.append(future.result())
                    kept.append(row)
                except (UnusableRowError, UnreadableImageError) as error:
                    lost.append(row.place)
                    unreadable.add(row.row.name, str(error))
            if kept and (row is None or len(kept) >= self.batch_size):
                features = self.encode(torch.stack(pixels))
                self._check_finite(features, kept)
                yield kept, lost, features
                kept, pixels, lost = [], [], []
        if lost:
            yield [], lost, torch.zeros(0, 0)

    def _check_finite(self, features: Tensor, rows: list[Row]) -> None:
        if not (is_finite := features.isfinite().all(1)).all():
            name = rows[int((~is_finite).int().argmax())].row.name
            raise NotFiniteFeaturesError(
                f"The model's feature of {name} holds NaN: its weights are broken, or {self.precision} is too coarse "
                f"for it.",
                name,
            )

    def images(
        self,
        rows: Iterable[Any],
        *,
        places: ImagePlaces = NOWHERE,
        unreadable: Unreadable,
        cache: FeatureCache | None = None,
    ) -> Iterator[tuple[list[Any], Tensor]]:
        """Encode the images of rows, in order, without those that cannot be opened.

        Args:
            rows: Rows with `name` and `image`.
            places: Where paths in the rows may lead.
            unreadable: Where images that cannot be opened are counted.
            cache: Features that are known already are taken from here, and others are added.

        Yields:
            Rows, and their features (B, D).

        Raises:
            UnreadableImagesError: Too many images cannot be opened.
            NotFiniteFeaturesError: A feature holds NaN.
        """
        numbered = (Row(place, row) for place, row in enumerate(rows))
        for known in cache.read() if cache is not None else ():
            yield from self._known(known, numbered, unreadable)
        for kept, lost, features in self._batches(numbered, places, unreadable):
            unreadable.seen += len(kept) + len(lost)
            if cache is not None:
                reasons = unreadable.reasons[len(unreadable.reasons) - len(lost) :] if lost else []
                cache.add([row.place for row in kept], lost, reasons, features)
            if kept:
                yield [row.row for row in kept], features
        if cache is not None:
            cache.finish()
        unreadable.check(unreadable.seen)

    def _known(
        self, known: CachedRows, numbered: Iterator[Row], unreadable: Unreadable
    ) -> Iterator[tuple[list[Any], Tensor]]:
        """Yield the rows of a shard of the cache, which are read and not opened."""
        rows = list(itertools.islice(numbered, known.stop - known.start))
        if len(rows) < known.stop - known.start:
            raise ValueError(
                f"The feature cache {known.path} holds {known.stop} rows of {unreadable.source}, which has "
                f"{known.start + len(rows)} now; remove that folder."
            )
        unreadable.seen += len(rows)
        for reason in known.reasons:
            name, _, why = reason.partition(": ")
            unreadable.add(name, why)
        if known.rows:
            yield [rows[place - known.start].row for place in known.rows], known.features
