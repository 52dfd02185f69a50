"""Read the body of a request within limits of size, time, and of memory for all requests together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from .request_error import RequestError
from .serve_options import MIB, ServeOptions

CLOSE = {"Connection": "close"}
"""Sent where a body was not read to its end: what follows on the connection is no request."""

LINGER_SECONDS = 2.0
"""How long the rest of a body that is too large is read and forgotten. Many clients read no answer before they have
sent all."""


SMALL_BODY = MIB
"""Bytes of a body for which room is kept."""

FORM_PART = 2**20
"""Bytes of a form that are parsed at once."""


class ClientGoneError(Exception):
    """The client has closed its connection; there is nobody to answer."""


class BodyMemory:
    """Counts the bytes of all bodies that are held at the same time.

    Args:
        most: Bytes that are allowed. The last quarter is kept for small bodies, so that a few clients with large ones
            that stall do not keep everyone out.
    """

    def __init__(self, most: int):
        self._most, self.held = most, 0

    def take(self, count: int, size: int) -> None:
        """Hold more bytes, of a body that has `size` of them by now. Raises RequestError if that are too many."""
        if self.held + count > (self._most if size <= SMALL_BODY else self._most * 3 // 4):
            raise RequestError(
                429, "The server holds too many requests; ask again in 1 s.", "overloaded", headers={"Retry-After": "1"}
            )
        self.held += count

    def give(self, count: int) -> None:
        """Hold fewer bytes."""
        self.held -= count


def check_content_type(request: Request, wanted: str) -> None:
    """Raise RequestError if a body is of another type, or compressed."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != wanted:
        said = f"is {given[:60]!r}" if given else "is missing"
        raise RequestError(415, f"The header Content-Type {said}, but {wanted} is needed.", "unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise RequestError(
            415,
            f"The body has Content-Encoding {coding[:60]!r}, but is not decompressed here: send it as it is.",
            "unsupported_media_type",
        )


class _Incoming:
    """The parts of a request's body.

    Attributes:
        is_done: Whether the last part has arrived.
    """

    def __init__(self, request: Request):
        self._request, self.is_done = request, False

    async def next(self) -> bytes:
        """The next part. Raises ClientGoneError if the client is gone."""
        message = await self._request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self.is_done = not message.get("more_body", False)
        return message.get("body", b"")

    async def forget_rest(self) -> None:
        """Read what is left, for a short time, and keep nothing of it."""
        while not self.is_done:
            await self.next()


async def _collect(incoming: _Incoming, options: ServeOptions, memory: BodyMemory, content: bytearray) -> None:
    """Append a body to `content`. What is appended counts as held."""
    while not incoming.is_done:
        part = await incoming.next()
        if len(content) + len(part) > options.most_bytes:
            raise _too_large(options)
        memory.take(len(part), len(content) + len(part))
        content += part


def _too_large(options: ServeOptions) -> RequestError:
    return RequestError(
        413,
        f"The request is larger than {options.most_bytes / MIB:g} MiB: send fewer or smaller items.",
        "request_too_large",
        headers=CLOSE,
    )


async def _read(request: Request, options: ServeOptions, memory: BodyMemory, content: bytearray) -> None:
    incoming = _Incoming(request)
    try:
        claimed = request.headers.get("content-length", "")
        if claimed.isdecimal() and (len(claimed) > 18 or int(claimed) > options.most_bytes):
            raise _too_large(options)
        await asyncio.wait_for(_collect(incoming, options, memory, content), options.body_seconds)
    except (asyncio.TimeoutError, TimeoutError):
        raise RequestError(
            408,
            f"The request did not arrive within {options.body_seconds:g} s.",
            "request_timeout",
            headers=CLOSE,
        ) from None
    except RequestError as error:
        error.headers.update(CLOSE)
        with suppress(asyncio.TimeoutError, TimeoutError, ClientGoneError):
            await asyncio.wait_for(incoming.forget_rest(), LINGER_SECONDS)
        raise


@asynccontextmanager
async def read_body(request: Request, options: ServeOptions, memory: BodyMemory) -> AsyncIterator[bytearray]:
    """Read a body; it counts as held while the `async with` block runs.

    Raises:
        RequestError: It is too large or too slow, or too much is held already.
        ClientGoneError: The client is gone.
    """
    content = bytearray()
    try:
        await _read(request, options, memory, content)
        yield content
    finally:
        memory.give(len(content))


class _InMemory(MultiPartParser):
    """Keeps files in memory, whose size is limited already; strangers' images do not touch the disk."""

    spool_max_size = 2**40


def _check_form(request: Request, body: bytes | bytearray) -> None:
    """Raise RequestError if a form has another charset than UTF-8, or is cut off.

    Python's other codecs may take long, or make letters that are none. Of a form that is cut off the parser would leave
    out the last part, and leave its file open.
    """
    options = parse_options_header(request.headers.get("content-type"))[1]
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise RequestError(415, "The form has another charset than utf-8.", "unsupported_media_type")
    end = b"--" + options.get(b"boundary", b"") + b"--"
    if b"boundary" in options and not body.startswith(end) and b"\r\n" + end not in body:
        raise RequestError(400, "The form is cut off: it does not end with its boundary.", "invalid_form")


async def read_form(request: Request, body: bytes | bytearray) -> dict[str, str | bytes]:
    """Read the fields of a multipart body: texts, and the content of files."""
    _check_form(request, body)

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), FORM_PART):  # the event loop turns between parts
            yield bytes(body[start : start + FORM_PART])
            await asyncio.sleep(0)

    parser = _InMemory(
        request.headers,
        stream(),  # type: ignore[arg-type]
        max_files=1,
        max_fields=8,
        max_part_size=max(len(body), 1),
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(400, f"The form cannot be read ({error.message}).", "invalid_form") from None
    except (UnicodeDecodeError, LookupError, KeyError, ValueError):
        raise RequestError(400, "The form cannot be read.", "invalid_form") from None
    found: dict[str, str | bytes] = {}
    for name, value in form.multi_items():
        found[name] = await value.read() if isinstance(value, UploadFile) else value
    await form.close()
    return found


__all__ = ["BodyMemory", "ClientGoneError", "check_content_type", "read_body", "read_form"]
