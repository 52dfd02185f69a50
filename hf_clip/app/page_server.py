"""Serve a page, and nothing of the machine beside it.

- A browser gets the page's own files, what it uploaded itself, and answers, which hold images as thumbnails.
- Uploads lie in a folder of this process, which goes when it ends.
- A policy in each answer's head keeps a browser from asking any other server for fonts or scripts.
- On a loopback address, requests are answered for that machine's own names alone: a foreign site whose name is bent to
  this machine reads nothing.
"""

import errno
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

LARGEST_FILE = "25mb"

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; worker-src 'self' blob:; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'; object-src 'none'"
)
"""Content-Security-Policy. Gradio makes functions of texts, and has styles and scripts in its page."""

ENDING = 2
"""Seconds that open connections get when the server ends."""

SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SHARE": "False",
}
"""Gradio's switches, whatever the environment says: no calls to the outside, no second server."""


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Take a port before anything slow is done.

    Args:
        host: Name or address of this machine.
        port: The port. 0: any that is free.

    Raises:
        OSError: It is taken or not allowed, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise OSError(
            f"{host} is no name or address of this machine: give --host 127.0.0.1 for this machine alone, or --host "
            f"0.0.0.0 for its networks."
        ) from None
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(128)  # of two programs that bind, the second one fails here
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"Port {port} of {host} is taken by another program: end that, or give another port, such as --port "
                f"{port + 1 if port < 65535 else port - 1}."
            ) from None
        if error.errno == errno.EACCES:
            raise OSError(
                f"Port {port} is not allowed for this user: give one above 1023, such as --port 7860."
            ) from None
        raise OSError(
            f"{host} is no address of this machine ({error.strerror}): give --host 127.0.0.1 for this machine alone, "
            f"or --host 0.0.0.0 for its networks."
        ) from None
    return taken


def address_of(taken: socket.socket) -> str:
    """The address at which this machine's browser finds the page."""
    host, port = taken.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


@contextmanager
def own_folder() -> Iterator[str]:
    """A folder for uploads, and Gradio's settings, inside a `with` block."""
    before = {name: os.environ.get(name) for name in (*SETTINGS, "GRADIO_TEMP_DIR")}
    with tempfile.TemporaryDirectory(prefix="hf-clip-app-", ignore_cleanup_errors=True) as folder:
        os.environ.update(SETTINGS, GRADIO_TEMP_DIR=folder)
        try:
            yield folder
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def build_server(page: Any, host: str) -> Any:
    """The application that uvicorn serves.

    Args:
        page: PageModel.
        host: What it is served on.

    Returns:
        A FastAPI application.
    """
    from fastapi import FastAPI
    from gradio import mount_gradio_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .page_layout import STYLE, build_page, theme

    app, blocks = FastAPI(openapi_url=None), build_page(page)
    # `launch` sets it, and mounting does not. Without it Gradio takes any path in a request for an upload.
    blocks.has_launched = True
    mount_gradio_app(
        app,
        blocks,
        path="/",
        allowed_paths=[],
        max_file_size=LARGEST_FILE,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
        mcp_server=False,
        theme=theme(),
        css_paths=[STYLE],
    )

    @app.middleware("http")
    async def add_policy(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    if is_loopback(host):
        # Starlette takes what stands before the first colon, which is "[" of [::1].
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[", host])
    return app


def make_server(app: Any, started: Callable[[], Any]) -> Any:
    """A uvicorn server that calls `started` when it answers."""
    import logging

    import uvicorn

    def is_news(record: logging.LogRecord) -> bool:
        return "graceful shutdown exceeded" not in record.getMessage()  # each open page has such a connection

    logging.getLogger("uvicorn.error").addFilter(is_news)

    class PageServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                started()

    return PageServer(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=ENDING))


def serve_page(page: Any, taken: socket.socket, host: str, started: Callable[[], Any]) -> None:
    """Serve a page until Ctrl-C.

    Args:
        page: PageModel.
        taken: What `listen` returned.
        host: The host that was given to it.
        started: Called once the page is there.
    """
    with own_folder(), taken:
        make_server(build_server(page, host), started).run(sockets=[taken])


__all__ = ["address_of", "build_server", "is_loopback", "listen", "make_server", "own_folder", "serve_page"]
