"""Progress bars. Nothing here imports torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(title: str, unit: str, total: int | None, is_shown: bool) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar inside a `with` block; yields the function that advances it by a number of items."""
    if not is_shown:
        # Not `disable=True`: tqdm takes its process-wide lock even then. A process forked while another thread holds
        # that lock would wait for ever.
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, total=total, leave=False) as bar:
        yield bar.update


__all__ = ["progress_bar"]
