"""A server as a process: its signals, and the clients that stall.

SIGTERM and SIGINT: no connection is accepted any more, what was begun is finished, and the process ends with status 0.
"""

import asyncio
import logging
import signal
import socket
import sys
import warnings
from typing import Any

import h11
import uvicorn
from pydantic_core import to_json
from uvicorn.protocols.http.h11_impl import H11Protocol

from .request_error import RequestError

HEAD_SECONDS = 10.0
"""How long a client may take for the head of a request. uvicorn itself waits for ever."""

ANSWER_SECONDS = 30.0
"""How long a client may take to read an answer that is larger than the buffers of the connection."""

SWITCH_SECONDS = 0.0002
"""How long a thread may keep Python from another one that waits for it. Python's own 5 ms are as long as a third of a
text takes: the thread that computes waits so long after each matrix product, and the event loop after each system call,
while other requests are read."""

GRACE_SECONDS = 60
"""How long requests that were begun may take once the process is asked to end."""


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which closes connections whose clients begin a request and do not go on."""

    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the time for the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Stop the time once a whole head has arrived, and start it with the first byte of the next one."""
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
        self._answer_timer = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the time, since most of the answer is taken."""
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is answered."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # and no answer is under way
            body = to_json(RequestError(400, "This is no HTTP request.", "invalid_http").as_openai())
            head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body))
        self.transport.close()

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
        app,
        http=PatientProtocol,
        ws="none",
        access_log=False,  # its lines hold what clients put into addresses
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        lifespan="on",
    )
    # uvicorn raises a signal again once it is done. It then finds these, and the process ends by itself.
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        uvicorn.Server(config).run(sockets=[taken])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.setswitchinterval(interval)


def _ignore(number: int, frame: Any) -> None:
    return


__all__ = ["ignore_image_warnings", "serve_forever"]
