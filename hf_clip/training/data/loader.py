"""Batches for contrastive training, shared out among processes. A run can go on from any of them.

A global batch is the next `batch_size` × `num_processes` rows of the order. Process p prepares rows p·batch_size to
(p + 1)·batch_size of it. Together the processes have what one process with the whole batch would have. So the loader
does not go through `Accelerator.prepare`, which would share it out again.

The main process makes the order and worker processes prepare the rows, so the batches don't depend on how many workers
there are. Every process of a run reads a whole stream and decodes its own share of it.

Invariant: a batch is a function of (seed, epoch, its number), and starting at batch n prepares nothing before it.
"""

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..stopping import heed_in_worker
from .bad_rows import BadRows
from .collator import Batch, PairCollator, Plan, Preparation
from .pair_table import Draw
from .pairs import Pairs, PairStream
from .read_ahead import read_ahead

logger = logging.getLogger(__name__)

SPARES = 8
"""Rows behind a batch that may step in for those of it that cannot be used."""


KILLED = "DataLoader worker"
"""How torch's error begins for a worker that has ended by itself."""


GONE = (EOFError, ConnectionError, FileNotFoundError)
"""Errors of taking what a worker had prepared before it was killed: its memory is reached through the worker."""

RAISED = "Caught "
"""How an error begins that a worker itself has raised."""

PINNING, IN_PINNING = "Pin memory thread exited unexpectedly", "in pin memory thread"
"""torch's error where a thread takes batches from the workers and puts them into pinned memory. Any of `GONE` ends that
thread, and little else does: what goes wrong with the pinning itself is handed on, as an error with the second text."""


def _is_of_killed_worker(error: Exception, num_workers: int) -> bool:
    """Whether an error of taking the next batch says that a worker was killed."""
    text = str(error)
    is_raised = text.startswith(RAISED) and IN_PINNING not in text.partition("\n")[0]
    is_lost = text.startswith(PINNING) or (isinstance(error, GONE) and not is_raised)
    return text.startswith(KILLED) or (is_lost and num_workers > 0)


def iterate(loader: DataLoader) -> Iterator[Any]:
    """Start the workers of a loader, and leave the handler for the end of child processes as it was.

    With torch's own handler a worker's end would be raised wherever this process is at the moment, such as in an
    exchange with other processes. Without it, it is raised to whoever asks for the next batch.

    Args:
        loader: of which the batches are asked for.
    """
    is_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if is_main else None
    found = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return found


class WorkerKilledError(OSError):
    """Workers were killed again and again.

    Attributes:
        data: the name of what they prepared.
    """

    def __init__(self, data: str):
        self.data = data
        super().__init__(
            f"A worker that prepares rows of {data} was killed, and again after it was started anew: perhaps by the "
            f"system, which had no memory left. Take fewer --dataloader_num_workers, or none."
        )

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.data,)


@dataclass
class Restarts:
    """Whether workers were started anew already, which is done once."""

    are_used_up: bool = False


def with_restart(
    start: Callable[[int, bool], Iterator[Any]], num_workers: int, data: str, restarts: Restarts
) -> Generator[Any, None, None]:
    """What workers make. When one is killed, all start anew, with the item that is missing.

    Args:
        start: From how many items are done, and whether this is a new start, to an iterator over the others.
        num_workers: How many there are.
        data: The name of what they prepare.
        restarts: Of these data.

    Yields:
        Each item once.

    Raises:
        WorkerKilledError: One was killed for the second time.
    """
    done, found = 0, start(0, False)
    while True:
        ended = ""
        try:
            item = next(found)
        except StopIteration:
            return
        except (RuntimeError, *GONE) as error:
            if not _is_of_killed_worker(error, num_workers):
                raise
            if restarts.are_used_up:
                raise WorkerKilledError(data) from error
            is_named = str(error).startswith(KILLED)
            ended = str(error).rstrip(".") if is_named else "A DataLoader worker exited unexpectedly"
        if ended:
            restarts.are_used_up = True
            logger.warning("%s; it is started anew, once.", ended)
            # Behind the except block nothing else holds the old workers: they are gone before the new ones begin.
            found = iter(())
            found = start(done, True)
            continue
        yield item
        done += 1


class Position(NamedTuple):
    """Where to go on: the epoch, and how many of its batches are done."""

    epoch: int = 0
    batch: int = 0


class _Plans:
    """The batches of one epoch as plans; `epoch` and `first_batch` are set before each iteration."""

    def __init__(self, draws: Callable[..., Iterator[Draw]], batch_size: int, num_processes: int, process_index: int):
        self.draws, self.batch_size = draws, batch_size
        self.global_size, self.first = batch_size * num_processes, batch_size * process_index
        self.is_training = True
        self.epoch = self.first_batch = 0

    def __iter__(self) -> Iterator[Plan]:
        draws = self.draws(self.epoch, first=self.first_batch * self.global_size)
        waiting: deque[Draw] = deque()
        while True:
            waiting.extend(islice(draws, self.global_size + SPARES - len(waiting)))
            drawn = [waiting.popleft() for _ in range(min(self.global_size, len(waiting)))]
            if not drawn or (self.is_training and len(drawn) < self.global_size):
                return
            # Where the epoch ends with the batch, its own rows step in.
            spares = [*waiting, *drawn][:SPARES] if self.is_training else []
            yield Plan(drawn[self.first : self.first + self.batch_size], spares, self.first)


