"""Clients of others against a server on a port: OpenAI's in Python and JavaScript, infinity's, and Immich's requests.

`HF_CLIP_OPENAI_JS` names a folder with node_modules that hold the package `openai`.
"""

import asyncio
import base64
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from hf_clip.serve.batching import QueueFullError
from hf_clip.serve.encoder import Encoder
from hf_clip.serve.serve_options import ServeOptions
from hf_clip.serve.web_app import build_app
from hf_clip.zero_shot.features import encode_images, encode_texts

from ..waiting import LONGEST_WAIT
from .conftest import NAME, as_file, as_uri

HERE = Path(__file__).parent
TEXTS = ["three", "a photo of a green eight on purple paper"]


@contextmanager
def running(app: Any) -> Iterator[str]:
    """An app on a free port, in a thread of this process."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address(served: Any) -> Iterator[str]:
    with running(build_app(served, ServeOptions(most_bytes=100_000))) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


def rows_of(answer: Any) -> np.ndarray:
    return np.array([row.embedding for row in answer.data])


def assert_near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_openai_in_python_reads_both_forms_of_numbers_and_fewer_of_them(client, plain_model, images):
    expected = np.asarray(encode_texts(*plain_model, TEXTS))
    for form in ("float", "base64"):
        answer = client.embeddings.create(model=NAME, input=TEXTS, encoding_format=form)
        sent = answer.data[0].embedding
        assert isinstance(sent, list if form == "float" else str)
        if form == "float":
            assert_near(rows_of(answer), expected)
    assert_near(rows_of(client.embeddings.create(model=NAME, input=TEXTS)), expected)  # base64, which it decodes
    few = rows_of(client.embeddings.create(model=NAME, input=TEXTS, dimensions=8))
    assert_near(few, expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True))
    shown = client.embeddings.create(model=NAME, input=[as_uri(image) for image in images])
    assert_near(rows_of(shown), encode_images(*plain_model, images))


def test_openai_without_waiting_asks_many_at_once(address: str, plain_model, images):
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            inputs = [*TEXTS, *map(as_uri, images)] * 4
            return await asyncio.gather(*(client.embeddings.create(model=NAME, input=one) for one in inputs))

    expected = np.concatenate([encode_texts(*plain_model, TEXTS), encode_images(*plain_model, images)] * 4)
    assert_near(np.concatenate([rows_of(answer) for answer in asyncio.run(ask())]), expected)


@pytest.mark.parametrize(
    ("request_body", "error", "message"),
    [
        ({"model": "gpt", "input": "x"}, openai.NotFoundError, "The model 'gpt' is not served here"),
        ({"model": NAME, "input": "three " * 100}, openai.BadRequestError, "input"),
        ({"model": NAME, "input": "x", "dimensions": 99}, openai.BadRequestError, "a number from 1 to 32"),
        ({"model": NAME, "input": "x" * 200_000}, openai.APIStatusError, "MiB"),
        ({"model": NAME, "input": "data:image/png;base64,AAAA"}, openai.BadRequestError, "no image"),
    ],
    ids=["model", "long", "dimensions", "large", "image"],
)
def test_openai_raises_its_own_errors(client, request_body: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message) as caught:
        client.embeddings.create(**request_body)
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.status_code == (413 if message == "MiB" else 404 if error is openai.NotFoundError else 400)


@pytest.fixture
def full_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the first so many requests find the queue full."""

    def make(times: int) -> None:
        encode, left = Encoder.encode, [times]

        async def encode_or_refuse(self: Encoder, *words: Any, **named: Any) -> Any:
            if left[0] == 0:
                return await encode(self, *words, **named)
            left[0] -= 1
            with monkeypatch.context() as patched:
                patched.setattr(self.batcher, "open", refuse)
                return await encode(self, *words, **named)

        def refuse(kind: str, count: int) -> None:
            raise QueueFullError(kind, 1)

        monkeypatch.setattr(Encoder, "encode", encode_or_refuse)

    return make


def test_openai_asks_again_when_retry_after_says(
    client, address: str, full_once, plain_model, monkeypatch: pytest.MonkeyPatch
):
    full_once(1)
    with pytest.raises(openai.RateLimitError, match="Too many texts are waiting; ask again in 1 s") as caught:
        client.embeddings.create(model=NAME, input=TEXTS)
    assert caught.value.response.headers["Retry-After"] == "1"
    assert caught.value.code == "rate_limit_exceeded"
    full_once(1)
    seen: list[float] = []
    hooks = {"response": [lambda response: seen.append(response.status_code)]}
    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(time=time.time, sleep=seen.append))
    with openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", http_client=httpx.Client(event_hooks=hooks)
    ) as patient:
        answer = patient.embeddings.create(model=NAME, input=TEXTS)
    assert_near(rows_of(answer), encode_texts(*plain_model, TEXTS))
    assert seen == [429, 1.0, 200]  # a second between; its own first wait would be half of it at most


def test_client_of_infinity(address: str, plain_model, images):
    infinity = pytest.importorskip("infinity_client", reason="infinity_client is not installed")
    from infinity_client.api.default import embeddings, health, models
    from infinity_client.models import OpenAIEmbeddingInputImage, OpenAIEmbeddingInputText

    with infinity.Client(base_url=address, raise_on_unexpected_status=True) as client:
        texts = embeddings.sync(client=client, body=OpenAIEmbeddingInputText(input_=TEXTS, model=NAME))
        assert_near(rows_of(texts), encode_texts(*plain_model, TEXTS))
        uris = [as_uri(image) for image in images]
        shown = embeddings.sync(client=client, body=OpenAIEmbeddingInputImage(input_=uris, model=NAME))
        assert_near(rows_of(shown), encode_images(*plain_model, images))
        assert shown.usage.total_tokens >= 0
        assert [entry.id for entry in models.sync(client=client).data] == [NAME, "digits-alias"]
        assert health.sync(client=client)["unix"] > 0
        with pytest.raises(infinity.errors.UnexpectedStatus, match="400"):
            embeddings.sync(client=client, body=OpenAIEmbeddingInputText(input_=[], model=NAME))


