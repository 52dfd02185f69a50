"""The routes of the server, and what each of them reads and answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from ..model.freed_memory import return_freed_memory
from . import docs_page, embedding_request, immich_predict
from .access_guard import AccessGuard, error_answer, plain_path
from .batching import IMAGES, TEXTS
from .classify_request import Classifiers, ClassifyRequest, classify
from .embedding_request import EmbeddingRequest
from .encoder import Encoder
from .json_values import read_json
from .public_fetch import PublicFetcher
from .request_body import BodyMemory, ClientGoneError, check_content_type, read_body, read_form
from .request_error import RequestError, from_validation
from .request_schema import described
from .serve_options import ServeOptions
from .served_model import ServedModel
from .server_metrics import ServerMetrics

Body = TypeVar("Body", bound=BaseModel)
Found = TypeVar("Found")

ROWS = 32
"""Rows of an answer that are written at once."""

KEPT_SECONDS = 30.0
"""How long the allocator keeps memory that requests have freed. An optimized model asks glibc to keep freed memory for
the next layer, and glibc itself never gives back what lies below something that stays. Bodies, images and batches have
all sizes: each time that no free piece is large enough for one, the process grows."""

SUMMARY = """Embeddings of texts and images by one CLIP model, for clients of OpenAI, infinity, Jina, vLLM and Immich.

`POST /v1/embeddings` takes `input` (texts; images as data URIs; `[{"text": …}, {"image": …}]`) or `messages`.
`POST /predict` is Immich's machine-learning service."""


async def unless_gone(request: Request, work: Awaitable[Found]) -> Found:
    """Await work, and give it up if the client closes its connection meanwhile.

    Raises:
        ClientGoneError: The client is gone; the work was cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _listed(value: Any) -> Any:
    """The numbers of an array, which JSON has no other form for."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def as_json(content: Any) -> Response:
    """An answer as JSON."""
    return Response(to_json(content, fallback=_listed), media_type="application/json")


async def rows_as_json(content: dict[str, Any]) -> Response:
    """An answer as JSON, whose field `data` may be a long list. The event loop turns between parts of it."""
    rows, parts = content.get("data", []), []
    if len(rows) <= ROWS:
        return as_json(content)
    for start in range(0, len(rows), ROWS):
        parts.append(to_json(rows[start : start + ROWS], fallback=_listed)[1:-1])
        await asyncio.sleep(0)
    head, _, tail = to_json(content | {"data": []}).partition(b'"data":[]')
    return Response(b'%s"data":[%s]%s' % (head, b",".join(parts), tail), media_type="application/json")


async def parsed(kind: type[Body], content: bytes | bytearray, options: ServeOptions) -> Body:
    """Read a body of JSON.

    Args:
        kind: What it should hold.
        content: The body.
        options: How much it may hold.

    Raises:
        RequestError: It is no JSON, or has other fields than are needed.
    """
    most_values = options.most_values(takes_ids=kind is EmbeddingRequest)
    found = await read_json(content, most_values, options.most_lists)
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise from_validation(error) from None


