"""What goes wrong with an index, in one line: LanceDB's errors say where in its sources they were raised.

They come as ValueError, RuntimeError or OSError, with the reason somewhere in their words.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..checkpoints.whole_folder import FULL_WORDS
from ..model.checked_files import one_line

LONGEST_REASON = 200

DENIED = ("permission denied", "os error 13", "operation not permitted", "os error 1)")
READ_ONLY = ("read-only file system", "os error 30")
REFUSED = ("status: 403", "status: 401", "credentials", "accessdenied", "signaturedoesnotmatch")
OVERTAKEN = ("commit conflict", "conflicting", "concurrent", "preempted")
UNREACHABLE = ("connect error", "kind: connect", "dns error", "timed out", "timeout", "status: 5", "reqwest")


class SearchIndexError(ValueError):
    """An index is missing, damaged, of another model, of another version, in use, or cannot be read or written.

    Attributes:
        index: The index's folder or address.
    """

    def __init__(self, message: str, index: str = ""):
        super().__init__(message, index)
        self.index = index

    def __str__(self) -> str:
        return str(self.args[0])


def reason_of(error: BaseException) -> str:
    """What an error of LanceDB says, without the places in its sources."""
    text = one_line(error, 4000)
    text = re.sub(r",? ?(location: Location \{.*|/\S+\.rs:\d+:\d+.*|backtrace: .*)", "", text)
    text = re.sub(r"^((lance error|LanceError\(\w+\)|Query Execution error|Invalid input)[:,] )+", "", text)
    return text[:LONGEST_REASON].strip(" ,.:") or type(error).__name__


def is_overtaken(error: BaseException) -> bool:
    """Whether another process wrote to a table at the same moment."""
    return any(word in str(error).lower() for word in OVERTAKEN)


def is_of_condition(error: BaseException) -> bool:
    """Whether an error of LanceDB is about the condition of a read, and not about the tables."""
    text = str(error)
    if "ColumnEncoding" in text:  # a damaged file
        return False
    at_work = ("applying filter expression", "Physical plan does not support")
    return text.startswith("Invalid input") or any(words in text for words in at_work)


def known_problem(place: str, error: BaseException) -> str | None:
    """What happened to an index and what to do about it; None if the words of the error say nothing that is known."""
    text = str(error).lower()

    def says(words: tuple[str, ...]) -> bool:
        return any(word in text for word in words)

    if says((*FULL_WORDS, "os error 27", "os error 122")):
        return (
            f"There is no space left for the index {place}: it holds what was written before. Make room there, and "
            f"run the same command again."
        )
    if says(READ_ONLY):
        return f"The index {place} is on a medium that can only be read: it can be searched, and not be changed."
    if says(DENIED):
        return (
            f"Permission was denied for a file of the index {place}: searching needs permission to read all of it, "
            f"and indexing to write in it."
        )
    if says(REFUSED):
        return (
            f"Access to the index {place} was denied: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            f"AWS_SESSION_TOKEN, and what they allow."
        )
    if is_overtaken(error):
        return f"Another process wrote to the index {place} at the same moment: run the same command again."
    if "nosuchbucket" in text or "failed to resolve region" in text:
        return f"There is no bucket of the index {place}, or it is in another region: check the address and AWS_REGION."
    if "://" in place and says(UNREACHABLE):
        return (
            f"The object storage of the index {place} does not answer: check the network, and AWS_ENDPOINT if it is "
            f"not Amazon's."
        )
    return None


def damaged(place: str, reason: str) -> SearchIndexError:
    """The error for an index of which a file is missing or not whole."""
    return SearchIndexError(
        f"The index {place} is damaged ({reason}): take it from a copy, or remove it and make it anew with "
        f"`hf-clip index`.",
        place,
    )


@contextmanager
def in_words(place: str) -> Iterator[None]:
    """Raise what LanceDB raises inside the block as SearchIndexError, in one line."""
    try:
        yield
    except (SearchIndexError, ImportError):
        raise
    except Exception as error:
        problem = known_problem(place, error)
        raise (damaged(place, reason_of(error)) if problem is None else SearchIndexError(problem, place)) from error


__all__ = [
    "SearchIndexError",
    "damaged",
    "in_words",
    "is_of_condition",
    "is_overtaken",
    "known_problem",
    "reason_of",
]
