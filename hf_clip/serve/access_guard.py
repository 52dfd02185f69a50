"""What stands around every request: its path, the key, the figures, and that each error is one JSON answer.

An error that nobody foresaw is logged by its type and place. Its message is not, since it may hold what a client sent.
"""

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import traceback
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .request_body import ClientGoneError
from .request_error import RequestError
from .server_metrics import ServerMetrics

logger = logging.getLogger("hf_clip.serve")

OPEN = frozenset({"/", "/health", "/ping", "/docs", "/openapi.json"})
"""Paths that need no key: whether the server is there, and how it is used."""

IMMICH = frozenset({"/predict", "/ping"})
"""Paths whose errors have Immich's form."""

EMBEDDINGS = frozenset({"/v1/embeddings", "/embeddings"})
"""Paths of OpenAI's clients and Jina's, who look for the message in different places. Both are filled in, since it is
not known whose request has a wrong key, or is too large."""

CLIENT_GONE = 499


def plain_path(scope: Scope) -> str:
    """The path of a request below that of the app, without slashes at its end or several in a row.

    Clients whose base URL ends in a slash ask for `//v1/embeddings` or `/v1//embeddings`. Most do not follow a redirect
    of a POST.
    """
    path, root = scope["path"], scope.get("root_path", "")
    if f"{path}/".startswith(f"{root}/"):
        path = path[len(root) :]
    return re.sub("/+", "/", f"/{path}").rstrip("/") or "/"


def error_answer(error: RequestError, path: str) -> JSONResponse:
    """The answer for an error, in the dialect of the path."""
    body = error.as_detail() if path in IMMICH else error.as_openai()
    if path in EMBEDDINGS:
        body |= error.as_detail()
    return JSONResponse(body, error.status, error.headers)


def has_key(headers: Headers, key: str) -> bool:
    """Whether a request carries the key, compared in a time that does not tell how much of it is right."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return hmac.compare_digest(given.encode("latin-1"), key.encode())  # header's bytes, as they were sent


def is_local_name(host: str) -> bool:
    """Whether a Host header is `localhost` or a numeric address, which no web page can give to a server of its own."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def check_framing(headers: Headers) -> None:
    """Refuse a request whose length is given in two ways: a proxy in front may choose the other one."""
    if "transfer-encoding" in headers and "content-length" in headers:
        raise RequestError(
            400,
            "The request has both Content-Length and Transfer-Encoding: send one of them.",
            "invalid_framing",
            headers={"Connection": "close"},
        )


def place_of(error: BaseException) -> str:
    """Where an error was raised: files and lines, without any value."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


def _ending() -> RequestError:
    return RequestError(
        503, "The server was asked to end before this was done; ask again.", "ending", headers={"Connection": "close"}
    )


class AccessGuard:
    """ASGI middleware around the whole app.

    Args:
        app: The app.
        api_key: What clients have to send. None: nothing.
        metrics: Counts requests.
        only_local_names: See `ServeOptions`.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: ServerMetrics, only_local_names: bool = False):
        self.app, self._api_key, self._metrics = app, api_key, metrics
        self._only_local_names = only_local_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = plain_path(scope)
        scope = {**scope, "path": scope.get("root_path", "") + path}
        start, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            answer: Any = None
            cancelled: asyncio.CancelledError | None = None
            try:
                self._check_name(scope)
                self._check_key(scope, path)
                check_framing(Headers(scope=scope))
                await self.app(scope, receive, counted)
            except RequestError as error:
                answer = error_answer(error, path)
            except ClientGoneError:
                answer = Response(status_code=CLIENT_GONE)
            except asyncio.CancelledError as error:  # by the process, whose time to end is over
                answer, cancelled = error_answer(_ending(), path), error
            except Exception as error:
                logger.error("%s at %s", type(error).__name__, place_of(error))
                answer = error_answer(RequestError(500, "The server failed at this request.", "internal_error"), path)
            if answer is not None and not status:
                await answer(scope, receive, counted)
            if cancelled is not None:
                raise cancelled
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.on_request(route, status, time.perf_counter() - start)

    def _check_name(self, scope: Scope) -> None:
        if self._only_local_names and not is_local_name(Headers(scope=scope).get("host", "")):
            raise RequestError(
                403,
                "This server answers to localhost and to numeric addresses: ask it by one of them, or start it with "
                "--api-key or another --host.",
                "invalid_host",
                headers={"Connection": "close"},
            )

    def _check_key(self, scope: Scope, path: str) -> None:
        if self._api_key is None or path in OPEN or has_key(Headers(scope=scope), self._api_key):
            return
        raise RequestError(
            401,
            "The API key is missing or wrong: send it as Authorization: Bearer KEY, or as X-Api-Key.",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )


__all__ = ["AccessGuard", "error_answer", "has_key", "is_local_name", "plain_path"]
