"""Download an image from the web, within limits of time and memory that no server can exceed.

One deadline covers everything together: looking up the name, connecting, redirects, retries, and a slow body. The size
limit holds both for the bytes that arrive and for those that a compressed answer unpacks to. It is checked before more
bytes are kept. Redirects are followed one by one, so that the scheme of each is checked and its body is never read.
"""

import asyncio
import base64
import os
import re
import zlib
from concurrent.futures import Future
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from threading import Thread
from typing import Any
from urllib.parse import unquote_to_bytes

TOTAL_TIMEOUT = 60.0
"""Seconds until a download is given up, all retries together, unless the caller gives another number."""

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 10.0
"""Seconds to wait for the next byte."""

MAX_BYTES = 100 * 2**20
"""Largest answer in bytes, both as sent and unpacked. A photograph has a few MiB."""

MAX_REDIRECTS = 5
ATTEMPTS = 3
FIRST_WAIT = 0.5
"""Seconds before the second attempt, doubled before the third. The server may ask for another time."""

TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
"""Status codes after which the same request may succeed a moment later."""

HEADERS = {"User-Agent": "hf_clip", "Accept-Encoding": "identity"}
"""Images are compressed already, so the server is asked for no compression. A compressed answer is still accepted."""


class FetchError(ValueError):
    """A download failed.

    Attributes:
        address: The address.
        reason: What went wrong; also the message.
        status: Status code of the server's answer. None without an answer.
        retry_after: Seconds that the server asked to wait, or None.
    """

    def __init__(self, address: str, reason: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(address, reason, status, retry_after)  # with all of them it can be pickled
        self.address, self.reason, self.status, self.retry_after = address, reason, status, retry_after

    def __str__(self) -> str:
        return self.reason


def is_web_address(text: str) -> bool:
    """Whether a text is an http or https address, or a data URI, and not the path of a file."""
    return text.lstrip()[:8].lower().startswith(("http://", "https://", "data:"))


def fetch(address: str, timeout: float | None = None) -> bytes:
    """Download the content of an http or https address, or decode a data URI.

    An address may contain spaces and letters beyond ASCII, in its host too. If the connection breaks or the server is
    busy (408, 429, 5xx), the request is sent again, up to three times in all.

    Args:
        address: `http://…`, `https://…` or `data:…`.
        timeout: Seconds for everything together. None: 60.

    Returns:
        The content, at most 100 MiB, unpacked if it was sent as gzip or deflate.

    Raises:
        FetchError: There is no content, it is too large, it took too long, or a redirect leads to another scheme than
            http and https.
    """
    address = address.strip()
    if address[:5].lower() == "data:":
        return _read_data_uri(address)
    seconds = TOTAL_TIMEOUT if timeout is None else timeout
    future: Future[bytes] = Future()
    # In a thread of its own for two reasons: this thread may have an event loop already (in notebooks), and looking up
    # a name cannot be interrupted, only abandoned.
    Thread(target=_run, args=(address, seconds, future), name="hf_clip fetch", daemon=True).start()
    return future.result()


def _run(address: str, seconds: float, future: "Future[bytes]") -> None:
    try:
        asyncio.run(_finish(address, seconds, future))
    except BaseException as error:  # the caller waits for a result or an error
        if not future.done():
            future.set_exception(error)


async def _finish(address: str, seconds: float, future: "Future[bytes]") -> None:
    """Download, and set the future's result or error.

    The future is set within the event loop, since closing the loop waits for a name that is still being looked up.
    """
    # httpx, or its successor httpx2: what this huggingface_hub uses. It is imported within functions, since it takes
    # longer to import than all else that a file needs to be opened.
    from huggingface_hub.utils import httpx

    try:
        future.set_result(await asyncio.wait_for(_with_retries(address, seconds), seconds))
    except asyncio.TimeoutError:
        future.set_exception(FetchError(address, f"it did not arrive within {seconds:g} s"))
    except httpx.ConnectTimeout:
        future.set_exception(FetchError(address, f"no connection within {CONNECT_TIMEOUT:g} s"))
    except httpx.TimeoutException:
        future.set_exception(FetchError(address, f"the server sent nothing for {READ_TIMEOUT:g} s"))
    except FetchError as error:
        future.set_exception(error)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        future.set_exception(FetchError(address, _first_cause(error)))


def _first_cause(error: BaseException) -> str:
    """Return the message of the innermost error, which is that of the operating system."""
    cause: BaseException | None = error
    while cause is not None:
        error, cause = cause, cause.__cause__ or cause.__context__
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)  # plainer than "Connect call failed"
    return str(error) or type(error).__name__


