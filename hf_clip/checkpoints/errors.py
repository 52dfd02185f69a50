"""What is said of a checkpoint that cannot be read."""

from ..model.checked_files import one_line

MOST_SHOWN = 100
"""Characters of a name, value or reason that come from a checkpoint and are shown in a message."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is refused; the message says which and what to do."""


class NoCheckpointsPickleError(CheckpointError):
    """A pickle that is none of a checkpoint's."""

    def __init__(self, reason: str):
        self.reason = one_line(reason, MOST_SHOWN)
        super().__init__(f"holds a pickle that is no checkpoint's ({self.reason}).")

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.reason,)
