"""What the checks find: a row for each, printed when it is known, and what a part of the checks is given.

A row is a check (`ok` or `WRONG`), a figure (`measured`) or a figure with a goal (`ok` or `below its goal`). Nothing is
lost when a part of the checks ends with an exception: its row says `failed` and why, and the next part begins. What
there is no time for is `skipped`. The exit status is 1 where a row is `WRONG` or `failed`.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from ..measuring import Contender, Table, compare, synchronize
from ..reporting import format_table

OK, WRONG, FAILED = "ok", "WRONG", "failed"
MEASURED, BELOW, LEFT_OUT, SKIPPED = "measured", "below its goal", "left out", "skipped"

T = TypeVar("T")


@dataclass
class Row:
    """One thing that was found.

    Attributes:
        section: of the program.
        what: was checked or measured.
        state: one of the constants above.
        value: the number, if there is one.
        unit: of the number; empty for relative errors.
        limit: what it may be at most, or for a goal at least.
        note: whatever else there is to say.
    """

    section: str
    what: str
    state: str
    value: float | None = None
    unit: str = ""
    limit: float | None = None
    note: str = ""


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    is_ratio = unit == "" and not (math.isfinite(value) and value == int(value))
    text = f"{value:.1e}" if is_ratio else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{text} {unit}".rstrip()


def format_row(row: Row) -> str:
    """One line of the table."""
    sign = "" if row.limit is None else "≥" if row.state == BELOW or row.unit == "goal" else "≤"
    limit = "" if row.limit is None else f"{sign} {_number(row.limit, '' if row.unit == 'goal' else row.unit)}"
    value = _number(row.value, "" if row.unit == "goal" else row.unit)
    return f"{row.state:14} {row.section:9} {row.what:58} {value:>14} {limit:>10}  {row.note}".rstrip()


@dataclass
class Report:
    """All rows, and the clock.

    Attributes:
        seconds: that the program may take, from when this is made.
        until: seconds after which the present section has to end. What a section leaves, the next ones have.
        rows: in the order in which they were found.
        tables: of speeds.
    """

    seconds: float
    rows: list[Row] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    section: str = ""
    until: float = math.inf
    begun: float = field(default_factory=time.perf_counter)

    def add(self, what: str, state: str, **fields: Any) -> None:
        """Take in a row, and print it."""
        row = Row(self.section, what, state, **fields)
        self.rows.append(row)
        print(format_row(row), flush=True)

    def check(self, what: str, value: float, at_most: float, note: str = "", unit: str = "") -> None:
        """A number that is right up to a limit, and wrong above it or where it is none."""
        self.add(what, OK if value <= at_most else WRONG, value=value, limit=at_most, note=note, unit=unit)

    def expect(self, what: str, is_so: bool, note: str = "") -> None:
        """Something that is right or wrong."""
        self.add(what, OK if is_so else WRONG, note=note)

    def goal(self, what: str, value: float, at_least: float, note: str = "") -> None:
        """A number that one hopes for. Missing it is no error."""
        state = OK if value >= at_least else BELOW
        self.add(what, state, value=value, limit=at_least, note=note, unit="goal")

    def figure(self, what: str, value: float, unit: str, note: str = "") -> None:
        """A number."""
        self.add(what, MEASURED, value=value, unit=unit, note=note)

    def left(self) -> float:
        """Seconds until the time of the program, or that of the section, is over."""
        return self.begun + min(self.seconds, self.until) - time.perf_counter()

    def has_time(self, what: str, needed: float) -> bool:
        """Whether there is time for something. A row says so where there is none."""
        if self.left() >= needed:
            return True
        self.add(what, SKIPPED, note=f"{max(self.left(), 0):.0f} s are left, and it may take {needed:.0f}")
        return False

    def is_wrong(self) -> bool:
        """Whether any row is."""
        return any(row.state in (WRONG, FAILED) for row in self.rows)

    def as_json(self) -> list[dict[str, Any]]:
        """The rows. JSON has no infinity and no nan."""
        rows = [asdict(row) for row in self.rows]
        return [
            row | {"value": str(row["value"])} if row["value"] is not None and not math.isfinite(row["value"]) else row
            for row in rows
        ]


@dataclass
class Setup:
    """What each part of the checks is given.

    Attributes:
        report: where it puts what it finds.
        device: cuda, or cpu in a dry run.
        is_dry: whether everything is tiny and nothing is measured that a CPU cannot show.
    """

    report: Report
    device: str
    is_dry: bool

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def choose(self, full: T, tiny: T) -> T:
        """The first on a GPU, the second in a dry run."""
        return tiny if self.is_dry else full

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        synchronize(self.device)

    def free_memory(self) -> int:
        """Bytes that the device has left; what a dry run may take stands for it on a CPU."""
        return torch.cuda.mem_get_info()[0] if self.on_gpu else 1 << 30

    def forget_peak(self) -> int:
        """Begin to watch for the largest memory. Returns what is in use now, in bytes."""
        if not self.on_gpu:
            return 0
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The largest memory that was in use since, in bytes. 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else 0

    def compare(self, table: Table, contenders: list[Contender], rounds: int = 3) -> Table:
        """Measure contenders in turn, print their table, and keep it. What of ours cannot take part is wrong."""
        table.device = self.device
        filled = compare(table, contenders, rounds=self.choose(rounds, 1), seconds=20.0, turn=self.choose(None, 0.0))
        print(format_table(filled), "\n", flush=True)
        self.report.tables.append(filled)
        for line in filled.left_out:
            if line.startswith(table.ours[0]):
                self.report.add(table.title, WRONG, note=line)
        return filled
