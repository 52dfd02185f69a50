"""One line that says why a run ends, however many processes it has.

When one process stops, the others fail in the midst of an exchange with it. Only one of them may say why. Whichever
process is the first to write its name into the store, through which they found each other, says it. The main process
writes first, since most errors meet all processes. Before the processes have found each other, all of them read the
same command line and the same files, so the main process alone speaks.

A launcher ends all processes when one has ended. So those that have nothing to say wait until the main process has
spoken.

No torch is imported here: a command line that cannot be read is refused before that.
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

from .stopping import ProcessGoneError, Stopped, wait_for_launchers_end

KEY = "hf_clip_stopped"
SECONDS = 3.0
EXPECTED = (OSError, ValueError, ImportError)
"""What is raised with a message for the user; any other error is a fault of the program, and keeps its traceback."""


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def said_once() -> Iterator[None]:
    """Within this block only the main process prints what ends the program, such as a line of usage."""
    if _is_main():
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit:
            time.sleep(SECONDS)
            raise


def _may_speak(error: Exception) -> bool:
    """Whether no other process says why the run ends."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not (dist.is_available() and dist.is_initialized()):
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
        return isinstance(error, ProcessGoneError) and dist.get_rank() == 1


def report(error: Exception, *, with_traceback: bool = False) -> int:
    """Say in one line why the run ends, unless another process says it.

    Args:
        error: What ended this process.
        with_traceback: Whether the user asked for the traceback of every error.

    Returns:
        The exit status.

    Raises:
        Exception: `error` itself, if no other process has spoken, and it is a fault of the program or its traceback was
            asked for.
    """
    if not _may_speak(error):
        return 1
    if with_traceback or not isinstance(error, EXPECTED):
        raise error
    line = f"error: {' '.join(str(error).split())}"
    sys.stderr.write(line + "\n" if _is_main() else f"\n{line}\n")  # behind the main process's bar
    sys.stderr.flush()
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # from where the launcher's own report takes it
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": line}, file)
    return 1


def report_stop(stop: KeyboardInterrupt) -> int:
    """Say in one line which signal ended the run, and what remains of it.

    Args:
        stop: What was raised for the signal.

    Returns:
        The exit status, 128 and the signal's number.
    """
    signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
    saved = stop.saved if isinstance(stop, Stopped) else ""
    if signum == signal.SIGINT:
        wait_for_launchers_end()
    if _is_main():
        remains = saved or "no step was done that could be kept"
        sys.stderr.write(f"\nended by {signal.Signals(signum).name}: {remains}\n")
        sys.stderr.flush()
    return 128 + signum
