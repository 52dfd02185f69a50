"""Images of a data set that cannot be opened: a measurement counts them, and ends if there are too many."""

from dataclasses import dataclass, field

MOST_UNREADABLE = 0.01
"""The part of a data set's images that may be unreadable. More would change the figures."""

SHOWN = 3
"""Number of unreadable images that an error names."""


class UnreadableImagesError(ValueError):
    """More images cannot be opened than a measurement may leave out.

    Attributes:
        count: Number of images that cannot be opened.
        total: Number of images that were looked at.
        reasons: For each of them its name and what is wrong.
    """

    def __init__(self, message: str, count: int = 0, total: int = 0, reasons: list[str] | None = None):
        super().__init__(message, count, total, reasons)
        self.count, self.total, self.reasons = count, total, reasons or []

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Unreadable:
    """The images of a data set that cannot be opened.

    consequence: of many of them
    """

    source: str
    total: int | None = None
    consequence: str = "the figures would be of other data"
    seen: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Count an image. Raises UnreadableImagesError once there are too many of a data set of known size."""
        self.reasons.append(f"{name}: {reason}")
        if self.total is not None:
            self.check(self.total)

    def check(self, total: int) -> None:
        """Raise UnreadableImagesError if too many of `total` images cannot be opened."""
        count = len(self.reasons)
        if count <= MOST_UNREADABLE * total:
            return
        shown = "; ".join(self.reasons[:SHOWN])
        raise UnreadableImagesError(
            f"{self.source}: {count} of {total} images cannot be opened, more than {MOST_UNREADABLE:.0%}, so "
            f"{self.consequence}. Replace them, or leave them out: {shown}.",
            count,
            total,
            self.reasons,
        )
