"""Each fault in each dialect: one JSON error in the form that its clients read, and the server goes on."""

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import as_file, as_uri

DIALECTS = ("openai", "infinity", "jina", "vllm", "immich")
KEY = "secret-key"
MOST_BYTES = 20_000


def body_of(dialect: str, *, texts: list[str] | None = None, image: str | None = None) -> dict[str, Any]:
    """A request's JSON: texts, or one image."""
    if dialect == "vllm":
        parts: list[Any] = [{"type": "text", "text": text} for text in texts or []]
        parts += [] if image is None else [{"type": "image_url", "image_url": {"url": image}}]
        return {"messages": [{"role": "user", "content": parts}]}
    if dialect == "jina":
        return {"input": [{"text": text} for text in texts or []] if image is None else [{"image": image}]}
    return {"input": texts if image is None else [image], "modality": "text" if image is None else "image"}


def post(client: Any, dialect: str, body: Any = None, headers: dict[str, str] | None = None, **form: Any) -> Any:
    """Send JSON, or for Immich a form with `entries` and an image or a text."""
    headers = {"Authorization": f"Bearer {KEY}"} if headers is None else headers
    if dialect != "immich":
        path = "/embeddings" if dialect == "infinity" else "/v1/embeddings"
        if isinstance(body, bytes):
            return client.post(path, content=body, headers={"content-type": "application/json"} | headers)
        return client.post(path, json=body, headers=headers)
    kind = "visual" if "image" in form else "textual"
    entries = form.pop("entries", json.dumps({"clip": {kind: {"modelName": "m"}}}))
    files = [("entries", (None, entries))]
    for name, value in form.items():
        files += [(name, ("blob", part) if name == "image" else (None, part)) for part in value]
    return client.post("/predict", files=files, headers=headers)


def texts_to(client: Any, dialect: str, texts: list[str], headers: dict[str, str] | None = None) -> Any:
    return post(client, dialect, body_of(dialect, texts=texts), headers, text=texts)


def check(answer: Any, dialect: str, status: int, message: str, code: str | None) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["detail"].startswith(message), body
    if dialect == "immich":
        assert body.keys() == {"detail"}
        return
    assert body.keys() == {"error", "detail"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] == body["detail"]
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    assert (error["type"], error["code"]) == (kind, code)


@pytest.fixture
def server(client_with: Any) -> Any:
    return client_with(api_key=KEY, most_bytes=MOST_BYTES, most_items=4, most_waiting_texts=2)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_wrong_key(server, dialect: str):
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = texts_to(server, dialect, ["one"], headers)
        check(answer, dialect, 401, "The API key is missing or wrong: send it as", "invalid_api_key")
    assert texts_to(server, dialect, ["one"]).status_code == 200


@pytest.mark.parametrize("dialect", DIALECTS)
def test_wrong_content_type(server, dialect: str):
    path = {"immich": "/predict", "infinity": "/embeddings"}.get(dialect, "/v1/embeddings")
    wanted = "multipart/form-data" if dialect == "immich" else "application/json"
    headers = {"Authorization": f"Bearer {KEY}", "content-type": "text/plain"}
    answer = server.post(path, content=b"{}", headers=headers)
    message = f"The header Content-Type is 'text/plain', but {wanted} is needed."
    check(answer, dialect, 415, message, "unsupported_media_type")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_no_json(server, dialect: str):
    if dialect == "immich":
        answer = post(server, dialect, entries="{", text=["one"])
        check(answer, dialect, 422, "Invalid request format: entries must be {task: {kind: {modelName}}}.", None)
        return
    content = json.dumps(body_of(dialect, texts=["one"])).encode()
    check(post(server, dialect, content[:-1]), dialect, 400, "The body is no JSON (", "invalid_json")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_empty_input(server, dialect: str):
    message = {
        "immich": "text is empty: send a text.",
        "vllm": "messages is empty: send a text or an image.",
    }.get(dialect, "input[0] is empty: send a text.")
    check(texts_to(server, dialect, [" "]), dialect, 400, message, "empty_input")
    message = {
        "immich": "Either image or text must be provided",
        "vllm": "messages is empty: send a text or an image.",
    }.get(dialect, "input is empty: send at least one text or image.")
    check(texts_to(server, dialect, []), dialect, 400, message, "empty_input")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_too_many_items(server, dialect: str, images):
    uri, file = as_uri(images[0]), as_file(images[0])
    if dialect == "vllm":
        body = {"messages": body_of(dialect, image=uri)["messages"] * 2}
        check(post(server, dialect, body), dialect, 400, "messages holds 2 images, but a request has", "invalid_value")
    elif dialect == "immich":
        answer = post(server, dialect, image=[file, file])
        check(answer, dialect, 400, "The form cannot be read (Too many files. Maximum number of files is 1.)", None)
    else:
        message = "input has 5 items, but at most 4 are allowed: send several requests."
        check(texts_to(server, dialect, ["one"] * 5), dialect, 413, message, "too_many_items")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_too_large(server, dialect: str):
    answer = texts_to(server, dialect, ["x" * MOST_BYTES])
    check(answer, dialect, 413, "The request is larger than 0.0190735 MiB: send fewer", "request_too_large")
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_no_image(server, dialect: str, images):
    names = {"vllm": "the image of messages", "immich": "image"}
    for content, message in (
        (b"nothing of the kind, whatever is said", "is no image in a known format (JPEG, PNG"),
        (as_file(images[0])[:-60], "is an image that is damaged or cut off."),
    ):
        uri = "data:image/png;base64," + base64.b64encode(content).decode()
        answer = post(server, dialect, body_of(dialect, image=uri), image=[content])
        check(answer, dialect, 400, f"{names.get(dialect, 'input[0]')} {message}", "invalid_image")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_address_while_addresses_are_off(server, dialect: str):
    if dialect == "immich":  # an image is a file there, and its bytes are no address
        answer = post(server, dialect, image=[b"http://127.0.0.1/a.png"])
        check(answer, dialect, 400, "image is no image in a known format", None)
        return
    answer = post(server, dialect, body_of(dialect, image="http://127.0.0.1/a.png"))
    name = "the image of messages" if dialect == "vllm" else "input[0]"
    message = f"{name} is an address, and this server fetches none: send the image itself as a data URI."
    check(answer, dialect, 400, message, "urls_not_allowed")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_text_that_is_too_long(server, dialect: str):
    answer = texts_to(server, dialect, ["three " * 99])
    if dialect == "immich":  # whose own service cuts it
        assert answer.status_code == 200
        return
    name = "the text of messages" if dialect == "vllm" else "input[0]"
    check(answer, dialect, 400, f"{name} has 101 tokens, start and end", "context_length_exceeded")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_queue_that_is_full(client_with, dialect: str):
    server = client_with(api_key=KEY, most_waiting_texts=0)
    answer = texts_to(server, dialect, ["one"])
    check(answer, dialect, 429, "Too many texts are waiting; ask again in 1 s.", "rate_limit_exceeded")
    assert answer.headers["retry-after"] == "1"


