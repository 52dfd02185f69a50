"""`/v1/embeddings` in the forms of OpenAI, infinity, Jina and vLLM: features are those of direct calls."""

import base64
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.nn.functional import normalize

from hf_clip.zero_shot.features import encode_images, encode_texts

from ..waiting import LONGEST_WAIT
from .conftest import NAME, as_file, as_uri

TEXTS = ["the digit three in red on blue paper", "one", "a photo of a green eight on purple paper, large and bright"]


def rows_of(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]], dtype=np.float32)


def close(found: Any, expected: Any) -> bool:
    return np.allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=1e-6)


@pytest.fixture(scope="session")
def text_features(plain_model):
    return encode_texts(*plain_model, TEXTS).numpy()


@pytest.fixture(scope="session")
def image_features(plain_model, images):
    return encode_images(*plain_model, images).numpy()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
def test_texts(client, text_features, path: str):
    answer = client.post(path, json={"model": NAME, "input": TEXTS})
    assert close(rows_of(answer), text_features)
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", NAME)
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2]
    assert {entry["object"] for entry in body["data"]} == {"embedding"}
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 10


def test_one_text(client, text_features):
    assert close(rows_of(client.post("/v1/embeddings", json={"model": NAME, "input": TEXTS[0]})), text_features[:1])


def test_many_texts_keep_their_order(client, plain_model):
    texts = [" ".join(["three"] * (1 + place * 7 % 13)) + f" {place}" for place in range(150)]
    found = rows_of(client.post("/v1/embeddings", json={"input": texts}))
    assert close(found, encode_texts(*plain_model, texts))


def test_base64_is_little_endian_float32(client, text_features):
    body = client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()
    found = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in body["data"]]
    assert close(found, text_features)


def test_dimensions_are_the_first_numbers_normalised(client, text_features, plain_model):
    found = rows_of(client.post("/v1/embeddings", json={"input": TEXTS, "dimensions": 8}))
    import torch

    assert close(found, normalize(torch.from_numpy(text_features[:, :8]), dim=-1))
    whole = client.post("/v1/embeddings", json={"input": TEXTS, "dimensions": 0})
    assert close(rows_of(whole), text_features)


def test_token_ids(client, plain_model, text_features):
    ids = plain_model[1].tokenizer(TEXTS)["input_ids"]
    assert close(rows_of(client.post("/v1/embeddings", json={"input": ids})), text_features)
    assert close(rows_of(client.post("/v1/embeddings", json={"input": ids[0]})), text_features[:1])


def test_images_as_data_uris(client, images, image_features):
    uris = [as_uri(image) for image in images]
    assert close(rows_of(client.post("/v1/embeddings", json={"input": uris})), image_features)
    assert close(rows_of(client.post("/v1/embeddings", json={"input": uris[0]})), image_features[:1])


def test_images_as_base64(client, images, image_features):
    encoded = [base64.b64encode(as_file(image)).decode() for image in images]
    found = client.post("/embeddings", json={"input": encoded, "modality": "image"})
    assert close(rows_of(found), image_features)


def test_data_uri_is_a_text_where_texts_are_sent(client, images):
    answer = client.post("/v1/embeddings", json={"input": "data:image/x", "modality": "text"})
    assert answer.json()["usage"]["prompt_tokens"] > 2


def test_items_of_jina(client, images, text_features, image_features):
    items = [{"text": TEXTS[0]}, {"image": as_uri(images[1])}, TEXTS[2]]
    body = {"model": NAME, "input": items, "embedding_type": "float", "normalized": True, "task": "retrieval.query"}
    found = rows_of(client.post("/v1/embeddings", json=body))
    assert close(found, [text_features[0], image_features[1], text_features[2]])


def test_messages_of_vllm(client, images, text_features, image_features):
    parts = [{"type": "image_url", "image_url": {"url": as_uri(images[0])}}, {"type": "text", "text": ""}]
    body = {"model": NAME, "messages": [{"role": "user", "content": parts}], "encoding_format": "float"}
    assert close(rows_of(client.post("/v1/embeddings", json=body)), image_features[:1])
    for content in (TEXTS[1], [{"type": "text", "text": TEXTS[1]}]):
        found = client.post("/v1/embeddings", json={"messages": [{"role": "user", "content": content}]})
        assert close(rows_of(found), text_features[1:2])


def test_long_text_is_cut_where_that_is_asked_for(client, plain_model):
    text = " ".join(["three"] * 100)
    expected = encode_texts(*plain_model, [text], truncation=True)
    for asked in ({"truncate": True}, {"truncate_prompt_tokens": -1}):
        assert close(rows_of(client.post("/v1/embeddings", json={"input": text} | asked)), expected)


