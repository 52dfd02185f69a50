"""Who may ask, how much, and what nobody is told: keys, limits, errors, figures."""

import asyncio
import json
import logging
import struct
import zlib
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from hf_clip.serve.access_guard import AccessGuard
from hf_clip.serve.request_body import BodyMemory
from hf_clip.serve.request_error import RequestError
from hf_clip.serve.serve_options import MIB, ServeOptions
from hf_clip.serve.server_metrics import ServerMetrics
from hf_clip.serve.server_process import quiet_when_cancelled
from hf_clip.serve.web_app import build_app

from .conftest import as_file, as_uri

OPEN = ("/", "/health", "/ping", "/docs", "/openapi.json")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify", "/v1/search", "/predict", "/embeddings"])
def test_without_the_key_nothing_is_done(client_with, path: str):
    client = client_with(api_key="secret-key")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": ""}, {"Authorization": "Basic secret-key"}):
        answer = client.post(path, json={"input": "one"}, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        body = answer.json()
        assert "API key" in (body["detail"] if path == "/predict" else body["error"]["message"])


def test_key_is_taken_in_both_headers(client_with):
    client = client_with(api_key="secret-key")
    for headers in ({"Authorization": "bearer secret-key"}, {"X-Api-Key": "secret-key"}):
        assert client.post("/v1/embeddings", json={"input": "one"}, headers=headers).status_code == 200
        assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/metrics").status_code == client.get("/v1/models").status_code == 401
    assert {client.get(path).status_code for path in OPEN} == {200}


def test_name_that_a_web_page_points_at_this_machine_is_refused(client_with):
    client = client_with(only_local_names=True)
    for host in ("localhost", "LOCALHOST:7997", "127.0.0.1:7997", "[::1]:7997", "[::1]", "127.0.0.1"):
        answer = client.post("/v1/embeddings", json={"input": "one"}, headers={"Host": host})
        assert answer.status_code == 200, host
    for host in ("evil.example", "evil.example:7997", "localhost.evil.example", "127.0.0.1.evil.example:1", ""):
        answer = client.post("/v1/embeddings", json={"input": "one"}, headers={"Host": host})
        assert answer.status_code == 403, host
        assert "localhost and to numeric addresses" in answer.json()["error"]["message"]
    other = client_with(api_key="secret-key")
    headers = {"Host": "models.example", "X-Api-Key": "secret-key"}
    assert other.post("/v1/embeddings", json={"input": "one"}, headers=headers).status_code == 200


def test_request_that_is_too_large(client_with):
    client = client_with(most_bytes=2000)
    known = client.post("/v1/embeddings", json={"input": "x" * 3000})

    def chunks() -> Any:
        yield b'{"input": "'
        for _ in range(30):
            yield b"x" * 100
        yield b'"}'

    headers = {"content-type": "application/json"}
    unknown = client.post("/v1/embeddings", content=chunks(), headers=headers)
    for answer in (known, unknown):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert answer.headers["connection"] == "close"
    assert client.post("/v1/embeddings", json={"input": "one"}).status_code == 200
    assert client.app.state.server.memory.held == 0


def test_bodies_of_all_requests_are_limited_together(client_with):
    client = client_with(held_bytes=2000, most_bytes=1500)
    memory = client.app.state.server.memory
    memory.take(1000, 1000)
    answer = client.post("/v1/embeddings", json={"input": "x" * 1000})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert memory.held == 1000
    memory.give(1000)
    assert client.post("/v1/embeddings", json={"input": ["three"] * 120}).status_code == 200
    assert memory.held == 0


def test_memory_in_which_the_largest_request_has_no_room_is_refused():
    """It would be told to ask again, for ever."""
    assert ServeOptions(most_bytes=1500, held_bytes=2000)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ServeOptions(most_bytes=1501, held_bytes=2000)
    assert str(error.value) == (
        "held_bytes is 2,000, in three quarters of which a request of most_bytes, 1,501, would never have room: at "
        "least 2,002 are needed."
    )


def test_large_bodies_leave_room_for_small_ones():
    memory = BodyMemory(8 * MIB)
    memory.take(6 * MIB, 6 * MIB)
    with pytest.raises(RequestError, match="holds too many requests"):
        memory.take(1, MIB + 1)
    memory.take(MIB, MIB)
    assert memory.held == 7 * MIB


def test_body_that_is_compressed_is_refused(client):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = client.post("/v1/embeddings", content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415
    assert "The body has Content-Encoding 'gzip', but is not decompressed here" in answer.json()["error"]["message"]
    headers["content-encoding"] = "identity"
    assert client.post("/v1/embeddings", content=b'{"input": "one"}', headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/v1/embeddings/", "//v1/embeddings", "/v1//embeddings", "/embeddings//"])
def test_slashes_of_a_base_url_do_no_harm(client_with, path: str):
    client = client_with(api_key="secret-key")
    assert client.post(path, json={"input": "one"}).status_code == 401
    answer = client.post(path, json={"input": "one"}, headers={"X-Api-Key": "secret-key"}, follow_redirects=False)
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 1
    assert client.get("/health/").json()["status"] == "ok"
    assert 'route="/health",status="200"' in client.get("/metrics/", headers={"X-Api-Key": "secret-key"}).text


@pytest.mark.parametrize("path", ["/health", "/ping", "/v1/models", "/metrics", "/", "/docs"])
def test_paths_that_are_read_answer_to_head(client, path: str):
    answer = client.head(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == client.get(path).headers["content-type"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "message"),
    [
        ("GET", "/v1/embeddings", 405, "method_not_allowed", "This path takes the method POST; see /docs."),
        ("OPTIONS", "/v1/embeddings", 405, "method_not_allowed", "This path takes the method POST; see /docs."),
        ("POST", "/health", 405, "method_not_allowed", "This path takes the method GET; see /docs."),
        ("POST", "/v1", 404, "not_found", "There is no such path; see /docs."),
        ("POST", "/v1/embeddings/x", 404, "not_found", "There is no such path; see /docs."),
    ],
)
def test_other_paths_and_methods(client, method: str, path: str, status: int, code: str, message: str):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"] == {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": code,
    }


def test_app_within_another_app(served):
    outer = FastAPI()
    outer.mount("/clip", build_app(served, ServeOptions(api_key="secret-key")))
    with TestClient(outer) as client:
        headers = {"X-Api-Key": "secret-key"}
        for path in ("/clip/v1/embeddings", "/clip//v1/embeddings/"):
            answer = client.post(path, json={"input": "one"}, headers=headers)
            assert len(answer.json()["data"]) == 1
        assert client.get("/clip/health").status_code == 200
        assert client.get("/clip/v1/models").status_code == 401
        assert "API key" in client.post("/clip/predict").json()["detail"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that claims to have so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "status", "message"),
    [
        ((60_000, 60_000), 413, "too many pixels: at most 64,000,000 are allowed"),
        ((10_000, 9_500), 413, "too many pixels"),
        ((2_000_000, 1), 400, "one side may be at most 100 times as long as the other"),
        ((400, 400), 400, "damaged or cut off"),
    ],
)
def test_images_that_would_take_memory(client, size: tuple[int, int], status: int, message: str):
    import base64

    uri = f"data:image/png;base64,{base64.b64encode(bomb(*size)).decode()}"
    answer = client.post("/v1/embeddings", json={"input": uri})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["ICO", "PPM", "EPS", "ICNS", "PSD"])
