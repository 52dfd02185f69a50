"""One line for what ends a run, however many processes it has.

When one process stops, the others fail in the middle of an exchange with it. Who is first to put its name down in the
store through which the processes found each other says why; the others see that it is taken, and say nothing. The main
process goes first, since most errors meet all of them. Before they have found each other they all read the same
command line and the same files: there it speaks alone.

A launcher ends all processes when one has ended: those that have nothing to say give the main process time to speak.
"""

import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch.distributed as dist

from .stopping import Stopped, wait_for_launchers_end

KEY = "hf_clip_stopped"
SECONDS = 3.0
EXPECTED = (OSError, ValueError, ImportError)
"""What is raised with a message for the user; any other error is a fault of the program, and keeps its traceback."""


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def said_once() -> Iterator[None]:
    """What the reader of the command line prints when it ends the program, from the main process alone."""
    if _is_main():
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit:
            time.sleep(SECONDS)
            raise


def _may_speak() -> bool:
    """Whether no other process says why the run ends."""
    if not (dist.is_available() and dist.is_initialized()):
        if not _is_main():
            time.sleep(SECONDS)
        return _is_main()
    try:
        store = dist.distributed_c10d._get_default_store()
        if not _is_main():
            try:
                store.wait([KEY], timedelta(seconds=SECONDS))
                time.sleep(SECONDS)
                return False
            except dist.DistStoreError:
                pass
        return store.add(KEY, 1) == 1
    except RuntimeError:  # the store went with the process that kept it
        return False


def report(error: Exception) -> int:
    """Say in one line why the run ends, unless another process does; returns the exit status.

    Raises an error that is none of the user's, unless it only follows from another process having stopped.
    """
    if not _may_speak():
        return 1
    if not isinstance(error, EXPECTED):
        raise error
    line = f"error: {' '.join(str(error).split())}"
    sys.stderr.write(line + "\n" if _is_main() else f"\n{line}\n")  # behind the main process's bar
    sys.stderr.flush()
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # from where the launcher's own report takes it
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": line}, file)
    return 1


def report_stop(stop: KeyboardInterrupt) -> int:
    """Say in one line that a signal ended the run, and what remains; returns the exit status."""
    signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
    saved = stop.saved if isinstance(stop, Stopped) else ""
    if signum == signal.SIGINT:
        wait_for_launchers_end()
    if _is_main():
        remains = saved or "no step was done that could be kept"
        sys.stderr.write(f"\nended by {signal.Signals(signum).name}: {remains}\n")
        sys.stderr.flush()
    return 128 + signum
