"""One line for what ends a run, however many processes it has.

When one process stops, the others fail in the middle of an exchange with it. The first to stop puts its name down in
the store through which they found each other, and says why; the others see that it has, and say nothing. Before they
have found each other, all of them read the same command line and the same files: there the main process speaks.
"""

import os
import sys

import torch.distributed as dist

KEY = "hf_clip_stopped"
EXPECTED = (OSError, ValueError, ImportError)
"""What is raised with a message for the user; any other error is a fault of the program, and keeps its traceback."""


def _is_first() -> bool:
    """Whether no other process has said yet why the run ends."""
    if not (dist.is_available() and dist.is_initialized()):
        return int(os.environ.get("RANK", "0")) == 0
    try:
        return dist.distributed_c10d._get_default_store().add(KEY, 1) == 1
    except RuntimeError:  # the store went with the process that kept it
        return False


def report(error: Exception) -> int:
    """Say in one line why the run ends, unless another process has; returns the exit status.

    Raises an error that is none of the user's, unless it only follows from another process having stopped.
    """
    is_first = _is_first()
    if not isinstance(error, EXPECTED):
        if is_first:
            raise error
        return 1
    if is_first:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.stderr.flush()
    return 1
