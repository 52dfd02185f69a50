"""Two processes that found each other once and then do one run after the other.

Most of what a run of two processes costs is their start. Here they are started for the first run that is asked for, and
stay until the tests are over. A run that fails ends them; the next one starts others. They do the runs that stand in
their folder, 0.json, 1.json, ...
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .forked import fork

POLL = 0.02


class TwoProcesses:
    """What asks for runs, and waits for them."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        self.processes: list[Any] = []

    def run(self, words: list[str], sharding: dict[str, Any] | None = None, precision: str = "no") -> str:
        """Do one run in both processes.

        Args:
            words: its command line.
            sharding: with FSDP2; see `fsdp2_on_cpu.run`.
            precision: no or bf16.

        Returns:
            What both have printed. A run that ends with another status than 0 fails the test.
        """
        if not self.processes:
            self.processes = fork(serve, 2, self.folder, self.number, os.getpid())
        number, self.number = self.number, self.number + 1
        task = {"words": words, "sharding": sharding, "precision": precision}
        unfinished = self.folder / "next"
        unfinished.write_text(json.dumps(task))
        unfinished.rename(self.folder / f"{number}.json")
        done = [self.folder / f"{number}-{rank}.done" for rank in range(2)]
        until = time.monotonic() + 600
        while not all(path.is_file() for path in done):
            if not all(process.is_alive() for process in self.processes) or time.monotonic() > until:
                self.close()
                raise AssertionError(self._printed(number))
            time.sleep(POLL)
        if any(path.read_text() != "0" for path in done):
            self.close()
            raise AssertionError(self._printed(number))
        return self._printed(number)

    def _printed(self, number: int) -> str:
        logs = [self.folder / f"{number}-{rank}.log" for rank in range(2)]
        return "".join(path.read_text() for path in logs if path.is_file())

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@contextmanager
def printed_into(path: Path) -> Iterator[None]:
    """Within this block all that is printed goes into a file."""
    kept = [os.dup(1), os.dup(2)]
    with path.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, before in zip((1, 2), kept, strict=True):
            (sys.stdout, sys.stderr)[number - 1].flush()
            os.dup2(before, number)
            os.close(before)


def do(task: dict[str, Any]) -> int:
    from accelerate.state import AcceleratorState, GradientState

    from hf_clip.commands import finetune
    from tests.training import fsdp2_on_cpu

    AcceleratorState._reset_state(reset_partial_state=True)  # the processes stay connected
    GradientState._reset_state()
    os.environ["ACCELERATE_MIXED_PRECISION"] = task["precision"]
    if task["sharding"] is None:
        return finetune.main(task["words"])
    return fsdp2_on_cpu.run(task["words"], **task["sharding"])


def serve(rank: int, folder: Path, number: int, parent: int) -> None:
    """What each of the processes does, from run `number` on."""
    from accelerate import PartialState

    PartialState.destroy_process_group = lambda self, group=None: None  # the end of a run is not that of the processes
    while True:
        while not (folder / f"{number}.json").is_file():
            time.sleep(POLL)
            os.kill(parent, 0)  # raises where the tests are gone
        with printed_into(folder / f"{number}-{rank}.log"):
            status = do(json.loads((folder / f"{number}.json").read_text()))
        (folder / f"{rank}.status").write_text(str(status))
        (folder / f"{rank}.status").rename(folder / f"{number}-{rank}.done")  # which is read as soon as it is there
        number += 1
