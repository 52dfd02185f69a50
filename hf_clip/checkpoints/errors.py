"""What is said of a file that cannot be read, in one line of bounded length."""

MOST_SHOWN = 100
"""Characters of a name, value or reason that come from a file and are shown in a message."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is refused; the message says which and what to do."""


class NoCheckpointsPickleError(CheckpointError):
    """A pickle that is none of a checkpoint's."""

    def __init__(self, reason: str):
        super().__init__(f"holds a pickle that is no checkpoint's ({printable(reason)}).")


def printable(text: str, most: int = MOST_SHOWN) -> str:
    """A text from a file as it may be shown: its start alone, without line breaks or control characters."""
    start = text[:most]
    start = start if start.isprintable() else ascii(start)[: 2 * most]
    return start if len(text) <= most else f"{start}… ({len(text)} characters)"