class Server:
    """All that the routes share.

    Args:
        served: The model.
        options: What is allowed.
        index: ImageIndex of the served model, for `POST /v1/search`. None: there is none.
        fetcher: Fetches addresses. None: one for public addresses, if `options` allow them.
    """

    def __init__(
        self,
        served: ServedModel,
        options: ServeOptions | None = None,
        index: Any = None,
        fetcher: PublicFetcher | None = None,
    ):
        self.options = options or ServeOptions()
        if self.options.allow_urls and fetcher is None:
            fetcher = PublicFetcher(self.options.url_seconds, self.options.url_bytes)
        self.served, self.metrics = served, ServerMetrics()
        self.memory = BodyMemory(self.options.held_bytes)
        self.encoder = Encoder(served, self.options, fetcher, self.metrics.on_batch)
        self.classifiers = Classifiers(self.encoder)
        self.search: Any = None
        if index is not None:
            from .search_request import IndexSearch  # needs LanceDB

            self.search = IndexSearch(index, self.encoder)
        for kind in (TEXTS, IMAGES):
            self.metrics.watch(kind, self.encoder.batcher.waiting)
        self.created = int(time.time())

    async def _answer(
        self, request: Request, kind: type[Body], make: Callable[[Body], Awaitable[dict[str, Any]]]
    ) -> Response:
        """Read a body of JSON, check the model's name, and answer."""
        check_content_type(request, "application/json")
        async with read_body(request, self.options, self.memory) as content:
            body = await parsed(kind, content, self.options)
            self.served.check_name(getattr(body, "model", None))
            return await rows_as_json(await unless_gone(request, make(body)))

    async def embeddings(self, request: Request) -> Response:
        """Embeddings of texts and images."""

        async def make(body: EmbeddingRequest) -> dict[str, Any]:
            items = embedding_request.items_of(body, self.options.most_items)
            embedding_request.check_dimensions(body.dimensions, self.served.width)
            encoded = await self.encoder.encode(items, body.is_truncated)
            return embedding_request.answer(body, encoded, self.served.name)

        return await self._answer(request, EmbeddingRequest, make)

    async def classify(self, request: Request) -> Response:
        """Labels of images."""
        return await self._answer(request, ClassifyRequest, lambda body: classify(body, self.encoder, self.classifiers))

    async def find(self, request: Request) -> Response:
        """Images of the index."""
        if self.search is None:
            raise RequestError(404, "This server has no index: whoever runs it may start it with --index.", "no_index")
        from .search_request import SearchRequest

        return await self._answer(request, SearchRequest, self.search.search)

    async def predict(self, request: Request) -> Response:
        """Immich's machine-learning service."""
        check_content_type(request, "multipart/form-data")
        async with read_body(request, self.options, self.memory) as content:
            form = await read_form(request, content)
            kind, name = immich_predict.read_entries(form.get("entries"))
            immich_predict.check_width(name, self.served.width)
            item = immich_predict.item_of_form(kind, form)
            encoded = await unless_gone(request, self.encoder.encode([item], truncate=True))
            return as_json(immich_predict.predicted(encoded))

    async def models(self, request: Request) -> Response:
        """The model by its names."""
        return as_json(embedding_request.list_models(self.served.name, self.served.names, self.created))

    async def one_model(self, request: Request) -> Response:
        """The model by one of its names."""
        asked = request.path_params["name"]
        self.served.check_name(asked)
        found = embedding_request.list_models(self.served.name, self.served.names, self.created)["data"]
        return as_json(next((entry for entry in found if entry["id"] == asked), found[0]))

    async def figures(self, request: Request) -> Response:
        """Figures for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        """Whether the server is there."""
        return as_json({"status": "ok", "unix": time.time()})

    async def ping(self, request: Request) -> Response:
        """Whether the server is there, for Immich."""
        return PlainTextResponse("pong")

    async def root(self, request: Request) -> Response:
        """What this is."""
        return as_json({"message": f"hf_clip serves {self.served.name}; see /docs"})

    async def docs(self, request: Request) -> Response:
        """How the server is used, for people."""
        scope, host = request.scope, request.headers.get("host", "")
        address = docs_page.address_in(scope["scheme"], host, scope.get("root_path", ""))
        has_key = self.options.api_key is not None
        page = docs_page.make_page(request.app.openapi(), address, self.served.names, self.served.width, has_key)
        return HTMLResponse(page, headers=docs_page.HEADERS)

    def _close(self) -> None:
        self.encoder.close()
        if self.search is not None:
            self.search.close()

    async def _return_memory(self) -> None:
        """Return freed memory to the system from time to time, if there were requests."""
        answered = 0
        while True:
            await asyncio.sleep(KEPT_SECONDS)
            if answered != self.metrics.answered:
                answered = self.metrics.answered
                await asyncio.get_running_loop().run_in_executor(self.encoder.pool, return_freed_memory)

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Threads run while the app does."""
        self.encoder.start()
        returning = asyncio.ensure_future(self._return_memory())
        try:
            yield
        finally:
            returning.cancel()
            with suppress(asyncio.CancelledError):
                await returning
            await asyncio.get_running_loop().run_in_executor(None, self._close)


async def refused(request: Request, error: Exception) -> JSONResponse:
    """The answer for a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    said = {404: "There is no such path", 405: f"This path takes the method {headers.get('Allow', '')}"}
    message = f"{said.get(error.status_code, error.detail)}; see /docs."
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return error_answer(RequestError(error.status_code, message, code, headers=headers), plain_path(request.scope))


def add_routes(app: FastAPI, server: Server) -> None:
    """Add what the server answers, with the bodies that it reads."""
    posts: list[tuple[str, Any, type[BaseModel] | None]] = [
        ("/v1/embeddings", server.embeddings, EmbeddingRequest),
        ("/embeddings", server.embeddings, EmbeddingRequest),
        ("/v1/classify", server.classify, ClassifyRequest),
    ]
    if server.search is not None:
        from .search_request import SearchRequest

        posts.append(("/v1/search", server.find, SearchRequest))
    else:  # it says so, and stands in no list
        app.add_api_route("/v1/search", server.find, methods=["POST"], include_in_schema=False)
    for path, endpoint, body in [*posts, ("/predict", server.predict, None)]:
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=described(body))
    for path, endpoint in (
        ("/v1/models", server.models),
        ("/models", server.models),
        ("/v1/models/{name:path}", server.one_model),
        ("/models/{name:path}", server.one_model),
        ("/metrics", server.figures),
        ("/health", server.health),
        ("/ping", server.ping),
        ("/", server.root),
    ):
        app.add_api_route(path, endpoint, methods=["GET"])
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/docs", server.docs, methods=["GET", "HEAD"], include_in_schema=False)


def build_app(
    served: ServedModel,
    options: ServeOptions | None = None,
    index: Any = None,
    fetcher: PublicFetcher | None = None,
) -> FastAPI:
    """Build the ASGI app, for uvicorn or another server of that kind.

    Args:
        served: The model.
        options: What is allowed.
        index: ImageIndex of the served model. None: no search.
        fetcher: As for `Server`.

    Returns:
        The app.

    Example::

        app = build_app(load_served("clip-vit-b32"))
    """
    server = Server(served, options, index, fetcher)
    app = FastAPI(
        title="hf_clip",
        description=SUMMARY,
        lifespan=server.running,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    add_routes(app, server)
    app.add_exception_handler(HTTPException, refused)
    app.add_middleware(
        AccessGuard,
        api_key=server.options.api_key,
        metrics=server.metrics,
        only_local_names=server.options.only_local_names,
    )
    return app


__all__ = ["Server", "build_app"]
