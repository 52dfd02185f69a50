"""One thread of a process that computes with torch, since its threads then wait for one another without the system.

torch computes on CPUs with OpenMP, which keeps a team of threads for every thread that has ever computed. As long as
all teams have no more threads than there are cores, a thread that is ready before its team looks again and again for
about a millisecond. Otherwise it sleeps until the system wakes it, at each of the hundreds of steps of a model: a text
took 19 to 22 ms with a second team, and 13 to 16 ms without (ViT-B/32, AMD EPYC, 2 cores).

So one thread loads the model, optimizes it and encodes. Every other thread computes nothing, or without a team.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

Found = TypeVar("Found")
Call = tuple["Future[Any]", Callable[[], Any]]


class ComputingThread:
    """Runs functions one after the other, in one thread.

    The thread begins with the first function, and computes with as many threads of torch as the one that made this
    object. It ends when nobody holds the object any more, or with the process, which does not wait for it.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._team = torch.get_num_threads()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def __del__(self) -> None:
        self._calls.put(None)

    def submit(self, work: Callable[[], Found]) -> "Future[Found]":
        """Let a function wait for its turn. Returns a future of what it returns or raises."""
        done: Future[Found] = Future()
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_run, args=(self._calls, self._team), name="hf_clip computing", daemon=True
                )
                self._thread.start()
        self._calls.put((done, work))
        return done

    def run(self, work: Callable[[], Found]) -> Found:
        """Return what a function returns, or raise what it raises. Within the thread it has its turn at once."""
        return work() if threading.current_thread() is self._thread else self.submit(work).result()


def _run(calls: "SimpleQueue[Call | None]", team: int) -> None:
    torch.set_num_threads(team)  # whoever submits may compute with another number
    while (call := calls.get()) is not None:
        _answer(*call)
        del call  # with all that it holds


def _answer(done: "Future[Any]", work: Callable[[], Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        found = work()
    except BaseException as error:
        done.set_exception(error)
        del done, work  # the error's traceback holds this frame, and would hold the error itself
    else:
        done.set_result(found)


@contextmanager
def without_a_team() -> Iterator[None]:
    """Let this thread compute alone within a `with` block. Other threads of torch keep their number if they set it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


__all__ = ["ComputingThread", "without_a_team"]