def _as_it_is(batch: Any) -> Any:
    return batch


class PairLoader:
    """Batches of tensors on the CPU; see `build_loader`."""

    def __init__(
        self, pairs: Pairs | PairStream, plans: _Plans, start: Callable[[], DataLoader], bad_rows: BadRows | None
    ):
        self.pairs, self.plans, self.start, self.bad_rows = pairs, plans, start, bad_rows
        self.loader, self.restarts = start(), Restarts()
        self.is_finishing = True

    def __len__(self) -> int:
        """Batches in an epoch."""
        if isinstance(self.pairs, PairStream):
            raise TypeError("How many batches a stream has isn't known before it was read.")
        whole, rest = divmod(len(self.pairs), self.plans.global_size)
        return whole + (rest > 0 and not self.plans.is_training)

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of one epoch.

        Args:
            epoch: Its number.
            first_batch: The number of the batch to begin with.

        Raises:
            ValueError: Neither a row nor any of those that would step in for it can be used, or a stream has not enough
                rows for one batch.
            WorkerKilledError: Workers were killed for the second time.
        """
        is_empty = first_batch == 0
        for batch in self._prepared(epoch, first_batch):
            is_empty = False
            if isinstance(batch, ValueError):
                raise batch
            assert isinstance(batch, Batch)
            if self.bad_rows is not None:
                self.bad_rows.add(batch.drawn, batch.skipped, batch.cut, batch.negatives)
            if self.is_finishing:
                batch.tensors["pixel_values"] = batch.tensors["pixel_values"].to("cpu")
            yield batch.tensors
        if is_empty:
            raise ValueError(
                f"{self.pairs.name} has fewer rows than one batch of {self.plans.global_size}; lower "
                f"--per_device_train_batch_size."
            )
        if self.bad_rows is not None:
            self.bad_rows.complete()

    def _prepared(self, epoch: int, first_batch: int) -> Iterator[Any]:
        """What the workers make of an epoch. When one is killed, all start anew with the batch that is missing."""

        def start(done: int, is_anew: bool) -> Iterator[Any]:
            if is_anew:
                self.loader = self.start()
            self.plans.epoch, self.plans.first_batch = epoch, first_batch + done
            return iterate(self.loader)

        return with_restart(start, self.loader.num_workers, self.pairs.name, self.restarts)

    def batches(self, position: Position = Position()) -> Iterator[tuple[Position, dict[str, Tensor]]]:  # noqa: B008
        """Batches without end.

        Args:
            position: Where to begin.

        Yields:
            Each batch with the position behind it, from which a run can go on later.
        """
        epoch, first_batch = position
        while True:
            for number, batch in enumerate(self.epoch(epoch, first_batch), start=first_batch + 1):
                yield Position(epoch, number), batch
            epoch, first_batch = epoch + 1, 0


def build_loader(
    pairs: Pairs | PairStream,
    collator: PairCollator,
    batch_size: int,
    *,
    training: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    num_processes: int = 1,
    process_index: int = 0,
    bad_rows: BadRows | None = None,
    pin_memory: bool = False,
    finish_images: bool = True,
    keep_workers: bool = True,
) -> PairLoader:
    """Make the loader of one process of a run.

    Args:
        pairs: Where rows come from.
        collator: Prepares them.
        batch_size: Pairs of one process. Every process has as many in every batch.
        training: True gives full batches in random order. False gives all rows in their order: every process has as
            many batches, but in the last one some may have fewer rows or none, with tensors of shape (0, …).
        seed: Of the order.
        num_workers: Processes that open and prepare images.
        num_processes: Of the run.
        process_index: Which of them this is.
        bad_rows: Counts the rows of this process.
        pin_memory: Whether batches go into pinned memory.
        finish_images: True makes pixel_values tensors on the CPU. False leaves them as an `ImageBatch`, of which `to`
            makes tensors where the model is.
        keep_workers: Whether the processes wait for the next epoch, or end with each.

    Raises:
        ValueError: A batch has no negatives, or is larger than the data.
    """
    global_size = batch_size * num_processes
    if batch_size < 1 or (training and global_size < 2):
        raise ValueError(f"batch_size is {batch_size}, but a pair is learned against others: take at least 2.")
    if training and isinstance(pairs, Pairs) and len(pairs) < global_size:
        of_each = f" ({batch_size} in each of {num_processes} processes)" if num_processes > 1 else ""
        raise ValueError(
            f"{pairs.name} has {len(pairs)} rows, fewer than one batch of {global_size}{of_each}. Pass "
            f"--per_device_train_batch_size {len(pairs) // num_processes} or less."
        )

    def draws(epoch: int, first: int) -> Iterator[Draw]:
        found = pairs.draws(epoch, seed=seed, shuffle=training, first=first)
        return read_ahead(found, global_size) if isinstance(pairs, PairStream) else found

    plans = _Plans(draws, batch_size, num_processes, process_index)
    plans.is_training = training

    def start() -> DataLoader:
        return DataLoader(
            Preparation(pairs, collator),
            batch_sampler=plans,  # type: ignore[arg-type]  # plans stand for lists of indices
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=keep_workers and num_workers > 0,
            worker_init_fn=heed_in_worker,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # each start draws a number, which must not be one of the run's own
        )

    found = PairLoader(pairs, plans, start, bad_rows)
    found.is_finishing = finish_images
    return found
