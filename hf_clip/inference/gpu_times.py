"""Measure on a GPU, in its own time: how long work takes, and whether the GPU or Python is what takes it."""

import time
from collections.abc import Callable

import torch

Work = Callable[[], object]

BUSY_SECONDS = 0.005
"""A batch that takes a GPU this long hides the time in which Python launches its kernels."""

LARGEST_BATCH = 256


def seconds_of(work: Work) -> float:
    """Return the seconds that the present GPU is occupied by one call, or waits in it for Python."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def gain_of(before: Work, after: Work, switch: Callable[[bool], None] | None = None, repeats: int = 7) -> float:
    """Return how many times as fast `after` is as `before`.

    The two run in turn, and their shortest times are compared, since other work on the machine only adds time. The
    first run of each is not counted.

    Args:
        before: One call without a change.
        after: One call with it.
        switch: Called before each, in time that is not counted: with False before `before`, with True before `after`.
        repeats: How often each is counted.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for is_after, work in enumerate((before, after)):
            if switch is not None:
                switch(bool(is_after))
            times[is_after].append(seconds_of(work))
    return min(times[0][1:]) / min(times[1][1:])


def share_of_launching(work: Work) -> float:
    """Return the part of a call's time in which Python still launches kernels: near 1 where the GPU waits for Python.

    A call that fills the queue of kernels would look as if Python took all of its time. The queue holds about 1,000
    kernels, and a tower has fewer.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return (launched - start) / (time.perf_counter() - start)


def batch_that_fills_the_gpu(work_of: Callable[[int], Work]) -> int:
    """Find a batch size that takes the GPU `BUSY_SECONDS`, but at most `LARGEST_BATCH` and what fits its memory.

    Args:
        work_of: Returns one call for a batch of this size.
    """
    count = 8
    while True:
        try:
            work = work_of(count)
            work()
            if seconds_of(work) >= BUSY_SECONDS or count >= LARGEST_BATCH:
                return count
        except torch.OutOfMemoryError:
            return max(1, count // 4)  # half of it just fitted, and what is compared may take more
        count *= 2
