"""Encode the rows of a data set: threads open and prepare images while the model encodes those before.

Every model of the CLIP family will do: ours, transformers' CLIP and SigLIP, and others with `get_image_features` and
`get_text_features`. Features have length one, are float32 and lie on the CPU.

Dimensions: B batch, I images, T texts, D embedding.
"""

import itertools
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
from ..data.content import content_id
from ..data.images import NOWHERE, ImagePlaces, ImageRegion, image_content, open_content
from ..inference.cpu import count_cores
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.open_image import UnreadableImageError
from ..zero_shot.features import (
    check_texts,
    image_processor_of,
    tokenized_batches,
    tokenizer_of,
)
from ..zero_shot.files import in_order
from ..zero_shot.text_batches import check_batch_size, in_batches
from .feature_cache import CachedRows, FeatureCache
from .processes import current
from .unreadable_images import Unreadable, UnreadableImagesError

MOST_THREADS = 16

ROWS_BETWEEN_EXCHANGES = 128
"""Number of rows that each of several processes encodes before they exchange what they found."""


class NotFiniteFeaturesError(ValueError):
    """The model gives a feature that holds NaN or infinity.   name: of the image or text"""

    def __init__(self, message: str, name: str = ""):
        super().__init__(message, name)
        self.name = name

    def __str__(self) -> str:
        return str(self.args[0])


def open_stored(stored: Any, places: ImagePlaces = NOWHERE) -> Image.Image:
    """Open an image, or a region of one, as a row holds it. Raises UnusableRowError if it cannot be opened."""
    if isinstance(stored, ImageRegion):
        image, (left, top, right, bottom) = open_stored(stored.stored, places), stored.box
        if left >= image.width or top >= image.height or right <= 0 or bottom <= 0:
            raise UnusableRowError(f"its box {stored.box} lies outside of its image of {image.width}x{image.height}")
        return image.crop(stored.box)
    return stored if isinstance(stored, Image.Image) else open_content(image_content(stored, places))


def _is_ours(model: Any) -> bool:
    # By its methods: compiled models and those of remote code are of other classes.
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def _of_length_one(found: Any) -> Tensor:
    """Return features (B, D) of length one, float32, on the CPU, out of what a model gives."""
    found = found if isinstance(found, Tensor) else found.pooler_output
    return normalize(found.float(), dim=-1).cpu()


class Row(NamedTuple):
    """What is encoded: a row of a data set with the place it has there, among all rows from 0."""

    place: int
    row: Any


NOT_OWN = object()
"""Stands for an image that another process encodes."""


@dataclass
class _Found:
    """What is found in a block of rows.

    Attributes:
        kept: The places of the rows whose images can be opened.
        lost: The places of the others, and the reasons.
        features: (kept, D), float32.
    """

    kept: list[int] = field(default_factory=list)
    lost: list[tuple[int, str]] = field(default_factory=list)
    features: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


@dataclass
class _Block:
    """Rows whose images are encoded at once, by one process."""

    rows: list[Row]
    found: _Found = field(default_factory=_Found)

    def row_at(self, place: int) -> Any:
        """The data set's row of a place."""
        return self.rows[place - self.rows[0].place].row