def test_requests_of_infinitys_client_as_recorded(address: str, plain_model, images):
    """Of infinity_client 0.0.78, and of its class for images, which asks for the width first."""
    text = (
        b'{"input": ["three"], "model": "clip-digits", "encoding_format": "float", "dimensions": 0, "modality": "text"}'
    )
    sent = json.dumps({"model": NAME, "input": [as_uri(images[0])], "encoding_format": "base64", "modality": "image"})
    headers = {"Content-Type": "application/json"}
    first, second = (
        httpx.post(f"{address}/embeddings", content=body, headers=headers, timeout=LONGEST_WAIT)
        for body in (text, sent)
    )
    assert_near([row["embedding"] for row in first.json()["data"]], encode_texts(*plain_model, ["three"]))
    [row] = second.json()["data"]
    found = np.frombuffer(base64.b64decode(row["embedding"]), dtype=np.float32)
    assert_near(found[None], encode_images(*plain_model, images[:1]))
    assert second.json()["usage"]["total_tokens"] >= 0


def recorded(entries: str, name: str, head: str, content: bytes, boundary: str) -> bytes:
    """The body that Node 20 sends for Immich's form, byte for byte."""
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="entries"\r\n\r\n{entries}\r\n'
    part += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{head}\r\n\r\n'
    return part.encode() + content + f"\r\n--{boundary}--\r\n".encode()


def test_requests_of_immich_as_recorded(address: str, plain_model, images):
    boundary = "----formdata-undici-050531994062"
    headers = {
        "Content-Type": f"multipart/form-data; boundary={boundary}",
        "Accept": "*/*",
        "Accept-Language": "*",
        "Sec-Fetch-Mode": "cors",
        "User-Agent": "node",
        "Accept-Encoding": "gzip, deflate",
    }
    file = as_file(images[0], "JPEG")
    visual = recorded(
        '{"clip":{"visual":{"modelName":"ViT-B-32__mine"}}}',
        "image",
        '; filename="blob"\r\nContent-Type: application/octet-stream',
        file,
        boundary,
    )
    answer = httpx.post(f"{address}/predict", content=visual, headers=headers, timeout=LONGEST_WAIT).json()
    assert (answer["imageWidth"], answer["imageHeight"]) == images[0].size
    assert_near([json.loads(answer["clip"])], encode_images(*plain_model, [file]))
    entries = '{"clip":{"textual":{"modelName":"ViT-B-32__mine","options":{"language":"de-DE"}}}}'
    textual = recorded(entries, "text", "", "grüne Acht\r\nzwei".encode(), boundary)
    answer = httpx.post(f"{address}/predict", content=textual, headers=headers, timeout=LONGEST_WAIT).json()
    assert answer.keys() == {"clip"}
    assert_near([json.loads(answer["clip"])], encode_texts(*plain_model, ["grüne Acht\r\nzwei"]))


def node(script: str, folder: Path, *words: str, question: Any) -> Any:
    """What a script answers."""
    shutil.copy(HERE / script, folder)
    done = subprocess.run(
        ["node", script, *words],
        cwd=folder,
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=LONGEST_WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.rpartition("ANSWER")[2])


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")


@needs_node
def test_immichs_form_from_node(address: str, plain_model, images, tmp_path: Path):
    """Its fetch and its FormData, called as Immich's server calls them."""
    image = tmp_path / "image.png"
    image.write_bytes(as_file(images[0]))
    model = {"modelName": "ViT-B-32__mine"}
    payloads = [
        {"entries": {"clip": {"visual": model}}, "image": str(image)},
        {"entries": {"clip": {"textual": model | {"options": {"language": "de-DE"}}}}, "text": "three"},
        {"entries": {"ocr": {"detection": model, "recognition": model}}, "image": str(image)},
    ]
    found = node("immich_server.mjs", tmp_path, address, question=payloads)
    assert found["ping"] == [True, "pong"]
    visual, textual, refused = found["answers"]
    assert_near([json.loads(visual["body"]["clip"])], encode_images(*plain_model, images[:1]))
    assert_near([json.loads(textual["body"]["clip"])], encode_texts(*plain_model, ["three"]))
    assert not refused["ok"]
    assert re.search("does the task clip of Immich, and not ocr", refused["body"]["detail"])


@needs_node
def test_openai_in_javascript(address: str, plain_model, images, tmp_path: Path):
    installed = os.environ.get("HF_CLIP_OPENAI_JS")
    if not installed:
        pytest.skip("HF_CLIP_OPENAI_JS names no folder with node_modules/openai")
    (tmp_path / "node_modules").symlink_to(Path(installed).resolve() / "node_modules")
    question = {"texts": TEXTS, "images": [as_uri(image) for image in images]}
    found = node("openai_client.mjs", tmp_path, address, NAME, question=question)
    expected = np.asarray(encode_texts(*plain_model, TEXTS))
    for form in ("texts", "floats"):
        assert_near(found[form], expected)
    assert_near(found["images"], encode_images(*plain_model, images))
    assert np.array(found["few"]).shape == (2, 16)
    assert found["models"] == [NAME, "digits-alias"]
    assert found["unknown"] == ["NotFoundError", 404, "model_not_found", "model"]
    assert found["empty"] == ["BadRequestError", 400, "empty_input", "input"]
