"""What an index notes of its approximate scan. Nothing here imports torch, which most searches do without."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .index_table import IndexTables
    from .search_copy import CopiedTables

NOTE = "approximate scan"

EXACT_UP_TO = 1_000_000
"""Images that are compared one by one without a word about it."""

RECALL_AT = 10


@dataclass(frozen=True)
class ApproximateScan:
    """How an index is searched without comparing every image.

    Attributes:
        probes: Partitions that a query looks into.
        rescored: Images that are compared exactly.
        recall: Measured recall@10 against the exact scan, for each kind of query: "images", and "texts".
        images: Number of images when it was built.
    """

    probes: int
    rescored: int
    recall: dict[str, float]
    images: int

    def describe(self) -> str:
        """Recall for each kind of query, and what a search looks at."""
        recall = ", ".join(f"{value:.3f} for {kind}" for kind, value in self.recall.items())
        return f"recall@{RECALL_AT} {recall}; {self.probes} partitions and {self.rescored} images per query"


def read_scan(tables: "IndexTables | CopiedTables") -> ApproximateScan | None:
    """The approximate scan of an index; None if it has none."""
    noted = tables.noted(NOTE)
    return ApproximateScan(**noted) if noted else None


__all__ = ["EXACT_UP_TO", "NOTE", "RECALL_AT", "ApproximateScan", "read_scan"]