def test_models(client):
    for path in ("/v1/models", "/models"):
        body = client.get(path).json()
        assert [entry["id"] for entry in body["data"]] == [NAME, "digits-alias"]
        assert {entry["object"] for entry in body["data"]} == {"model"}
        for entry in body["data"]:
            assert client.get(f"{path}/{entry['id']}").json() == entry
        missing = client.get(f"{path}/org/other")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert client.post("/v1/embeddings", json={"model": "digits-alias", "input": "one"}).json()["model"] == NAME


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "gpt-4", "input": "x"}, 404, "model", "The model 'gpt-4' is not served here: ask for 'clip-digits'"),
        ({"input": []}, 400, "input", "input is empty"),
        ({"input": ""}, 400, "input", "input is empty"),
        ({"input": ["a", " "]}, 400, "input", "input[1] is empty"),
        ({}, 400, "input", "input is missing"),
        ({"input": 3}, 400, "input", "input cannot be used"),
        ({"input": [{"text": "a", "image": "b"}]}, 400, "input", 'input[0] must hold one of "text" and "image"'),
        ({"input": [{}]}, 400, "input", 'input[0] must hold one of "text" and "image"'),
        ({"input": "a", "dimensions": 99}, 400, "dimensions", "dimensions is 99, but embeddings of this model have 32"),
        ({"input": "a", "dimensions": -1}, 400, "dimensions", "a number from 1 to 32 is needed"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "Input should be 'float' or 'base64'"),
        ({"input": "a", "modality": "audio"}, 400, "modality", "Input should be 'text', 'image' or 'auto'"),
        ({"input": "a", "normalized": False}, 400, "normalized", "have length one"),
        ({"input": [[9906, 1917]]}, 400, "input", "check_embedding_ctx_length=False"),
        ({"input": "three " * 99}, 400, "input", "input has 101 tokens, start and end included, but"),
        ({"input": ["http://x/y.png"], "modality": "image"}, 400, "input", "input[0] is an address, and this server"),
        ({"input": "data:image/png;base64,!!!"}, 400, "input", "input is no image: send a data URI"),
        ({"input": "data:image/png;base64,AAAA"}, 400, "input", "input is no image in a known format (JPEG, PNG"),
        ({"input": "/etc/passwd", "modality": "image"}, 400, "input", "input is no image"),
        ({"input": "file:///etc/passwd", "modality": "image"}, 400, "input", "input is no image"),
        ({"messages": []}, 400, "messages", "messages is empty"),
        ({"input": "a", "messages": []}, 400, "messages", "send one of them"),
        ({"input": ["a"] * 2049}, 413, "input", "input has 2,049 items, but at most 2,048 are allowed"),
        ({"input": ["data:image/png;base64,A"] * 65}, 413, "input", "input has 65 images, but at most 64 are allowed"),
        ({"input": ["a b " * 300_000]}, 413, "input", "The texts have 1,200,000 letters together, but"),
        ({"input": ["a", "three " * 99]}, 400, "input", "input[1] has"),
        ({"input": "a", "truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens", "only -1 is known"),
    ],
)  # fmt: skip
def test_errors_have_openais_form(client, body: dict, status: int, param: str, message: str):
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"]


def test_text_and_image_have_no_embedding_together(client, images):
    parts = [{"type": "image_url", "image_url": as_uri(images[0])}, {"type": "text", "text": "what is this?"}]
    answer = client.post("/v1/embeddings", json={"messages": [{"content": parts}]})
    assert answer.status_code == 400
    assert "texts and an image" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "The body is no JSON"),
        (b"[" * 3000, "application/json", 400, "The body is no JSON"),
        (b'{"input": "\\ud800"}', "application/json", 400, "The body is no JSON"),
        (b"\xff", "application/json", 400, "The body is no JSON"),
        (b"[]", "application/json", 400, "the body cannot be used"),
        (b'{"input": "a"}', "text/plain", 415, "The header Content-Type is 'text/plain', but application/json"),
        (b'{"input": "a"}', None, 415, "The header Content-Type is missing"),
    ],
    ids=["cut", "deep", "surrogate", "no-utf8", "list", "text", "no-type"],
)
def test_what_is_no_json(client, content: bytes, kind: str | None, status: int, message: str):
    answer = client.post("/v1/embeddings", content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(message)


def test_unknown_paths_and_methods(client):
    for answer, status in ((client.get("/nothing"), 404), (client.get("/v1/embeddings"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F", "RGBX", "LAB"])
def test_images_of_every_mode_have_the_features_of_a_direct_call(client, plain_model, images, mode: str):
    image = images[0].convert("L").convert(mode) if mode in ("I", "F", "I;16") else images[0].convert("RGB")
    image = image if image.mode == mode else image.convert(mode) if mode != "LAB" else Image.new("LAB", (40, 30), 99)
    content = as_file(image, "TIFF")
    body = {"input": base64.b64encode(content).decode(), "modality": "image"}
    answer = client.post("/v1/embeddings", json=body)
    assert close(rows_of(answer), encode_images(*plain_model, content))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify"])
def test_bad_image_is_told_before_the_texts_are_computed(client_with, monkeypatch: pytest.MonkeyPatch, path: str):
    client = client_with()
    batcher = client.app.state.server.encoder.batcher
    encode, may_go_on, batches = batcher._encode["text"], threading.Event(), []

    def slowly(rows: Any) -> Any:
        batches.append(len(rows))
        assert may_go_on.wait(LONGEST_WAIT)
        return encode(rows)

    monkeypatch.setitem(batcher._encode, "text", slowly)
    texts, image = [f"text {number}" for number in range(200)], "data:image/png;base64,AAAA"
    bodies = {
        "/v1/embeddings": {"input": [*({"text": text} for text in texts), {"image": image}]},
        "/v1/classify": {"images": [image], "labels": texts},
    }
    try:
        answer = client.post(path, json=bodies[path])
    finally:
        may_go_on.set()
    assert answer.status_code == 400
    assert "no image in a known format" in answer.json()["error"]["message"]
    assert client.post("/v1/embeddings", json={"input": "one"}).status_code == 200
    assert sum(batches) < 200