def test_formats_that_strangers_need_not_send(client, kind: str):
    image = Image.new("RGB", (64, 64), "red")
    content = as_file(image, kind) if kind not in ("PSD",) else b"8BPS" + bytes(60)
    answer = client.post(
        "/predict", files={"entries": (None, '{"clip":{"visual":{"modelName":"m"}}}'), "image": content}
    )
    assert answer.status_code == 400
    assert "no image in a known format" in answer.json()["detail"]


def test_queue_that_is_full(client_with, images):
    client = client_with(most_waiting_texts=2, most_waiting_images=1)
    for body in ({"input": ["a", "b", "c"]}, {"input": [as_uri(image) for image in images]}):
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert client.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200


def test_fault_of_ours_tells_and_logs_nothing_of_the_request(client_with, served, monkeypatch, caplog):
    client = client_with()

    def fail(rows: Any) -> Any:
        raise RuntimeError("my secret text of /home/someone")

    monkeypatch.setitem(client.app.state.server.encoder.batcher._encode, "text", fail)
    with caplog.at_level(logging.DEBUG):
        answer = client.post("/v1/embeddings", json={"input": "my secret text"})
    assert answer.status_code == 500
    assert answer.json() == {
        "error": {
            "message": "The server failed at this request.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        },
        "detail": "The server failed at this request.",
    }
    [line] = [record.getMessage() for record in caplog.records if record.name == "hf_clip.serve"]
    assert line.startswith("RuntimeError at test_access.py:")
    assert "secret" not in line
    monkeypatch.undo()
    assert client.post("/v1/embeddings", json={"input": "one"}).status_code == 200


def test_request_that_the_process_cancels_is_told_so_and_is_cancelled():
    """Whoever cancels may wait for it, as a program around the app does, or asyncio's own timeouts."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def slowly(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def end(app: Any) -> bool:
        scope = {"type": "http", "path": "/v1/embeddings", "headers": []}
        working = asyncio.ensure_future(app(scope, None, send))
        await asyncio.sleep(0)
        working.cancel()
        await asyncio.wait({working})
        return working.cancelled()

    guard = AccessGuard(slowly, None, ServerMetrics())
    assert asyncio.run(end(guard))
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "ending"
    assert not asyncio.run(end(quiet_when_cancelled(guard)))  # uvicorn's own log has nothing to say


def test_figures(client_with, images):
    client = client_with()
    client.post("/v1/embeddings", json={"input": ["a", "b", as_uri(images[0])]})
    client.post("/v1/embeddings", json={"input": 3})
    client.get("/any/path/at/all?with=words")
    text = client.get("/metrics").text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["hf_clip_items_total", "text"] == 2
    assert found["hf_clip_items_total", "image"] == 1
    assert found["hf_clip_requests_total", "/v1/embeddings", "200"] == 1
    assert found["hf_clip_requests_total", "/v1/embeddings", "400"] == 1
    assert found["hf_clip_requests_total", "other", "404"] == 1
    assert found["hf_clip_waiting", "text"] == found["hf_clip_waiting", "image"] == 0
    assert "words" not in text


def test_schema_is_whole(client):
    schema = client.get("/openapi.json").json()
    assert {"/v1/embeddings", "/v1/classify", "/predict", "/v1/models"} <= schema["paths"].keys()
    body = schema["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "input", "messages", "dimensions"} <= body["properties"].keys()
    assert "$ref" not in json.dumps(body)