HOSTILE: dict[str, tuple[Any, int]] = {
    "key twice": (lambda text: text[:-1] + ', "input": "two"}', 200),
    "byte order mark": (lambda text: b"\xef\xbb\xbf" + text.encode(), 400),
    "utf-16": (lambda text: text.encode("utf-16"), 400),
    "utf-16 without mark": (lambda text: text.encode("utf-16-le"), 400),
    "utf-32": (lambda text: text.encode("utf-32"), 400),
    "latin-1": (lambda text: text.replace("one", "\xe9").encode("latin-1"), 400),
    "surrogate": (lambda text: text.replace("one", "\\ud800"), 400),
    "half a pair": (lambda text: text.replace("one", "\\udc00\\ud800"), 400),
    "surrogate in bytes": (lambda text: text.replace("one", "\ud800").encode("utf-8", "surrogatepass"), 400),
    "null": (lambda text: text.replace("one", "a\\u0000b"), 200),
    "raw null": (lambda text: text.replace("one", "a\0b"), 400),
    "nan": (lambda text: text[:-1] + ', "dimensions": NaN}', 400),
    "infinity": (lambda text: text[:-1] + ', "dimensions": -Infinity}', 400),
    "large exponent": (lambda text: text[:-1] + ', "dimensions": 1e99999}', 400),
    "large integer": (lambda text: text[:-1] + ', "dimensions": ' + "9" * 300 + "}", 400),
    "huge integer": (lambda text: text[:-1] + ', "dimensions": ' + "9" * 10_000 + "}", 400),
    "nested": (lambda text: text.replace('"one"', "[" * 5000 + "]" * 5000), 413),
    "nested objects": (lambda text: text.replace('"one"', '{"a":' * 3000 + "1" + "}" * 3000), 413),
    "nested beside": (lambda text: text[:-1] + ', "other": ' + "[" * 900 + "]" * 900 + "}", 400),
    "nothing": (lambda text: "", 400),
    "two values": (lambda text: text + text, 400),
}


@pytest.mark.parametrize("dialect", ["openai", "jina", "vllm"])
@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_json(client_with, dialect: str, fault: str):
    client = client_with(api_key=KEY, most_items=4)
    make, status = HOSTILE[fault]
    content = make(json.dumps(body_of(dialect, texts=["one"])))
    answer = post(client, dialect, content if isinstance(content, bytes) else content.encode())
    if fault == "key twice" and dialect == "vllm":
        status = 400  # input and messages
    assert answer.status_code == status, answer.text
    if status >= 400:
        error = answer.json()["error"]
        assert answer.json()["detail"] == error["message"]
        assert len(error["message"]) < 300


@pytest.mark.parametrize("fault", [name for name in HOSTILE if name not in ("key twice", "nan", "infinity", "null")])
def test_hostile_entries_of_immich(client_with, fault: str):
    client = client_with(api_key=KEY)
    text = json.dumps({"clip": {"textual": {"modelName": "one"}}, "x": 1})
    content = HOSTILE[fault][0](text)
    answer = post(client, "immich", entries=content if isinstance(content, bytes) else content.encode(), text=["one"])
    assert answer.status_code in (400, 413, 422), answer.text
    assert answer.json().keys() == {"detail"}


def test_packages_that_the_server_imports_are_named_in_its_extra():
    """Or come with one that is: the names of modules, and of the packages that bring them."""
    root = Path(__file__).resolve().parents[2]
    said = (root / "pyproject.toml").read_text()
    [always] = re.findall(r"^dependencies = \[$(.*?)^\]$", said, re.MULTILINE | re.DOTALL)
    [extra] = re.findall(r"^serve = \[(.*)\]$", said, re.MULTILINE)
    named = {name.replace("_", "-") for name in re.findall(r'"([\w-]+)[>=<]', always + extra)}
    brings = {"PIL": "pillow", "pydantic_core": "pydantic", "starlette": "fastapi", "h11": "uvicorn"}
    imported = {
        found
        for file in (root / "hf_clip" / "serve").glob("*.py")
        for found in re.findall(r"^ *(?:from|import) (\w+)", file.read_text(), re.MULTILINE)
    }
    others = imported - set(sys.stdlib_module_names)
    assert {brings.get(name, name.replace("_", "-")) for name in others} <= named
    assert {"fastapi", "pydantic", "uvicorn"} <= others