class Embedder:
    """Encodes images and texts with one model, together with the other processes within `processes.connected`.

    All processes give it the same rows and texts in the same order. Each encodes its share, and all get all features.

    Args:
        model: A model of the CLIP family, in evaluation mode; `evaluating` puts it there.
        processor: Its processor.
        batch_size: Number of images in a batch; one of texts has twice as many.
        threads: Number of threads that open and prepare images. None: this process's share of the processors.

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
        self.processes = current()
        self.threads = threads or max(1, min(count_cores() // self.processes.local_count, MOST_THREADS))

    @property
    def precision(self) -> str:
        """The dtype that the model computes in, such as "float32"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def text_limit(self) -> int:
        """Number of tokens that the text tower takes."""
        config = self.model.config
        return int(getattr(config, "text_config", config).max_position_embeddings)

    def cache_in(self, folder: Any, fingerprint: str | None, features: str | None = None) -> FeatureCache | None:
        """Open the cache of what this computes of one data set, see `FeatureCache`. None without a folder."""
        if folder is None:
            return None
        return FeatureCache(folder, self.model, self.processor, self.precision, fingerprint, features)

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
        found: list[tuple[Tensor, Tensor]] = []
        batches = self._text_batches(given, {"truncation": True} if truncation else {})
        for number, (places, tokens) in enumerate(batches):
            if self.processes.is_own(number):
                found.append((places, self._in_parts("texts", self._text_features, tokens)))
        features = self._of_all_processes(found, len(given))
        if not features.isfinite().all():
            place = int((~features.isfinite()).any(1).int().argmax())
            raise NotFiniteFeaturesError(
                f"The model's feature of the text {given[place][:80]!r} holds NaN: its weights are broken, or "
                f"{self.precision} is too coarse for it.",
                given[place],
            )
        return features

    def _of_all_processes(self, found: list[tuple[Tensor, Tensor]], count: int) -> Tensor:
        """Put the features of all processes at their places among `count` texts."""
        widths = self.processes.exchange(found[0][1].shape[1] if found else 0, f"{count} texts")
        features = torch.zeros(count, max(widths))
        for places, values in found:
            features[places] = values
        return self.processes.reduce(features, f"features of {count} texts")

    def _text_batches(self, texts: list[str], settings: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the places of texts and their tokens, batch by batch."""
        size = 2 * self.batch_size
        if _is_ours(self.model):
            check_texts(self.model, self.processor, texts, len(texts), settings)
            for places, ids in tokenized_batches(self.model, self.processor, texts, batch_size=size, settings=settings):
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
        """Return rows with their pixel values, which threads compute up to two batches ahead.

        The rows of other processes come without pixel values.
        """

        def prepare(stored: Any) -> Tensor:
            return torch.zeros(0) if stored is NOT_OWN else self.prepare(open_stored(stored, places))

        count = self.processes.count
        items = (
            (row, row.row.image if self.processes.is_own(number // self.batch_size) else NOT_OWN)
            for number, row in enumerate(rows)
        )
        return in_order(items, prepare, self.threads, ahead=count * (2 * self.batch_size + self.threads))

    def _encoded(self, rows: Iterable[Row], places: ImagePlaces, source: str) -> Iterator[_Block]:
        """Yield blocks of rows with their features, in order. Each process encodes one of R blocks.

        A block has the same rows with any number of processes, so the model computes the same.
        """
        waiting: list[_Block] = []
        count = self.processes.count
        most = 1 if count == 1 else count * max(1, ROWS_BETWEEN_EXCHANGES // self.batch_size)
        for number, prepared in enumerate(in_batches(self._prepared(rows, places), self.batch_size)):
            block = _Block([row for row, _ in prepared])
            if self.processes.is_own(number):
                block.found = self._encode_block(block, [pixels for _, pixels in prepared])
            waiting.append(block)
            if len(waiting) == most:
                yield from self._complete(waiting, source)
                waiting = []
        yield from self._complete(waiting, source)

    def _encode_block(self, block: _Block, prepared: "list[Future[Tensor]]") -> _Found:
        found, pixels = _Found(), list[Tensor]()
        for row, future in zip(block.rows, prepared, strict=True):
            try:
                pixels.append(future.result())
                found.kept.append(row.place)
            except (UnusableRowError, UnreadableImageError) as error:
                found.lost.append((row.place, str(error)))
        if pixels:
            found.features = self.encode(torch.stack(pixels))
        if not (is_finite := found.features.isfinite().all(1)).all():
            name = block.row_at(found.kept[int((~is_finite).int().argmax())]).name
            raise NotFiniteFeaturesError(
                f"The model's feature of {name} holds NaN: its weights are broken, or {self.precision} is too coarse "
                f"for it.",
                name,
            )
        return found

    def _complete(self, blocks: list[_Block], source: str) -> list[_Block]:
        """Give the others what this process found in its blocks, and take what they found in theirs."""
        rank, count = self.processes.rank, self.processes.count
        if count == 1 or not blocks:
            return blocks
        names = content_id("\0".join(row.row.name for block in blocks for row in block.rows))
        what = f"row {blocks[0].rows[0].place} of {source} (names {names:x})"
        for process, given in enumerate(self.processes.exchange([block.found for block in blocks[rank::count]], what)):
            for block, found in zip(blocks[process::count], given, strict=True):
                block.found = found
        return blocks

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
        for block in self._encoded(numbered, places, unreadable.source):
            found = block.found
            for place, reason in found.lost:
                unreadable.add(block.row_at(place).name, reason)
            unreadable.seen += len(block.rows)
            if cache is not None:
                reasons = unreadable.reasons[len(unreadable.reasons) - len(found.lost) :]
                cache.add(found.kept, [place for place, _ in found.lost], reasons, found.features)
            if found.kept:
                yield [block.row_at(place) for place in found.kept], found.features
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


__all__ = ["Embedder", "NotFiniteFeaturesError", "Row", "Unreadable", "UnreadableImagesError", "open_stored"]
