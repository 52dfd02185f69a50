"""Two processes that evaluate together over gloo, as a launcher would start them, but without its start.

A server imports once what both need, and is forked for each of them.
"""

import multiprocessing
import os
from pathlib import Path

from ..ports import free_port
from ..two_processes import printed_into

LONGEST = 600


def _evaluate(rank: int, runs: list[tuple[int, list[str]]], folder: Path) -> None:
    import torch
    import transformers

    from hf_clip.commands.evaluate.__main__ import run

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    for number, (port, words) in enumerate(runs):
        os.environ["MASTER_PORT"] = str(port)
        with printed_into(folder / f"{number}-{rank}.log"):
            status = run(words)
        (folder / f"{number}-{rank}.status").write_text(str(status))


def evaluate_in_two(folder: Path, runs: list[list[str]]) -> list[tuple[list[int], str]]:
    """Run command lines of `hf-clip evaluate`, one after the other, each in both processes.

    Returns:
        For each run the exit status of both, and what both have printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_clip.commands.evaluate.__main__", "hf_clip.evaluation.grid", "datasets"])
    given = [(free_port(), words) for words in runs]
    both = [context.Process(target=_evaluate, args=(rank, given, folder), daemon=True) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(LONGEST)
    found = []
    for number in range(len(runs)):
        printed = "".join((folder / f"{number}-{rank}.log").read_text() for rank in range(2))
        statuses = [folder / f"{number}-{rank}.status" for rank in range(2)]
        assert all(path.is_file() for path in statuses), printed
        found.append(([int(path.read_text()) for path in statuses], printed))
    return found
