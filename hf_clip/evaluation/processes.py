"""Several processes that measure together, as `accelerate launch` and torchrun start them.

Each process reads all rows, and opens and encodes its share of them. What it finds goes to all others, so each of them
has what one process alone would have, and comes to the same figures. Only the main process, the first one, writes.

An error in one process ends the task in all of them, and none waits:

1. In each exchange every process gives a value, and gets those of all.
2. A process that fails takes part in one more exchange, and gives its error. Whatever the others are about to exchange,
   they get the error, and raise it.

Invariant: all processes take part in equally many exchanges.

Processes connect only within `connected`. Elsewhere there is one process, whatever the environment says.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.checked_files import LONGEST_LINE, one_line

LONGEST_WAIT = timedelta(hours=2)
"""For another process in one exchange. A process that ended is noticed at once."""

EXPECTED = (OSError, ValueError, ImportError)
"""What is raised with a message for the user. Any other error is a fault of the program."""


class OtherProcessError(ValueError):
    """Another process failed; the message is that of its error."""


class ProcessEndedError(RuntimeError):
    """Another process ended, or met a fault of the program, so this one cannot go on."""


@dataclass(frozen=True)
class _Failure:
    """What a process gives that fails.   message: of its error   is_expected: whether the user can mend it"""

    message: str
    is_expected: bool


class Processes:
    """The processes that measure together, seen from one of them.

    Attributes:
        rank: The number of this process, from 0.
        count: Number of processes.
        local_count: Number of processes on this machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_count: int = 1, group: Any = None):
        self.rank, self.count, self.local_count = rank, count, local_count
        self._group = group
        self._told: BaseException | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def is_own(self, number: int) -> bool:
        """Whether a piece of work, which has a number from 0, is this process's."""
        return number % self.count == self.rank

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        with _connection():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def _broadcast(self, value: Any) -> Any:
        found = [value]
        with _connection():
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def _reduce(self, values: Tensor, operation: str) -> None:
        with _connection():
            dist.all_reduce(values, getattr(dist.ReduceOp, operation), group=self._group)

    def exchange(self, value: Any, what: str) -> list[Any]:
        """Give a value to all processes, and return the values of all, in their order.

        Args:
            value: A value that can be pickled.
            what: What it belongs to, which must be the same in all processes.

        Raises:
            OtherProcessError: Another process failed; or the processes are about to exchange different things.
            ProcessEndedError: Another process ended.
        """
        if self.count == 1:
            return [value]
        found = self._gather((what, value))
        self._raise_failures(found)
        if others := sorted({name for name, _ in found} - {what}):
            raise OtherProcessError(
                f"The processes do not measure the same: one is at {what}, another at {others[0]}. Give all of them "
                f"the same model and data, which must not change meanwhile."
            )
        return [value for _, value in found]

    def _raise_failures(self, found: list[Any]) -> None:
        failures = {rank: item for rank, item in enumerate(found) if isinstance(item, _Failure)}
        for rank, failure in failures.items():
            if not failure.is_expected and rank != self.rank:
                raise ProcessEndedError(f"Process {rank} of {self.count} failed: {failure.message}")
        for rank, failure in failures.items():
            if rank != self.rank:
                raise OtherProcessError(failure.message)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Let all processes end a `with` block together: an error in one of them is raised in all.

        Args:
            what: What is done in it.

        Raises:
            OtherProcessError: Another process failed.
            ProcessEndedError: Another process ended.
        """
        try:
            yield
            self.exchange(None, f"the end of {what}")
        except (OtherProcessError, ProcessEndedError):
            raise
        except Exception as error:  # and no signal, which the others get too
            if self.count > 1 and error is not self._told:
                self._told = error
                self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        is_expected = isinstance(error, EXPECTED)
        message = str(error) if is_expected else f"{type(error).__name__}: {error}"
        found = self._gather(_Failure(one_line(message, LONGEST_LINE), is_expected))
        if any(isinstance(item, _Failure) and not item.is_expected for item in found) and is_expected:
            self._raise_failures(found)

    def part(self) -> None:
        """Wait until all processes are at their end: a launcher ends the others when one has ended."""
        if self.count > 1:
            with suppress(ProcessEndedError):
                self._gather(None)

    def of_main(self, value: Any, what: str) -> Any:
        """Return the main process's value. Raises as `exchange`."""
        if self.count == 1:
            return value
        self.exchange(None, what)
        return self._broadcast(value)

    def reduce(self, values: Tensor, what: str, operation: str = "SUM") -> Tensor:
        """Replace values on the CPU by their "SUM" or "MAX" over all processes. Raises as `exchange`."""
        if self.count > 1:
            self.exchange(None, what)
            self._reduce(values, operation)
        return values


@contextmanager
def acting_as(processes: Processes) -> Iterator[None]:
    """Let the evaluations within a `with` block be shared by these processes."""
    token = _current.set(processes)
    try:
        yield
    finally:
        _current.reset(token)


def is_cpu_wanted() -> bool:
    """Whether `accelerate launch --cpu` has started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


@contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch.distributed
        raise ProcessEndedError(
            f"Another process of this evaluation has ended or cannot be reached ({one_line(error, 120)}). Start it "
            f"again: what was finished is not measured again."
        ) from error


ALONE = Processes()
"""One process, which waits for nobody."""

_current = ContextVar("processes that measure together", default=ALONE)


def current() -> Processes:
    """Return the processes that measure together at this moment: `ALONE`, or those of `connected`."""
    return _current.get()


@contextmanager
def connected() -> Iterator[Processes]:
    """Let the evaluations within a `with` block share their work with the processes that a launcher has started.

    Each process calls the same evaluations in the same order. They talk through gloo, also where they compute on GPUs,
    since features are exchanged on the CPU. Of several GPUs each process of a machine gets one as its current device.

    Yields:
        The processes. One, if this process was started alone.

    Example::

        with connected() as processes:
            result = evaluate_zero_shot(model.to("cuda"), processor, "flowers/")
        if processes.is_main:
            print(f"{result.value:.1%}")
    """
    is_alone = not {"RANK", "MASTER_ADDR"} <= os.environ.keys() or os.environ.get("WORLD_SIZE", "1") == "1"
    if is_alone or not dist.is_available():
        yield ALONE
        return
    is_ours = not dist.is_initialized()
    with _connection():
        if is_ours:
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)
        group = None if is_ours else dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    if torch.cuda.is_available() and not is_cpu_wanted():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        with acting_as(Processes(dist.get_rank(), dist.get_world_size(), local_count, group)):
            yield current()
    finally:
        if is_ours:
            dist.destroy_process_group()
