"""A server as a process: its signals, and the clients that stall.

SIGTERM and SIGINT: no connection is accepted any more, what was begun is finished, and the process ends with status 0.

A client that stalls is cut after a time, whatever it is late with: the head of a request, its body (`read_body`), or
taking an answer. If there are too many connections before that, the one that has been silent longest makes room.
"""

import asyncio
import gc
import logging
import signal
import socket
import sys
import warnings
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from pydantic_core import to_json
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..inference.computing_thread import without_a_team
from .access_guard import error_answer, plain_path
from .request_error import RequestError

HEAD_SECONDS = 10.0
"""How long a client may take for the head of a request. uvicorn itself waits for ever."""

ANSWER_SECONDS = 30.0
"""How long a client may take to read an answer that is larger than the buffers of the connection, or `LEAST_TAKEN` of
it. An answer may have 20 MB, for which an honest client behind a slow line needs longer."""

LEAST_TAKEN = 2**20
"""Bytes of a large answer that a client takes within `ANSWER_SECONDS`."""

SWITCH_SECONDS = 0.0002
"""How long a thread may keep Python while another one waits for it. Python's own 5 ms are a third of the time of a
text. While requests are read, the thread that computes would wait so long after each matrix product, and the event loop
after each system call."""

MOST_CONNECTIONS = 2000
"""Connections at the same time, if the process may open twice as many files."""

GRACE_SECONDS = 60
"""How long requests that were begun may take once the process is asked to end."""


def most_connections() -> int:
    """How many connections are held at the same time. The other files are for those that are accepted together, before
    one of them can be closed, and for the index."""
    try:
        import resource
    except ImportError:  # Windows
        return MOST_CONNECTIONS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, files // 2)


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    """The app of a connection for which there is no room."""
    headers = {"Retry-After": "1", "Connection": "close"}
    error = RequestError(503, "The server has too many connections; ask again in 1 s.", "overloaded", headers=headers)
    await error_answer(error, plain_path(scope))(scope, receive, send)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which closes connections whose clients do not go on."""

    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the time for the first request."""
        super().connection_made(transport)
        # `pause_writing` is called for the first byte that a client does not take, and not only for much: a connection
        # whose last bytes nobody takes would stay for ever, even once it is closed.
        transport.set_write_buffer_limits(high=0)
        self._heard_at = self.loop.time()
        if len(self.connections) > most_connections():
            self._make_room()
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Stop the time once a whole head has arrived, and start it with the first byte of the next one."""
        self._heard_at = self.loop.time()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the times."""
        self._stop_waiting()
        if self._answer_timer is not None:
            self._answer_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the time for a client to take its answer, which is in memory until then."""
        super().pause_writing()
        self._wait_for_client()

    def resume_writing(self) -> None:
        """Stop the time, since most of the answer is taken."""
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is answered."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # and no answer is under way
            said = (
                "This is no request in HTTP/1.1: its first line, its headers (16 KiB at most) or its chunks are wrong."
            )
            body = to_json(RequestError(400, said, "invalid_http").as_openai())
            head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body))
        self.transport.close()

    def _is_waiting(self) -> bool:
        """Whether it is the client's turn: to send a request, or the rest of one, or to take its answer."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _make_room(self) -> None:
        """Cut the connection that has been silent longest. If the server is at work for all, refuse this one."""
        others = [one for one in self.connections if one is not self and not one.transport.is_closing()]
        silent = [one for one in others if one._is_waiting()]
        if silent:
            min(silent, key=lambda one: one._heard_at).transport.abort()
        else:
            self.app = _refuse

    def _wait_for_client(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._answer_timer = self.loop.call_later(ANSWER_SECONDS, self._cut_unless_taken, left)

    def _cut_unless_taken(self, before: int) -> None:
        """Cut a connection whose client took too little of its answer, of which so many bytes were left before."""
        if before - self.transport.get_write_buffer_size() < LEAST_TAKEN:
            self.transport.abort()
        else:
            self._wait_for_client()

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def ignore_image_warnings() -> None:
    """Ignore warnings about strange images: each would be a line of the log, and Python remembers all that differ.

    They hold numbers of the images, and so may differ without end.
    """
    warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\b")


def keep_loaded() -> None:
    """Let Python look for garbage only in what comes from now on, and no more in what was loaded.

    It would take half a second each time, in which nothing is answered.
    """
    gc.collect()
    gc.freeze()


def quiet_when_cancelled(app: Any) -> Any:
    """An app that ends without an error if the process cancels its requests, which have told their clients so.

    uvicorn would log a traceback of each. Nothing else is around this app that waits for the cancellation.
    """

    async def run(scope: Any, receive: Any, send: Any) -> None:
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return run


def serve_forever(app: Any, taken: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        app: What `build_app` returned.
        taken: What `take_port` returned.
    """
    ignore_image_warnings()
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs letters of broken forms
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    config = uvicorn.Config(
        quiet_when_cancelled(app),
        http=PatientProtocol,
        ws="none",
        access_log=False,  # its lines hold what clients put into addresses
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        lifespan="on",
        backlog=most_connections() // 4,  # so many are accepted together, some times before the first can be closed
    )
    server = uvicorn.Server(config)

    def end(number: int, frame: Any) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it runs. A signal that comes earlier finds these. So does the one that
    # uvicorn raises again once it is done, and the process ends by itself.
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with without_a_team():
            server.run(sockets=[taken])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.setswitchinterval(interval)
        gc.unfreeze()


__all__ = ["ignore_image_warnings", "keep_loaded", "most_connections", "serve_forever"]
