"""Immich's machine-learning service: requests as Immich's server sends them, and answers as it reads them."""

import json
from typing import Any

import numpy as np
import pytest

from hf_clip.serve.immich_predict import check_width
from hf_clip.serve.request_error import RequestError
from hf_clip.zero_shot.features import encode_images, encode_texts

from .conftest import as_file

VISUAL = {"clip": {"visual": {"modelName": "ViT-B-32__openai-of-mine"}}}
TEXTUAL = {"clip": {"textual": {"modelName": "my-model", "options": {"language": "en"}}}}
FACES = {"facial-recognition": {"detection": {"modelName": "buffalo_l", "options": {"minScore": 0.7}}}}
FACES["facial-recognition"]["recognition"] = {"modelName": "buffalo_l"}


def predict(client: Any, entries: Any, text: str | None = None, image: bytes | None = None) -> Any:
    """A form as Immich builds it: every field is a part, and an image is a file named "blob"."""
    form = {} if entries is None else {"entries": entries if isinstance(entries, str) else json.dumps(entries)}
    form |= {} if text is None else {"text": text}
    files: Any = {name: (None, value) for name, value in form.items()}
    if image is not None:
        files["image"] = ("blob", image, "application/octet-stream")
    return client.post("/predict", files=files)


def test_ping(client):
    answer = client.get("/ping")
    assert (answer.status_code, answer.text) == (200, "pong")


def test_image(client, plain_model, images):
    body = predict(client, VISUAL, image=as_file(images[0], "JPEG")).json()
    assert body.keys() == {"clip", "imageHeight", "imageWidth"}
    assert (body["imageWidth"], body["imageHeight"]) == images[0].size
    assert isinstance(body["clip"], str)
    assert body["clip"].startswith("[")
    assert " " not in body["clip"]
    expected = encode_images(*plain_model, as_file(images[0], "JPEG"))[0]
    assert np.allclose(json.loads(body["clip"]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["three", "a long description of a digit in red " * 9], ids=["short", "long"])
def test_text(client, plain_model, text: str):
    body = predict(client, TEXTUAL, text=text).json()
    assert body.keys() == {"clip"}
    expected = encode_texts(*plain_model, [text], truncation=True)[0]
    assert np.allclose(json.loads(body["clip"]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "text", "image", "status", "message"),
    [
        (None, "x", None, 422, "The field entries is missing"),
        ("{", "x", None, 422, "Invalid request format"),
        ("[]", "x", None, 422, "Invalid request format"),
        ({"clip": {"textual": {}}}, "x", None, 422, "Invalid request format"),
        ({"clip": {}}, "x", None, 422, "Invalid request format"),
        ({"clip": VISUAL["clip"] | TEXTUAL["clip"]}, "x", None, 422, "must ask for one of"),
        (TEXTUAL, None, None, 400, "Either image or text must be provided"),
        (TEXTUAL, None, b"x", 400, "clip.textual needs the field text"),
        (VISUAL, "x", None, 400, "clip.visual needs the field image"),
        (VISUAL, None, b"no image", 400, "image is no image in a known format"),
        (TEXTUAL, " ", None, 400, "text is empty"),
        (FACES, None, b"x", 400, "This server does the task clip of Immich, and not facial-recognition"),
        ({"ocr": {"detection": {"modelName": "m"}}}, None, b"x", 400, "and not ocr"),
        ({"clip": {"textual": {"modelName": "ViT-L-14__openai"}}}, "x", None, 400, "choose a model with 32 in Immich"),
    ],
    ids=range(14),
)
def test_errors_have_immichs_form(client, entries, text, image, status: int, message: str):
    answer = predict(client, entries, text, image)
    assert answer.status_code == status
    assert answer.json().keys() == {"detail"}
    assert message in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "application/json", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=y", 400),
    ],
    ids=["json", "no-boundary", "no-parts"],
)
def test_what_is_no_form(client, content: bytes, kind: str, status: int):
    answer = client.post("/predict", content=content, headers={"content-type": kind})
    assert answer.status_code in (status, 422)
    assert answer.json().keys() == {"detail"}


def test_form_that_is_cut_off(client, images):
    """Not as one that lacks its last field."""
    part = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="blob"\r\n\r\n%s\r\n'
    form = part % (b"entries", json.dumps(VISUAL).encode()) + part % (b"image", as_file(images[0]))
    form = form.replace(b'"entries"; filename="blob"', b'"entries"')
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/predict", content=form + b"--b--\r\nwhat follows", headers=headers).status_code == 200
    for end in (len(form), len(form) - 20, 90, 3):
        answer = client.post("/predict", content=form[:end], headers=headers)
        assert answer.status_code == 400
        assert answer.json() == {"detail": "The form is cut off: it does not end with its boundary."}


def test_immichs_names_of_openais_models_tell_the_width():
    check_width("ViT-L-14-336__openai", 768)
    check_width("ViT-B-32__laion2b_e16", 768)  # not one of ours to know
    with pytest.raises(RequestError, match="ViT-L-14-336__openai, whose embeddings have 768 numbers, but .* have 512"):
        check_width("ViT-L-14-336__openai", 512)
