"""Serve a page, and nothing of the machine beside it.

- A browser gets the page's own files, what it uploaded itself, and answers, which hold images as thumbnails.
- Uploads lie in a folder of this process, which goes when it ends.
- A policy in each answer's head keeps a browser from asking any other server for fonts or scripts.
- On a loopback address, requests are answered for that machine's own names alone: a foreign site whose name is bent to
  this machine reads nothing.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..taken_port import is_loopback

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


def build_server(page: Any, only_name: str | None) -> Any:
    """The application that uvicorn serves.

    Args:
        page: PageModel.
        only_name: Requests are answered for this name and for localhost alone. None: for any name.

    Returns:
        A FastAPI application.
    """
    from fastapi import FastAPI
    from gradio import mount_gradio_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .page_layout import STYLE, build_page, theme

    app = FastAPI(openapi_url=None)
    mount_gradio_app(
        app,
        build_page(page),
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

    if only_name is not None:
        # Starlette takes what stands before the first colon, which is "[" of [::1].
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[", only_name])
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
        taken: What `take_port` returned.
        host: The host that was given to it.
        started: Called once the page is there.
    """
    with own_folder(), taken:
        make_server(build_server(page, host if is_loopback(taken) else None), started).run(sockets=[taken])


__all__ = ["build_server", "make_server", "own_folder", "serve_page"]
