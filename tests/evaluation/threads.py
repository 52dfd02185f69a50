"""Processes that measure together, played by threads: what they exchange is pickled, and who waits in vain fails."""

import contextvars
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hf_clip.evaluation import processes

LONGEST_WAIT = 60.0


class _Exchange:
    def __init__(self, count: int):
        self.barrier, self.slots = threading.Barrier(count), [b""] * count

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = pickle.dumps(value)
        self.barrier.wait(LONGEST_WAIT)
        found = [pickle.loads(slot) for slot in self.slots]
        self.barrier.wait(LONGEST_WAIT)
        return found


class InThread(processes.Processes):
    def __init__(self, rank: int, count: int, shared: _Exchange):
        super().__init__(rank, count)
        self.shared = shared

    def _gather(self, value: Any) -> list[Any]:
        return self.shared.gather(self.rank, value)

    def _broadcast(self, value: Any) -> Any:
        return self._gather(value)[0]

    def _reduce(self, values: torch.Tensor, operation: str) -> None:
        parts = torch.stack(self._gather(values.clone()))
        values.copy_(parts.sum(0) if operation == "SUM" else parts.amax(0))


def in_processes(count: int, work: Callable[[processes.Processes], Any]) -> list[Any]:
    """Let `count` processes do the same work. Returns what each of them got, or the error that it met."""
    shared = _Exchange(count)

    def one(rank: int) -> Any:
        own = InThread(rank, count, shared)
        processes._current.set(own)
        try:
            return work(own)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: contextvars.Context().run(one, rank), range(count)))
