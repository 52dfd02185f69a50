"""Timing of several implementations in turn, round after round, so that all meet the same state of the machine."""

import statistics
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping

OURS = "hf_clip"


def at_least_one(text: str) -> int:
    """The type of a count on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def rates_in_turn(
    works: Mapping[str, Callable[[], object]], amounts: Mapping[str, int], rounds: int
) -> dict[str, float]:
    """Median amount per second of each work; every work runs once in every round, after one round unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: amounts[name] / statistics.median(times) for name, times in seconds.items()}


def print_rates(title: str, rates: dict[str, float]) -> None:
    """A table with each rate, and how many times faster the first `hf_clip` row is."""
    ours = next(rate for name, rate in rates.items() if name.startswith(OURS))
    width = max(map(len, rates)) + 2
    print(f"\n{title}\n{'':{width}}{'per second':>12}{'hf_clip is':>14}")
    for name, rate in rates.items():
        ratio = "" if rate == ours else f"{ours / rate:.2f} times"
        print(f"{name:{width}}{rate:>12,.1f}{ratio:>14}")
