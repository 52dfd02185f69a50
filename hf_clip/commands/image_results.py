"""Results of many images: how they are printed or written, and the exit status where some images failed."""

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import typer

from ..model.checked_files import printable

if TYPE_CHECKING:
    from ..zero_shot.files import Classified

SOME_FAILED = 2
"""Exit status: there are results, but not of all images."""


def format_line(result: "Classified", width: int, label_width: int) -> str:
    """One result for people to read: one line, whatever the names of files and labels hold."""
    if result.error is not None:
        said = f"error: {result.error}"
    else:
        said = "  ".join(f"{entry['label']:<{label_width}} {entry['score']:.4f}" for entry in result.labels) or "-"
    line = f"{result.name:<{width}}  {said}"
    return printable(line)


def put_results(
    results: "Iterable[Classified]",
    table: "AbstractContextManager[Callable[[Classified], Any]] | None",
    *,
    total: int | None,
    name_width: int,
    label_width: int = 0,
) -> tuple[int, int]:
    """Print results as they are known, or write them into a table and show a progress bar.

    Args:
        results: A result for each image.
        table: What writes a result into a table. None: the results are printed.
        total: Number of images, for the bar, if it is known.
        name_width: Width of the longest name of an image.
        label_width: Width of the longest label, where labels stand in columns.

    Returns:
        How many results there were, and how many of them are errors.
    """
    if table is None:
        return _hand_on(results, lambda result: print(format_line(result, name_width, label_width), flush=True))
    from tqdm import tqdm

    with table as write, tqdm(total=total, unit="image", disable=None) as bar:
        return _hand_on(results, lambda result: (write(result), bar.update()))


def _hand_on(results: "Iterable[Classified]", take: "Callable[[Classified], Any]") -> tuple[int, int]:
    done = failed = 0
    for result in results:
        take(result)
        done, failed = done + 1, failed + (result.error is not None)
    return done, failed


def end_by_failures(done: int, failed: int, what: str) -> None:
    """End with status 2 where some images failed, and with an error where all did. `what` could not be done to them."""
    if failed and failed == done:
        raise ValueError(f"none of {done:,} images could be {what}")
    if failed:
        print(f"{failed:,} of {done:,} images could not be {what}", file=sys.stderr)
        raise typer.Exit(SOME_FAILED)


def end_by_problems(problems: Iterable[tuple[str, str]], count: int, is_listed: bool, what: str = "images") -> None:
    """Say what could not be opened, and end with status 2 if there is anything.

    Args:
        problems: Paths, and what is wrong with each.
        count: How many there are in all.
        is_listed: Whether each is said, and not their number alone.
        what: What could not be opened, as of several.
    """
    from ..search.index_table import shown_path

    if not count:
        return
    for path, problem in problems if is_listed else ():
        print(f"{printable(shown_path(path))}: {problem}", file=sys.stderr)
    advice = "" if is_listed else "; --errors lists them"
    counted = f"{count:,} {what if count != 1 else what.removesuffix('s')}"
    print(f"{counted} could not be opened{advice}", file=sys.stderr)
    raise typer.Exit(SOME_FAILED)
