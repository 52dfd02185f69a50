"""Bound what a body of JSON becomes in memory before it is parsed.

A parsed value takes up to a hundred times the bytes that it has in JSON: `[]` and `{}` are the worst. Values are
therefore counted first, and lists are checked only up to the first value that does not fit.

All this is done in steps of a few milliseconds, between which the event loop answers other requests. A thread would not
help: whoever parses JSON holds Python's lock to the end.
"""

import asyncio
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import FailFast
from pydantic_core import from_json

from .request_error import RequestError

Value = TypeVar("Value")
Content = bytes | bytearray

STEP = 2**22
"""Bytes that are counted at once."""

STRINGS = 2000
"""Texts that are skipped at once."""


class FirstFault(FailFast):
    """`FailFast` that can stand in a union, whose parts are hashed."""

    def __hash__(self) -> int:
        return hash(FirstFault)


Several = Annotated[list[Value], FirstFault()]
"""A list whose check ends at the first value that does not fit. A report of millions of them takes minutes."""

STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
UP_TO_STRINGS = re.compile(rb'(?:[^"]*"[^"\\]*(?:\\.[^"\\]*)*"){1,%d}' % STRINGS, re.DOTALL)
"""A part of JSON that ends with a text."""


class _Counted:
    """How many values JSON may hold, and how many of them are lists and objects, by the signs around them.

    Args:
        most_values: Values that are allowed.
        most_lists: Lists and objects that are allowed.
    """

    def __init__(self, most_values: int, most_lists: int):
        self._most_values, self._most_lists = most_values, most_lists
        self._commas = self._lists = 0

    def add(self, part: Content, start: int = 0, end: int | None = None) -> None:
        """Count the signs of a part."""
        self._commas += part.count(b",", start, end)
        self._lists += part.count(b"[", start, end) + part.count(b"{", start, end)

    def fault(self) -> str | None:
        """What there is too much of."""
        if self._lists > self._most_lists:
            return f"{self._most_lists:,} lists and objects"
        return f"{self._most_values:,} values" if self._commas + self._lists > self._most_values else None


def _too_many(what: str) -> RequestError:
    return RequestError(413, f"The body has more than {what}: send several requests.", "too_many_items")


def _parts_outside_texts(content: Content) -> Iterator[bytes]:
    """Parts of JSON without its texts. A text that does not end is left out too."""
    place = 0
    while place < len(content):
        found = UP_TO_STRINGS.match(content, place)
        if found is None:
            end = content.find(b'"', place)
            yield bytes(content[place : end if end >= 0 else len(content)])
            return
        yield STRING.sub(b"", found[0])
        place = found.end()


def _steps(content: Content, most_values: int, most_lists: int) -> Iterator[None]:
    """Do what `check_values` does in steps."""
    counted, quotes, escapes = _Counted(most_values, most_lists), 0, 0
    for start in range(0, len(content), STEP):
        end = start + STEP
        counted.add(content, start, end)
        quotes += content.count(b'"', start, end)
        escapes += content.count(b"\\", start, end)
        yield
    if (fault := counted.fault()) is None:
        return
    if max(quotes, escapes) > 4 * most_values:  # which would take long to skip
        raise _too_many(fault)
    outside = _Counted(most_values, most_lists)
    for part in _parts_outside_texts(content):
        outside.add(part)
        if (fault := outside.fault()) is not None:
            raise _too_many(fault)
        yield


def check_values(content: Content, most_values: int, most_lists: int | None = None) -> None:
    """Raise RequestError if a body of JSON may hold too much. Commas and brackets within texts do not count.

    Args:
        content: The body.
        most_values: Values that are allowed, lists and objects included.
        most_lists: Lists and objects that are allowed. None: as many as values.
    """
    for _ in _steps(content, most_values, most_values if most_lists is None else most_lists):
        pass


async def read_json(content: Content, most_values: int, most_lists: int) -> Any:
    """Parse a body of JSON, unless it holds too much.

    Args:
        content: The body.
        most_values: Values that are allowed, lists and objects included.
        most_lists: Lists and objects that are allowed.

    Raises:
        RequestError: It is no JSON, or holds too much.
    """
    for _ in _steps(content, most_values, most_lists):
        await asyncio.sleep(0)
    try:
        return from_json(content)
    except ValueError as error:  # its message names the place, and nothing of the content
        raise RequestError(400, f"The body is no JSON ({error}).", "invalid_json") from None


__all__ = ["Several", "check_values", "read_json"]
