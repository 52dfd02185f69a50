"""Let a single thread of a server compute with torch, since its threads then wait for one another without the system.

torch computes on CPUs with OpenMP, which keeps a team of threads for every thread that has ever computed. As long as
all teams have no more threads than there are cores, a thread that is ready before its team looks again and again for
about a millisecond. Otherwise it sleeps until the system wakes it, at each of the hundreds of steps of a model: a text
took 19 to 22 ms with a second team, and 13 to 16 ms without (ViT-B/32, AMD EPYC, 2 cores).

So the thread that loads and optimizes the model ends with that work, and the event loop computes without a team. What
remains is the team of the thread that encodes.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import torch

Found = TypeVar("Found")


def in_own_thread(work: Callable[[], Found]) -> Found:
    """Return what a function returns, or raise what it raises. It runs in a thread that ends with it."""
    done: Future[Found] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="hf_clip loading", daemon=True)
    thread.start()
    try:
        return done.result()
    finally:
        if done.done():  # Ctrl-C does not wait for it
            thread.join()


@contextmanager
def without_a_team() -> Iterator[None]:
    """Let this thread compute alone within a `with` block. Other threads of torch keep their number if they set it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


__all__ = ["in_own_thread", "without_a_team"]
