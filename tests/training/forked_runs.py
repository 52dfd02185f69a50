"""Runs in processes of their own, which can be killed."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from hf_clip.commands import finetune
from hf_clip.training import run_steps, stopping

from ..forked import fork

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


seen = 0


def count_writes(folder: str, kill_at: int | None) -> None:
    """Count how often this process changes something below a folder, and kill it at one of these times."""

    def hook(event: str, given: tuple) -> None:
        global seen
        is_write = event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITES)
        if is_write and str(given[0]).startswith(folder):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def at_step(step: int, signum: int) -> None:
    """Send this process a signal while that step is computed."""
    check = run_steps.Run.check_loss

    def check_loss(run: Any, loss: torch.Tensor) -> None:
        check(run, loss)
        if run.state.step + 1 == step:
            os.kill(os.getpid(), signum)

    run_steps.Run.check_loss = check_loss  # type: ignore[method-assign]


def quicker(interval: float) -> None:
    """Look more often whether the others live."""
    stopping.INTERVAL = interval


def watched(path: str, every: int) -> None:
    """Write down the memory and the open files of this process and its workers, every so many steps."""
    import psutil

    done = run_steps.Run.batch_done

    def batch_done(run: Any, result: Any, rates: dict[str, float]) -> None:
        done(run, result, rates)
        if run.state.step % every == 0:
            own = psutil.Process()
            family = [own, *own.children()]
            memory = sum(each.memory_full_info().uss for each in family)
            files = sum(each.num_fds() for each in family)
            with open(path, "a") as file:
                file.write(f"{run.state.step} {memory} {files}\n")

    run_steps.Run.batch_done = batch_done  # type: ignore[method-assign]


def _run(rank: int, words: list[str], logs: list[str], faults: dict[int, list[tuple]]) -> None:
    with open(logs[rank], "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    kinds = {"writes": count_writes, "step": at_step, "watched": watched, "quicker": quicker}
    for kind, *given in faults.get(rank, []):
        kinds[kind](*given)
    status = finetune.main(words)
    Path(logs[rank]).with_suffix(".writes").write_text(str(seen))
    sys.exit(status)


class ForkedRun:
    """One run of one or two processes.

    Args:
        words: its command line.
        folder: for what the processes print.
        processes: how many.
        faults: of each process: what happens to it.
    """

    def __init__(
        self, words: list[str], folder: Path, processes: int = 1, faults: dict[int, list[tuple]] | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{rank}.log" for rank in range(processes)]
        self.processes = fork(_run, processes, words, [str(log) for log in self.logs], faults or {})

    def wait(self, seconds: float = 600) -> list[int | None]:
        """The exit statuses; minus the signal's number where one was killed."""
        for process in self.processes:
            process.join(seconds)
        return self.end()

    def wait_for_one(self, rank: int, seconds: float = 600) -> int | None:
        """The exit status of one; the others are killed, as a launcher would."""
        self.processes[rank].join(seconds)
        return self.end()[rank]

    def end(self) -> list[int | None]:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def writes(self, rank: int = 0) -> int:
        """How often a process that was not killed has changed something, where that was counted."""
        return int(self.logs[rank].with_suffix(".writes").read_text())

    @property
    def printed(self) -> list[str]:
        return [log.read_text() if log.exists() else "" for log in self.logs]
