"""`python -m hf_clip.commands.evaluate TASK`, alone or in several processes: `accelerate launch -m ...` starts them.

The main process alone prints. Whatever another one has to say, the main process gets and says.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...evaluation.processes import ProcessEndedError, connected
from ..program import INTERRUPTED, main


@contextmanager
def silent(is_silent: bool) -> Iterator[None]:
    """Let nothing be printed within a `with` block, also by libraries. An error that leaves it is printed."""
    if not is_silent:
        yield
        return
    kept, nothing = {number: os.dup(number) for number in (1, 2)}, os.open(os.devnull, os.O_WRONLY)
    for number in kept:
        os.dup2(nothing, number)
    try:
        yield
    finally:
        for number, before in kept.items():
            (sys.stdout, sys.stderr)[number - 1].flush()
            os.dup2(before, number)


def run(arguments: Sequence[str]) -> int:
    """Run one command line together with the other processes. Returns the exit status, the same in all of them."""
    with connected() as processes, silent(not processes.is_main):
        try:
            status = main(["evaluate", *arguments])
        except ProcessEndedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if status != INTERRUPTED:
            processes.part()
        return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
