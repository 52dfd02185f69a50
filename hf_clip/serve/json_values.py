"""Bound what a body of JSON becomes in memory before it is parsed.

A parsed value takes up to a hundred times the bytes that it has in JSON: `[]` and `{}` are the worst. Values are
therefore counted first, and lists are checked only up to the first value that does not fit.
"""

import re
from typing import Annotated, TypeVar

from pydantic import FailFast

from .request_error import RequestError

Value = TypeVar("Value")


class FirstFault(FailFast):
    """`FailFast` that can stand in a union, whose parts are hashed."""

    def __hash__(self) -> int:
        return hash(FirstFault)


Several = Annotated[list[Value], FirstFault()]
"""A list whose check ends at the first value that does not fit. A report of millions of them takes minutes."""

STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)


def _signs(content: bytes | bytearray) -> int:
    return content.count(b",") + content.count(b"[") + content.count(b"{")


def check_values(content: bytes | bytearray, most: int) -> None:
    """Raise RequestError if a body of JSON may hold more values than `most`. Commas within texts do not count."""
    if _signs(content) <= most:
        return
    has_many_strings = max(content.count(b'"'), content.count(b"\\")) > 4 * most  # which would take long to skip
    if has_many_strings or _signs(STRING.sub(b"", content)) > most:
        raise RequestError(
            413,
            f"The body has more than {most:,} values: send several requests.",
            "too_many_items",
        )


__all__ = ["Several", "check_values"]
