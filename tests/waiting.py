"""Waiting for what other threads and processes do, on a machine that may let any of them stand still for seconds."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

LONGEST_WAIT = 120.0
"""Seconds that a test waits for what is sure to come. Only a test that fails waits so long."""


def until(look: Callable[[], Found], what: str = "what is waited for") -> Found:
    """Look again and again until something is there.

    Args:
        look: Returns it, or what is false.
        what: It, in words, for the error.

    Returns:
        What `look` returned last.
    """
    end = time.monotonic() + LONGEST_WAIT
    while not (found := look()):
        assert time.monotonic() < end, f"{what} did not come within {LONGEST_WAIT:.0f} s"
        time.sleep(0.01)
    return found