@lru_cache(maxsize=1)
def _certificates() -> Any:
    """Load the certificates once, which takes longer than the download of a small image."""
    from huggingface_hub.utils import httpx

    return httpx.create_ssl_context()


async def _with_retries(address: str, seconds: float) -> bytes:
    from huggingface_hub.utils import httpx

    deadline = asyncio.get_running_loop().time() + seconds
    timeouts = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    async with httpx.AsyncClient(headers=HEADERS, timeout=timeouts, verify=_certificates()) as client:
        for attempt in range(1, ATTEMPTS + 1):
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            try:
                return await _ask(client, address)
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):  # the connection broke
                if attempt == ATTEMPTS:
                    raise
            except FetchError as error:
                wait = wait if error.retry_after is None else error.retry_after
                is_too_late = asyncio.get_running_loop().time() + wait >= deadline
                if error.status not in TRANSIENT_STATUS or attempt == ATTEMPTS or is_too_late:
                    raise
            await asyncio.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


async def _ask(client: Any, address: str) -> bytes:
    """Send one request and follow its redirects."""
    request, leads_to = client.build_request("GET", address), address
    for _ in range(MAX_REDIRECTS + 1):
        if request is None or request.url.scheme not in ("http", "https"):
            raise FetchError(address, f"it leads to {leads_to[:200]!r}, but only http and https are followed")
        response = await client.send(request, stream=True)
        try:
            if not response.has_redirect_location:
                return await _content(response, address)
            request, leads_to = response.next_request, response.headers["location"]
        finally:
            await response.aclose()
    raise FetchError(address, f"it is redirected more than {MAX_REDIRECTS} times")


async def _content(response: Any, address: str) -> bytes:
    if not response.is_success:
        status, wait = response.status_code, _retry_after(response.headers.get("retry-after", ""))
        asked = "" if wait is None else f", to be asked again in {wait:g} s"
        raise FetchError(address, f"the server answered {status} {response.reason_phrase}{asked}", status, wait)
    too_large = FetchError(address, f"its content is larger than {MAX_BYTES // 2**20} MiB", response.status_code)
    claimed = response.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed) > MAX_BYTES:
        raise too_large
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise FetchError(address, f"it is encoded as {encoding[:40]!r}, but gzip, deflate or nothing is needed")
    # Not unpacked by httpx, which unpacks all bytes that arrived at once, to a thousand times their size. 32: gzip or
    # zlib.
    unpacker = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS) if encoding not in ("", "identity") else None
    content, received = bytearray(), 0
    try:
        async for chunk in response.aiter_raw():
            received += len(chunk)
            content += chunk if unpacker is None else unpacker.decompress(chunk, MAX_BYTES + 1)
            if max(received, len(content)) > MAX_BYTES:
                raise too_large
    except zlib.error as error:
        raise FetchError(address, f"its {encoding} encoding is damaged ({error})") from error
    if unpacker is not None and not unpacker.eof:
        raise FetchError(address, f"its {encoding} encoding is cut off")
    return bytes(content)


def _retry_after(text: str) -> float | None:
    """Read the seconds to wait from a Retry-After header, which holds a number of seconds or a date."""
    if text.isdecimal():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return max(0.0, round((moment - datetime.now(timezone.utc)).total_seconds()))


def _read_data_uri(uri: str) -> bytes:
    """Decode a data URI, `data:[type][;base64],…`. base64 may have line ends, percent-encoding, or no padding."""
    about, comma, data = uri[5:].partition(",")
    shown = f"{uri[:40]}…"
    if not comma:
        raise FetchError(shown, "a data URI needs a comma in front of its data")
    content = unquote_to_bytes(data)
    if not about.rstrip().lower().endswith(";base64"):
        return content
    letters = re.sub(rb"\s+", b"", content).rstrip(b"=")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except ValueError as error:
        raise FetchError(shown, f"its base64 is damaged ({error})") from None
