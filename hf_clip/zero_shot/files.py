"""Many images, one after the other: found in folders, opened ahead of the model, classified in order.

Threads open, turn and resize the images that come next while the model encodes a batch. What waits is small: pixels of
the model's size, for two batches at most. An image that cannot be opened is a result too, with its error.

Dimensions: B images of a batch, C channels, Y × X pixels.
"""

import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from ..model.fetch import is_web_address
from ..model.open_image import RASTER_FORMATS, UnreadableImageError, open_image

MOST_THREADS = 8
Named = TypeVar("Named")
Made = TypeVar("Made")
Found = TypeVar("Found")


def image_suffixes() -> frozenset[str]:
    """How the names of files that hold images end, in small letters, with the dot."""
    return _suffixes_of(len(Image.registered_extensions()))


@lru_cache(maxsize=1)
def _suffixes_of(known: int) -> frozenset[str]:
    """Those of Pillow's formats, of which there are more once a plugin has registered its own."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in RASTER_FORMATS)


def is_image_name(name: str | Path) -> bool:
    """Whether a file's name ends as those of images do."""
    return Path(name).suffix.lower() in image_suffixes()


def _never_ends(path: str) -> bool:
    """Whether a path is a pipe, socket or device, whose reader may wait forever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False  # whoever opens it gets the error
    return not stat.S_ISREG(mode)


def find_images(places: Iterable[str | Path]) -> list[str]:
    """The images of folders and their folders, in the order of their names, and what else is named.

    Args:
        places: Folders, of which files that are named as images are taken, hidden ones, links to folders, pipes and
            devices left out; and files and web addresses, which are taken as they are, also where there is no such
            file.

    Returns:
        Paths, as the places were named. A folder within a folder that may not be read is one of them.

    Raises:
        FileNotFoundError: A folder has no images.
        PermissionError: A named folder may not be read.
    """
    found: list[str] = []
    for place in map(str, places):
        if is_web_address(place) or not os.path.isdir(place):
            found.append(place)
            continue
        unread: list[OSError] = []
        images = []
        for folder, inner, files in os.walk(place, onerror=unread.append):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            names = [name for name in sorted(files) if is_image_name(name) and not name.startswith(".")]
            images += [path for name in names if not _never_ends(path := os.path.join(folder, name))]
        for error in unread:
            if error.filename == place:
                raise error
            images.append(error.filename)  # whoever opens it gets the same error
        if not images:
            raise FileNotFoundError(
                f"The folder {place} has no images: no file in it, or in its folders, is named as one, such as .jpg or "
                f".png. Name the files themselves, or another folder."
            )
        found += images
    return found


@dataclass(frozen=True)
class Classified:
    """One image's result.

    Attributes:
        name: The image's path, or what else it is called.
        labels: Labels with their scores, best first; empty where the image could not be opened.
        error: Why the image could not be opened, or None.
    """

    name: str
    labels: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def _in_words(error: ValueError) -> str:
    """What is wrong with an image whose name stands beside this."""
    problem = error.problem.lstrip(": ") if isinstance(error, UnreadableImageError) else str(error)
    return problem.removesuffix("; replace it, or leave it out.").removesuffix(".")


def in_order(
    items: Iterable[tuple[Named, Any]], make: Callable[[Any], Made], threads: int, ahead: int
) -> Generator[tuple[Named, "Future[Made]"], None, None]:
    """Let threads make something of images, such as pixel values, and yield it in order.

    Args:
        items: What each image is called, and the image itself. They are read as they are needed.
        make: Opens an image, and makes of it what is needed. It is called in a thread.
        threads: Number of threads.
        ahead: Largest number of images that are begun before they are asked for.

    Yields:
        What the image is called, and what is being made of it.
    """
    waiting: deque[tuple[Named, Future[Made]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="hf_clip images") as pool:
        try:
            for name, item in items:
                waiting.append((name, pool.submit(make, item)))
                if len(waiting) >= ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


class StreamClassifier(Protocol):
    """What `classify_stream` needs of a classifier, whatever computes: torch or ONNX Runtime."""

    @property
    def labels(self) -> list[str]:
        """The labels, of which results give some."""

    def pixels_of(self, image: Any, **settings: Any) -> Any:
        """Prepare one image: pixel values (3, y, x). Called in several threads."""

    def rank_pixels(self, pixels: list[Any], top_k: int | None) -> list[list[dict[str, Any]]]:
        """Encode a batch of them, and find the labels and scores of each image, best first."""


def classify_stream(
    classifier: StreamClassifier,
    items: Iterable[tuple[str, Any]],
    *,
    top_k: int | None = None,
    batch_size: int = 16,
    threads: int | None = None,
    opener: Callable[[Any], Any] = open_image,
    **settings: Any,
) -> Iterator[Classified]:
    """Classify images one batch after the other.

    Args:
        classifier: The labels, encoded; or a head.
        items: Names, and what `opener` makes images of; read as they are needed.
        top_k: How many labels to give for each image (default: all).
        batch_size: Images encoded at once.
        threads: How many open images (default: one for each core, at most 8).
        opener: Called in a thread; a ValueError of it becomes the image's error.
        **settings: For the image processor, e.g. fit="pad".

    Yields:
        A result for each item, in their order.
    """

    computed = batches_of_images(
        items,
        lambda item: classifier.pixels_of(opener(item), **settings),
        lambda pixels: classifier.rank_pixels(pixels, top_k),
        batch_size=batch_size,
        threads=threads,
    )
    for name, ranked, error in computed:
        yield Classified(name, [] if ranked is None else ranked, error)


def batches_of_images(
    items: Iterable[tuple[str, Any]],
    make: Callable[[Any], Made],
    compute: Callable[[list[Made]], Iterable[Found]],
    *,
    batch_size: int = 16,
    threads: int | None = None,
) -> Iterator[tuple[str, Found | None, str | None]]:
    """Open images in threads, and compute something of one batch of them after the other.

    Args:
        items: Names, and what `make` opens; read as they are needed.
        make: Opens an image and prepares it. Called in a thread; a ValueError of it becomes the image's error.
        compute: Computes something of a batch, a result for each image.
        batch_size: Images computed at once.
        threads: How many open images (default: one for each core, at most 8).

    Yields:
        Name, result and error of each item, in their order. Either the result or the error is None.
    """
    threads = threads or min(os.cpu_count() or 1, MOST_THREADS)
    waiting = in_order(items, make, threads, ahead=2 * batch_size + threads)
    while batch := list(islice(waiting, batch_size)):
        errors: list[str | None] = []
        made: list[Made] = []
        for _, future in batch:
            try:
                made.append(future.result())
                errors.append(None)
            except ValueError as error:
                errors.append(_in_words(error))
        computed = iter(compute(made) if made else [])
        for (name, _), problem in zip(batch, errors, strict=True):
            yield name, next(computed) if problem is None else None, problem


__all__ = [
    "Classified",
    "batches_of_images",
    "classify_stream",
    "find_images",
    "image_suffixes",
    "in_order",
    "is_image_name",
]
