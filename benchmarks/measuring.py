"""Timing of several implementations in turn, each of which first has to show that it computes the same.

1. Every contender is called once, and its output is checked. A contender whose output differs, or that cannot run
   here, is left out, because its speed would say nothing. A line says why.
2. Warm-up: three more unmeasured calls, or fewer once a second has passed.
3. Rounds: every contender has one turn in each round, so all meet the same state of the machine. The order changes
   from round to round, so no contender always follows the same other one. A turn is as many calls as fill a tenth of a
   second. The figure is the median over the rounds.

Rounds end sooner when the table's time is used up, but not before the third.
"""

import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = "hf_clip"

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"float32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}
"""Largest relative error of any one feature vector.

In float32 only the order of sums differs. In bfloat16 and float16 every layer rounds to 8 or 11 bits, and the errors
add up along the residual stream: in bfloat16 they reached 3e-2 in the worst row of a batch, in every implementation. A
wrong computation gives errors of order one.
"""

WARM_UP_SECONDS, WARM_UP_CALLS = 1.0, 3
TURN_SECONDS = 0.1
LEAST_ROUNDS = 3

Check = Callable[[Any], str | None]
"""What is wrong with the result of a first call; None where nothing is."""


class LeftOutError(Exception):
    """An implementation that cannot take part; the message says why, and how it could."""


@dataclass
class Contender:
    """One implementation at work: `work` is one call, which handles `amount` images, texts or whatever is counted."""

    name: str
    work: Callable[[], Any]
    amount: int
    precision: str = ""
    check: Check | None = None
    flops: float | None = None
    ceiling: float | None = None
    peak_memory: int | None = None


@dataclass
class Row:
    """What was measured of one contender: the seconds of one call in each round; memory in bytes."""

    name: str
    precision: str
    amount: int
    seconds: list[float]
    flops: float | None = None
    ceiling: float | None = None
    peak_memory: int | None = None

    @property
    def per_second(self) -> float:
        return self.amount / statistics.median(self.seconds)

    @property
    def fraction_of_ceiling(self) -> float | None:
        """Of the fastest matrix product that was measured on this machine in this precision."""
        if self.flops is None or self.ceiling is None:
            return None
        return self.flops / statistics.median(self.seconds) / self.ceiling


@dataclass
class Table:
    """Rows that were measured together, and what else there is to say about them.

    ours: the names of the rows that all others are compared with, a column for each
    unit: what is counted per second
    """

    title: str
    unit: str
    rows: list[Row] = field(default_factory=list)
    ours: Sequence[str] = (OURS,)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def ratios(self, row: Row) -> dict[str, float]:
        """How many times as fast as this row ours are, those that were measured."""
        found = {name: self.row(name) for name in self.ours}
        return {name: ours.per_second / row.per_second for name, ours in found.items() if ours and ours is not row}

    @property
    def lacks_ours(self) -> bool:
        """Whether a way of ours failed, or computed something else than the reference."""
        return self.row(self.ours[0]) is None or any(line.startswith(OURS) for line in self.left_out)


def worst_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ of the row, (B, D), in which it is largest: one wrong row isn't averaged away."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.nan_to_num(nan=torch.inf).max())


def agrees_with(expected: Tensor, precision: str) -> Check:
    """A check of features (B, D) against those of the float32 reference."""

    def check(found: Tensor) -> str | None:
        error, limit = worst_error(found, expected), TOLERANCE[precision]
        return None if error <= limit else f"its output is {error:.1e} off, where {precision} allows {limit:.0e}"

    return check


def first_line(error: Exception) -> str:
    """What went wrong, without the colours that some libraries print."""
    text = re.sub(r"\x1b\[\d*m", "", f"{type(error).__name__}: {error}")
    return text.strip().splitlines()[0][:200]


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was told; a CPU has when the call returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _first_call(contender: Contender, device: str) -> str | None:
    """Call once, which warms up and compiles too, and check: why the contender can't take part, or None.

    On a GPU a second call shows its memory: the weights, which the contender has stated, and what comes on top.
    """
    weights = contender.peak_memory if torch.device(device).type == "cuda" else None
    before = torch.cuda.memory_allocated() if weights is not None else 0
    try:
        result = contender.work()
        synchronize(device)
        reason = contender.check(result) if contender.check else None
        if weights is not None and not reason:
            del result
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            contender.work()
            synchronize(device)
            contender.peak_memory = weights + torch.cuda.max_memory_allocated() - before
    except Exception as error:
        reason = first_line(error)
    return f"{contender.name} is left out: {reason}" if reason else None


def _warm_up(work: Callable[[], Any], device: str, last: float, turn_seconds: float) -> int:
    """Unmeasured calls, after one that took `last` seconds; how many calls fill a turn.

    On a GPU one at least, since the first may have compiled for longer than a thousand calls take.
    """
    begin = time.perf_counter() - last
    for turn in range(WARM_UP_CALLS):
        is_warm = time.perf_counter() - begin > WARM_UP_SECONDS
        if is_warm and (turn > 0 or torch.device(device).type != "cuda"):
            break
        start = time.perf_counter()
        work()
        synchronize(device)
        last = time.perf_counter() - start
    return max(1, round(turn_seconds / max(last, 1e-6)))


def compare(
    table: Table,
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seconds: float = float("inf"),
    turn: float | None = None,
) -> Table:
    """Fill a table with rows: check, warm up, and measure the contenders in turn.

    seconds: after which no further round begins, once there are three
    turn: seconds of a turn, where it is not the usual
    """
    turn_seconds = TURN_SECONDS if turn is None else turn
    present, calls = [], []
    for contender in contenders:
        say(f"checking {contender.name}")
        start = time.perf_counter()
        reason = _first_call(contender, table.device)
        if reason:
            table.left_out.append(reason)
            continue
        present.append(contender)
        calls.append(_warm_up(contender.work, table.device, time.perf_counter() - start, turn_seconds))
    times: list[list[float]] = [[] for _ in present]
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for place in random.Random(number).sample(range(len(present)), len(present)):
            contender, count = present[place], calls[place]
            say(f"round {number + 1}, {contender.name}")
            start = time.perf_counter()
            for _ in range(count):
                contender.work()
            synchronize(table.device)
            times[place].append((time.perf_counter() - start) / count)
    say("")
    for contender, seen in zip(present, times, strict=True):
        facts = (contender.flops, contender.ceiling, contender.peak_memory)
        table.rows.append(Row(contender.name, contender.precision, contender.amount, seen, *facts))
    return table


def say(text: str) -> None:
    """One line on a terminal that shows what is going on; nothing where the output goes elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def memory_of_this_process(field_name: str) -> int | None:
    """As `memory_of_process`."""
    return memory_of_process("self", field_name)


def memory_of_process(number: int | str, field_name: str) -> int | None:
    """Bytes from Linux's own account; None elsewhere.

    Not getrusage's ru_maxrss: a child's begins with what its parent has when it starts it.

    Args:
        number: The process; "self" is this one.
        field_name: VmHWM (the most that was in memory), VmRSS (what is) or RssAnon (of that, what is in no file).
    """
    status = Path(f"/proc/{number}/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) * 1024
    return None


def forget_peak_memory() -> None:
    """Let the account of the most memory begin anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def run_alone(function: Callable[..., Any], **arguments: Any) -> Any:
    """The result of a function at the top of a module, computed in a process of its own.

    Arguments and result travel as JSON. Raises LeftOutError with the last line of what went wrong there.
    """
    code = (
        f"import json, sys; from {function.__module__} import {function.__name__} as function; "
        f"print(json.dumps(function(**json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)]
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise LeftOutError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])
