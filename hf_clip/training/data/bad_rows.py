"""Rows that cannot be used, and the end of a run that meets too many. Captions that were cut, and negative
captions, are counted too.

If a loader raised an error in one process, the others would wait for it, and what was trained would be lost. So nothing
is raised where a row is met. After every step the processes add up what they have met. If that is too much, all of them
save a checkpoint and stop.

Invariant: the same rows are refused by any number of processes.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist

from ..gathering import exchange_counts, world_size

logger = logging.getLogger(__name__)

FEWEST = 1000
"""While fewer rows were drawn, as many may be bad as of so many. At the end of an epoch the count is exact."""


class BadRows:
    """Counts one process's rows and logs each that cannot be used once; `find_refusal` judges.

    max_fraction: the part of all rows drawn that may be bad
    """

    def __init__(self, max_fraction: float = 0.01):
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {max_fraction}, but must be from 0 to 1.")
        self.max_fraction = max_fraction
        self.drawn = self.bad = self.cut = self.negatives = 0
        self.first = ""
        self.is_complete = False
        self._logged: set[str] = set()

    def add(self, drawn: int, skipped: list[tuple[str, str]], cut: int = 0, negatives: int = 0) -> None:
        """Count a batch's rows; `skipped` are the names of those that cannot be used, with the reasons, `cut` those
        whose captions were longer than the model takes, and `negatives` the wrong captions that came with them."""
        self.drawn += drawn
        self.cut += cut
        self.negatives += negatives
        self.bad += len(skipped)
        for name, reason in skipped:
            self.first = self.first or f"{name}: {reason}"
            if name not in self._logged:  # the same rows are evaluated again and again
                self._logged.add(name)
                logger.warning("skipped: %s: %s", name, reason)

    def complete(self) -> None:
        """Say that what was counted are all rows there are."""
        self.is_complete = True

    def restart(self) -> None:
        """Count anew, as before each evaluation."""
        self.drawn = self.bad = self.cut = self.negatives = 0

    def state_dict(self) -> dict[str, Any]:
        counts = {"drawn": self.drawn, "bad": self.bad, "cut": self.cut, "negatives": self.negatives}
        return {**counts, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cut, self.negatives = state.get("cut", 0), state.get("negatives", 0)  # older checkpoints have none
        self.drawn, self.bad, self.first = state["drawn"], state["bad"], state["first"]

    def add_state_dict(self, state: dict[str, Any]) -> None:
        """Count what another process has counted too."""
        self.drawn, self.bad = self.drawn + state["drawn"], self.bad + state["bad"]
        self.cut, self.first = self.cut + state.get("cut", 0), self.first or state["first"]
        self.negatives += state.get("negatives", 0)


def part_cut(rows: BadRows, device: torch.device) -> float:
    """The part of the rows drawn by all processes whose captions were cut. Every process calls this."""
    return _of_each_row(rows, rows.cut, device)


def negatives_of_a_row(rows: BadRows, device: torch.device) -> float:
    """The mean number of negative captions of the rows drawn by all processes. Every process calls this."""
    return _of_each_row(rows, rows.negatives, device)


def _of_each_row(rows: BadRows, count: int, device: torch.device) -> float:
    drawn, counted = (sum(column) for column in zip(*exchange_counts([rows.drawn, count], device), strict=True))
    return counted / max(drawn, 1)


def _first_of_all(rows: BadRows) -> str:
    if world_size() == 1:
        return rows.first
    firsts: list[str] = [""] * world_size()
    dist.all_gather_object(firsts, rows.first)
    return next(first for first in firsts if first)


def find_refusal(counters: list[BadRows], device: torch.device) -> str:
    """What is wrong where any counter has met too many, over all processes; or an empty text. Every process calls this.

    device: where the processes exchange numbers
    """
    numbers = [number for rows in counters for number in (rows.drawn, rows.bad, int(rows.is_complete))]
    totals = [sum(column) for column in zip(*exchange_counts(numbers, device), strict=True)]
    for place, rows in enumerate(counters):
        drawn, bad, complete = totals[3 * place : 3 * place + 3]
        rows.is_complete = False
        if bad > rows.max_fraction * (drawn if complete else max(drawn, FEWEST)):
            return (
                f"{bad} of {drawn} rows cannot be used, more than --max_bad_fraction {rows.max_fraction:g} allows; the "
                f"first is {_first_of_all(rows)}."
            )
    return ""
