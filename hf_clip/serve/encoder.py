"""From what a request asks for to features: texts are tokenized, images opened in threads, both encoded in batches.

Dimensions: I items, D embedding.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..inference.needed_positions import skips_padding
from ..model.open_image import UnreadableImageError
from ..zero_shot.files import MOST_THREADS
from .batching import IMAGES, MOST_PADDING, TEXTS, Batcher, DroppedError, Job, QueueFullError
from .decoding_memory import DecodingMemory
from .public_fetch import PublicFetcher
from .request_error import RequestError
from .serve_options import ServeOptions
from .served_model import ServedModel
from .untrusted_image import BYTES_FOR_PIXEL, allow_pixels, decode_image_text, is_url, open_untrusted

LETTERS_AT_ONCE = 20_000
"""Texts with more letters together are tokenized in a thread, since the event loop would stand still for
milliseconds."""


MOST_FETCHED = 16
"""Images of addresses that are fetched, or wait to be opened, at the same time: their bytes are in memory."""

MOST_OF_ONE = 8
"""Images of one request that are fetched or opened at the same time. Those of other requests come between."""


@dataclass(frozen=True)
class TextItem:
    """A text to encode.

    Attributes:
        text: The text.
        name: What the request calls it.
    """

    text: str
    name: str = "input"


@dataclass(frozen=True)
class TokensItem:
    """A text that the client has tokenized.

    Attributes:
        ids: Its ids, with start and end.
    """

    ids: Sequence[int]


@dataclass(frozen=True)
class ImageItem:
    """An image to encode.

    Attributes:
        source: A data URI, base64, an address, or the file's bytes.
        name: What the request calls it.
    """

    source: str | bytes
    name: str = "input"


Item = TextItem | TokensItem | ImageItem


@dataclass(frozen=True)
class Encoded:
    """Features of the items of a request.

    Attributes:
        features: (I, D) float32, of length one.
        tokens: Tokens of the texts together.
        sizes: For each image its width and height, upright.
    """

    features: np.ndarray
    tokens: int
    sizes: list[tuple[int, int]]


def check_count(count: int, most: int) -> None:
    """Raise RequestError if a request has no items, or too many."""
    if count == 0:
        raise RequestError(400, "input is empty: send at least one text or image.", "empty_input", "input")
    if count > most:
        raise RequestError(
            413,
            f"input has {count:,} items, but at most {most:,} are allowed: send several requests.",
            "too_many_items",
            "input",
        )


class Encoder:
    """Encodes the items of requests.

    Args:
        served: The model.
        options: What is allowed.
        fetcher: Fetches addresses. None: they are refused.
        on_batch: As for `Batcher`.
    """

    def __init__(
        self,
        served: ServedModel,
        options: ServeOptions,
        fetcher: PublicFetcher | None = None,
        on_batch: Callable[[str, int, float], None] = lambda kind, size, seconds: None,
    ):
        self.served, self.options, self.fetcher = served, options, fetcher
        self.batcher = Batcher(
            served.encode_texts,
            served.encode_images,
            served.width,
            text_batch=options.text_batch,
            image_batch=options.image_batch,
            most_texts=options.most_waiting_texts,
            most_images=options.most_waiting_images,
            most_padding=None if skips_padding(served.model) else MOST_PADDING,
            on_batch=on_batch,
            computing=served.computing,
        )
        self._threads = options.threads or min(os.cpu_count() or 1, MOST_THREADS)
        self._fetching = asyncio.Semaphore(MOST_FETCHED)
        self._pool: ThreadPoolExecutor | None = None
        self._decoding = DecodingMemory(BYTES_FOR_PIXEL * options.most_pixels)
        allow_pixels(options.most_pixels)

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that open images."""
        self.start()
        assert self._pool is not None
        return self._pool

    def start(self) -> None:
        """Start the threads, unless that was done. An app that is mounted in another one is not told when to."""
        if self._pool is not None:
            return
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="hf_clip images")

    def close(self) -> None:
        """Finish what was begun, and end the threads that open images."""
        self.pool.shutdown(wait=True)
        self.batcher.close()

    async def encode(self, items: Sequence[Item], truncate: bool | None = None) -> Encoded:
        """Encode the items of a request. If the caller is cancelled, what is not computed yet is dropped.

        Args:
            items: Texts and images.
            truncate: Whether texts that are too long are cut. None: as the server was told.

        Raises:
            RequestError: An item cannot be used, there are too many, or too much waits.
        """
        places: dict[str, list[int]] = {TEXTS: [], IMAGES: []}
        for place, item in enumerate(items):
            places[IMAGES if isinstance(item, ImageItem) else TEXTS].append(place)
        images = [item for item in items if isinstance(item, ImageItem)]
        self._check_counts(len(items), images)
        self.start()
        rows = await self._tokenized(items, self.options.truncate if truncate is None else truncate)
        jobs: dict[str, Job] = {}
        opening: list[asyncio.Task[Any]] = []
        try:
            for kind, own in places.items():
                if own:
                    jobs[kind] = self.batcher.open(kind, len(own))
            if rows:
                self.batcher.put(jobs[TEXTS], 0, rows)
            turns = asyncio.Semaphore(MOST_OF_ONE)
            opening = [
                asyncio.ensure_future(self._put_image(jobs, place, item, turns)) for place, item in enumerate(images)
            ]
            features = np.empty((len(items), self.served.width), dtype=np.float32)
            for kind, job in jobs.items():
                found: np.ndarray = await asyncio.wrap_future(job.done)
                features[places[kind]] = found
            sizes = [await task for task in opening]
        except QueueFullError as error:
            raise RequestError(
                429, str(error), "rate_limit_exceeded", headers={"Retry-After": str(error.seconds)}
            ) from None
        finally:
            for task in opening:
                task.cancel()
            for job in jobs.values():
                self.batcher.drop(job)
        return Encoded(features, sum(map(len, rows)), sizes)

    def _check_counts(self, count: int, images: Sequence[ImageItem]) -> None:
        options = self.options
        check_count(count, options.most_items)
        if len(images) > options.most_images:
            raise RequestError(
                413,
                f"input has {len(images):,} images, but at most {options.most_images:,} are allowed: send several "
                f"requests.",
                "too_many_items",
                "input",
            )
        for image in images:
            if self.fetcher is None and isinstance(image.source, str) and is_url(image.source):
                raise RequestError(
                    400,
                    f"{image.name} is an address, and this server fetches none: send the image itself as a data URI. "
                    f"Whoever runs the server may allow addresses with --allow-urls.",
                    "urls_not_allowed",
                    "input",
                )

    async def _tokenized(self, items: Sequence[Item], truncate: bool) -> list[np.ndarray]:
        """The token ids of all texts, in their order."""
        texts = [item for item in items if isinstance(item, TextItem)]
        for item in texts:
            if not item.text.strip():
                raise RequestError(400, f"{item.name} is empty: send a text.", "empty_input", "input")
        plain, names = [item.text for item in texts], [item.name for item in texts]
        letters = sum(map(len, plain))
        if letters > self.options.most_letters:
            raise RequestError(
                413,
                f"The texts have {letters:,} letters together, but at most {self.options.most_letters:,} are allowed: "
                f"send several requests, or shorter texts.",
                "too_many_letters",
                "input",
            )
        found: list[np.ndarray] = []
        if letters > LETTERS_AT_ONCE:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self.pool, self.served.token_ids, plain, names, truncate)
        elif plain:
            found = self.served.token_ids(plain, names, truncate)
        tokenized = iter(found)
        return [
            self.served.check_token_ids(item.ids, place) if isinstance(item, TokensItem) else next(tokenized)
            for place, item in enumerate(items)
            if not isinstance(item, ImageItem)
        ]

    async def _put_image(
        self, jobs: dict[str, Job], place: int, item: ImageItem, turns: asyncio.Semaphore
    ) -> tuple[int, int]:
        """Open an image, and let its pixels wait for their batch. Returns its width and height.

        If it cannot be opened, all jobs of its request are dropped: nothing more is computed before that is told.
        """
        job, source = jobs[IMAGES], item.source
        try:
            async with turns:
                if self.fetcher is not None and isinstance(source, str) and is_url(source):
                    async with self._fetching:
                        return await self._opened(job, place, await self.fetcher.fetch(source, item.name), item.name)
                return await self._opened(job, place, source, item.name)
        except Exception as error:
            for each in jobs.values():
                self.batcher.drop(each, error)
            raise DroppedError from error

    async def _opened(self, job: Job, place: int, source: str | bytes, name: str) -> tuple[int, int]:
        return await asyncio.get_running_loop().run_in_executor(self.pool, self._open_and_put, job, place, source, name)

    def _open_and_put(self, job: Job, place: int, source: str | bytes, name: str) -> tuple[int, int]:
        if job.is_dropped:
            raise DroppedError("nobody waits for it")
        content = decode_image_text(source, name) if isinstance(source, str) else source
        with ExitStack() as held:
            image = open_untrusted(
                content,
                name,
                self.options.most_pixels,
                lambda count: held.enter_context(self._decoding.holding(count)),
            )
            size = image.size
            try:
                pixels = self.served.pixels_of(image)
            except UnreadableImageError as error:
                raise RequestError(400, f"{name}{error.problem}", "invalid_image", "input") from None
            finally:
                image.close()
        self.batcher.put(job, place, [pixels])
        return size


__all__ = ["Encoded", "Encoder", "ImageItem", "Item", "TextItem", "TokensItem", "check_count"]
