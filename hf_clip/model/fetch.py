"""An image's address on the web → its content. No server makes that take longer, or more memory, than is set here.

One deadline holds for everything together: looking the name up, connecting, redirects, retries, a body that trickles.
The size limit holds for what arrives and for what a compressed answer unpacks to, and is checked before more is kept.
Redirects are followed by hand, so that each one's scheme is checked and no redirect's body is read.
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

from huggingface_hub.utils import httpx  # httpx, or its successor httpx2: what this huggingface_hub uses

TOTAL_TIMEOUT = 60.0
"""Seconds until an image is given up, all retries together, unless the caller says otherwise."""

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 10.0
"""Seconds without a byte."""

MAX_BYTES = 100 * 2**20
"""The largest answer, and the largest that it may unpack to. Photographs have a few MiB."""

MAX_REDIRECTS = 5
ATTEMPTS = 3
FIRST_WAIT = 0.5
"""Seconds before the second attempt, doubled before the third, unless the server says how long."""

TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
"""What the same request may be answered otherwise a moment later."""

HEADERS = {"User-Agent": "hf_clip", "Accept-Encoding": "identity"}
"""Images are compressed already. A server that compresses all the same is understood."""


class FetchError(ValueError):
    """An address gave no content.

    Attributes:
        address: what was asked for.
        reason: what went wrong, which is also the text.
        status: the server's answer, or None where there was none.
        retry_after: seconds that the server asked to wait, or None.
    """

    def __init__(self, address: str, reason: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(address, reason, status, retry_after)  # with all of them it can be pickled
        self.address, self.reason, self.status, self.retry_after = address, reason, status, retry_after

    def __str__(self) -> str:
        return self.reason


def is_web_address(text: str) -> bool:
    """Whether a text is an http(s) address or a data URI, which name no file of this machine."""
    return text.lstrip()[:8].lower().startswith(("http://", "https://", "data:"))


def fetch(address: str, timeout: float | None = None) -> bytes:
    """The content of an http(s) address or of a data URI.

    Spaces and letters beyond ASCII may stand in an address as they are, in its host too. A connection that breaks,
    and a server that is busy (408, 429, 5xx), are tried again, three times at most.

    Args:
        address: `http://…`, `https://…` or `data:…`.
        timeout: seconds for all of it together; None is 60.

    Returns:
        The content, at most 100 MiB, unpacked where it was sent compressed by gzip or deflate.

    Raises:
        FetchError: there is no content, or it is too large, too slow, or leads elsewhere than to http and https.
    """
    address = address.strip()
    if address[:5].lower() == "data:":
        return _read_data_uri(address)
    seconds = TOTAL_TIMEOUT if timeout is None else timeout
    future: Future[bytes] = Future()
    # In a thread of its own: there may be an event loop in this one (notebooks), and looking up a name cannot be
    # interrupted, only left behind.
    Thread(target=_run, args=(address, seconds, future), name="hf_clip fetch", daemon=True).start()
    return future.result()


def _run(address: str, seconds: float, future: "Future[bytes]") -> None:
    try:
        asyncio.run(_finish(address, seconds, future))
    except BaseException as error:  # the caller waits for a result or an error
        if not future.done():
            future.set_exception(error)


async def _finish(address: str, seconds: float, future: "Future[bytes]") -> None:
    """Fill the future. This is done in here, since the loop's end waits for a name that is still being looked up."""
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
    """What the system said, below the words of the libraries in between."""
    cause: BaseException | None = error
    while cause is not None:
        error, cause = cause, cause.__cause__ or cause.__context__
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)  # plainer than "Connect call failed"
    return str(error) or type(error).__name__


@lru_cache(maxsize=1)
def _certificates() -> Any:
    """Read once: that takes longer than many an image."""
    return httpx.create_ssl_context()


async def _with_retries(address: str, seconds: float) -> bytes:
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
    """One request and the redirects that follow it."""
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
    # By ourselves, since httpx unpacks all that arrived at once, to a thousand times its size. 32: gzip or zlib.
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
    """Seconds, of a number of them or a date."""
    if text.isdecimal():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return max(0.0, round((moment - datetime.now(timezone.utc)).total_seconds()))


def _read_data_uri(uri: str) -> bytes:
    """`data:[type][;base64],…`: base64 with line ends, percent-encoded or without padding too, or percent-encoding."""
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
