"""Rows that cannot be used, and what becomes of a run that meets too many.

A loader that ended one process would leave the others waiting, and lose what was trained. So in a run nothing is
raised where a row is met: after every step the processes add up what they have met; where that is too much, all save a
checkpoint, and all stop.

Invariant: any number of processes that see the same rows refuse the same.
"""

import torch
import torch.distributed as dist

from .data import BadRows
from .losses import exchange_counts, world_size

FEWEST = 1000
"""While fewer rows were drawn, as many may be bad as of so many. At the end of an epoch the count is exact."""


class RowsOfRun(BadRows):
    """Counts and logs, and leaves it to `find_refusal` to judge; see the module.

    The same rows are evaluated again and again: each is logged once.
    """

    def __init__(self, max_fraction: float = 0.01):
        super().__init__(max_fraction)
        self.is_complete = False
        self._logged: set[str] = set()

    def add(self, drawn: int, skipped: list[tuple[str, str]]) -> None:
        new = [row for row in skipped if row[0] not in self._logged]
        self._logged.update(name for name, _ in new)
        self.bad += len(skipped) - len(new)
        super().add(drawn, new)

    def check(self) -> None:
        """Say that what was counted are all rows there are."""
        self.is_complete = True

    def restart(self) -> None:
        """Count anew, as before each evaluation."""
        self.drawn = self.bad = 0

    def _refuse(self) -> None:
        pass


def _first_of_all(rows: RowsOfRun) -> str:
    if world_size() == 1:
        return rows.first
    firsts: list[str] = [""] * world_size()
    dist.all_gather_object(firsts, rows.first)
    return next(first for first in firsts if first)


def find_refusal(counters: list[RowsOfRun], device: torch.device) -> str:
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
