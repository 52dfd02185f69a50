"""Dynamic batching: one thread calls the model, with as many waiting texts or images as fit into a batch.

1. The thread takes what is there, and never waits for more. A lone request is therefore computed at once, and while a
   batch is computed the next one gathers.
2. Texts and images take turns, batch by batch. Of a kind, what has the lowest ranks is taken; if the model computes
   padding, the text of the lowest rank and those of about its length, so that a batch needs little of it.
3. The rank of a request's first text or image is how many had been computed when it came, and each further one has a
   rank that is `SHARE` higher. A small request therefore passes large ones that came before it. Nothing waits for
   ever, since later ones have higher ranks.
4. What waits is bounded. A request that does not fit is refused, with the seconds after which it may. A quarter of the
   room is kept for small requests.
5. What nobody waits for any more is not computed.

Dimensions: B batch, D embedding.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np

from ..inference.computing_thread import ComputingThread

TEXTS, IMAGES = "text", "image"
RANK = attrgetter("rank")

MOST_PADDING = 16
"""Positions of padding that a batch of texts may have. More would cost more than a batch of its own for the texts that
need it: a batch of ViT-B/32 costs as much as its positions and 10 to 20 more, since the weights are read anew."""

SHARE = 8
"""So many texts or images of later requests may be computed for each one of a large request that waits."""

LONGEST_WAIT = 60
"""Most seconds after which a client is told to ask again."""


class QueueFullError(Exception):
    """So much waits that nothing more is taken.

    Attributes:
        kind: "text" or "image".
        seconds: When to ask again.
    """

    def __init__(self, kind: str, seconds: int):
        super().__init__(kind, seconds)
        self.kind, self.seconds = kind, seconds

    def __str__(self) -> str:
        return f"Too many {self.kind}s are waiting; ask again in {self.seconds} s."


class Job:
    """The texts or the images of one request, which are encoded in one or several batches.

    Attributes:
        kind: "text" or "image".
        features: (count, D) float32, filled in as batches are done.
        done: Gets the features when all are there, or the error.
        is_dropped: Whether nobody waits for it any more.
        start: How much of its kind had been computed when it came.
    """

    def __init__(self, kind: str, count: int, width: int, start: int = 0):
        self.kind, self.count, self.start = kind, count, start
        self.features = np.empty((count, width), dtype=np.float32)
        self.done: Future[np.ndarray] = Future()
        self.done.set_running_or_notify_cancel()  # what awaits it may be cancelled, and this is not
        self.is_dropped = False
        self._left = count
        self._lock = threading.Lock()

    def take(self, places: Sequence[int], rows: np.ndarray) -> bool:
        """Fill in some features, (B, D). Returns whether they were the last."""
        self.features[list(places)] = rows
        with self._lock:
            self._left -= len(places)
            return self._left == 0


@dataclass(eq=False, slots=True)
class Waiting:
    """One text or image that waits.

    Attributes:
        job: Whose it is.
        place: Its place in the job.
        value: Token ids, or pixel values.
        ticket: How many arrived before it.
        rank: What is of a lower rank is computed first; of equal ranks, what arrived first.
    """

    job: Job
    place: int
    value: Any
    ticket: int
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.job.start + SHARE * self.place


def texts_of_one_length(waiting: Sequence[Waiting], most: int, most_padding: int = MOST_PADDING) -> list[Waiting]:
    """The first text, and those of about its length, which add the least padding.

    Args:
        waiting: All texts that wait, in the order of their ranks.
        most: Texts in a batch, at most.
        most_padding: Positions of padding in a batch, at most.

    Returns:
        At most `most` texts, the shortest first.
    """
    ordered = sorted(waiting, key=lambda item: len(item.value))  # stable: of equal length, the earlier first
    lengths = [len(item.value) for item in ordered]
    low = high = ordered.index(waiting[0])
    padding = 0.0
    while high - low + 1 < most:
        longer = (high - low + 1) * (lengths[high + 1] - lengths[high]) if high + 1 < len(lengths) else math.inf
        shorter = lengths[high] - lengths[low - 1] if low > 0 else math.inf
        padding += min(longer, shorter)
        if padding > most_padding:
            break
        low, high = (low, high + 1) if longer <= shorter else (low - 1, high)
    return ordered[low : high + 1]


class Batcher:
    """Encodes the texts and images of many requests in batches, in one thread.

    Args:
        encode_texts: Function from token ids of texts, a list of arrays (L,), to features (B, D), float32.
        encode_images: Function from pixel values of images, a list of tensors, to features (B, D), float32.
        width: D.
        text_batch: Texts in a batch, at most.
        image_batch: Images in a batch, at most.
        most_texts: Texts that may wait, those in the batch at work included.
        most_images: Images that may wait.
        most_padding: Positions of padding in a batch of texts, at most. None: the model computes no padding.
        on_batch: Called after each batch with "text" or "image", its size and its seconds.
        computing: The thread. None: one of its own.
    """

    def __init__(
        self,
        encode_texts: Callable[[list[Any]], np.ndarray],
        encode_images: Callable[[list[Any]], np.ndarray],
        width: int,
        *,
        text_batch: int = 64,
        image_batch: int = 16,
        most_texts: int = 8192,
        most_images: int = 256,
        most_padding: int | None = MOST_PADDING,
        on_batch: Callable[[str, int, float], None] = lambda kind, size, seconds: None,
        computing: ComputingThread | None = None,
    ):
        self.width, self._computing = width, computing or ComputingThread()
        self._encode = {TEXTS: encode_texts, IMAGES: encode_images}
        self._batch = {TEXTS: text_batch, IMAGES: image_batch}
        self._most = {TEXTS: most_texts, IMAGES: most_images}
        self._on_batch, self._most_padding = on_batch, most_padding
        self._queues: dict[str, list[Waiting]] = {TEXTS: [], IMAGES: []}
        self._admitted = {TEXTS: 0, IMAGES: 0}
        self._computed = {TEXTS: 0, IMAGES: 0}
        self._last = IMAGES  # the kind of the last batch
        self._pace = {TEXTS: 0.01, IMAGES: 0.05}  # seconds per item, of late
        self._tickets = 0
        self._lock = threading.Lock()
        self._has_turn = False  # to come

    def close(self) -> None:
        """Compute what waits."""
        self._computing.run(self._compute_next)  # has its turn once the batch at work is done
        while any(self._queues.values()):
            self._computing.run(self._compute_next)

    def waiting(self, kind: str) -> int:
        """How many texts or images are admitted and not done."""
        return self._admitted[kind]

    def open(self, kind: str, count: int) -> Job:
        """Admit the texts or images of a request, which `put` brings one by one or together.

        Args:
            kind: "text" or "image".
            count: How many there are.

        Returns:
            The job. Its `done` is a future of the features (count, D), float32.

        Raises:
            QueueFullError: There is no room for them.
        """
        with self._lock:
            admitted, most = self._admitted[kind], self._most[kind]
            is_small = count <= self._batch[kind] or not admitted  # alone, a large one keeps nobody out
            if admitted + count > (most if is_small else most * 3 // 4):
                seconds = math.ceil(self._pace[kind] * admitted)
                raise QueueFullError(kind, min(max(seconds, 1), LONGEST_WAIT))
            self._admitted[kind] += count
        job = Job(kind, count, self.width, self._computed[kind])
        job.done.add_done_callback(lambda _: self._leave(job))
        return job

    def _leave(self, job: Job) -> None:
        with self._lock:
            self._admitted[job.kind] -= job.count

    def put(self, job: Job, first: int, values: Sequence[Any]) -> None:
        """Let values of a job wait for their batch.

        Args:
            job: What `open` returned.
            first: Place of the first value in the job.
            values: Token ids or pixel values.
        """
        if job.is_dropped:
            return
        with self._lock:
            for place, value in enumerate(values, start=first):
                self._queues[job.kind].append(Waiting(job, place, value, self._tickets))
                self._tickets += 1
            self._ask_for_turn()

    def drop(self, job: Job, error: BaseException | None = None) -> None:
        """Compute no more of a job: nobody waits for it, or one of its images cannot be opened.

        Args:
            job: What `open` returned.
            error: What `done` of the job raises. None: DroppedError.
        """
        with self._lock:
            if job.is_dropped or job.done.done():
                return
            job.is_dropped = True
            self._queues[job.kind] = [item for item in self._queues[job.kind] if item.job is not job]
        job.done.set_exception(error or DroppedError("nobody waits for it"))

    def _ask_for_turn(self) -> None:
        """Ask for one turn of the thread, however much waits: other work of it has its turn between two batches."""
        if not self._has_turn and any(self._queues.values()):
            self._has_turn = True
            self._computing.submit(self._compute_next)

    def _compute_next(self) -> None:
        """Compute a batch, if anything still waits."""
        with self._lock:
            self._has_turn = False
            if not any(self._queues.values()):
                return
            kind, batch = self._take()
            self._ask_for_turn()
        self._compute(kind, batch)

    def _take(self) -> tuple[str, list[Waiting]]:
        """Take the next batch: of the other kind than the last one, if something of it waits."""
        kind = max((kind for kind in self._queues if self._queues[kind]), key=lambda kind: kind != self._last)
        queue, most = self._queues[kind], self._batch[kind]
        ranked = sorted(queue, key=RANK) if len(queue) > 1 else queue
        if kind == IMAGES or self._most_padding is None:
            batch = ranked[:most]
        else:
            batch = texts_of_one_length(ranked, most, self._most_padding)
        taken = {item.ticket for item in batch}
        self._queues[kind] = [item for item in queue if item.ticket not in taken]
        self._computed[kind] += len(batch)
        self._last = kind
        return kind, batch

    def _compute(self, kind: str, batch: list[Waiting]) -> None:
        start = time.perf_counter()
        jobs: dict[int, tuple[Job, list[int]]] = {}
        for row, item in enumerate(batch):
            jobs.setdefault(id(item.job), (item.job, []))[1].append(row)
        try:
            features = self._encode[kind]([item.value for item in batch])
        except Exception as error:  # of one batch; the server goes on
            for job, _ in jobs.values():
                self.drop(job, error)
            return
        seconds = time.perf_counter() - start
        self._pace[kind] += 0.2 * (seconds / len(batch) - self._pace[kind])
        self._on_batch(kind, len(batch), seconds)
        for job, rows in jobs.values():
            if job.take([batch[row].place for row in rows], features[rows]):
                self._finish(job)

    def _finish(self, job: Job) -> None:
        with self._lock:
            if job.is_dropped:
                return
            job.is_dropped = True  # from here on `drop` has nothing to do
        job.done.set_result(job.features)


class DroppedError(Exception):
    """A job was dropped before it was done."""


__all__ = ["IMAGES", "TEXTS", "Batcher", "DroppedError", "Job", "QueueFullError", "Waiting", "texts_of_one_length"]
