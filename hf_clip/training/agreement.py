"""What one process of a run finds, done or refused in all of them.

If one process raised an error and the others did not, they would wait for it in their next exchange.
"""

from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")


def raise_together(error: Exception | None) -> None:
    """Raise in all processes what was raised in any. Every process calls this.

    Args:
        error: What this process has met, if anything. Of several, all raise the first process's.
    """
    from accelerate.utils import gather_object

    is_sent = error is None or isinstance(error, (OSError, ValueError))  # others may not be made again elsewhere
    sent = error if is_sent else OSError(f"{type(error).__name__}: {error}")
    first = next((each for each in gather_object([sent]) if each is not None), None)
    if first is None:
        return
    if error is not None and repr(first) == repr(sent):
        raise error
    raise first from error


def done_together(work: Callable[[], Found]) -> Found:
    """Do something in each process, and raise in all what any has met.

    Args:
        work: What this process does.

    Returns:
        What it made in this process.
    """
    found: list[Found] = []
    failure: Exception | None = None
    try:
        found.append(work())
    except Exception as error:
        failure = error
    raise_together(failure)
    return found[0]


def of_main_process(accelerator: Any, make: Callable[[], Found]) -> Found:
    """What the main process makes or raises, in all processes. Every process calls this.

    Args:
        accelerator: What `accelerate launch` has set up.
        make: Called on the main process alone.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            found[0] = make()
        except Exception as raised:
            error = raised
    raise_together(error)
    broadcast_object_list(found)
    return found[0]
