"""Thousands of bad requests: each gets an error in its dialect's form, tells nothing, and costs no memory."""

import base64
import copy
import json
import random
import resource
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_clip.serve.untrusted_image import unquoted
from hf_clip.zero_shot.features import encode_texts

from .conftest import NAME, as_uri
from .test_access import bomb

KEY = "fuzz-secret-key-0451"
SEED = 26
FLAT_MIB = 40
"""How much more memory the second half of the requests may leave than the first: what the allocator keeps."""

DEEP = "[" * 3000 + "]" * 3000
TEXTS = [
    "", " ", "\0", "a\0b", "\ud800", "\ufffe\uffff", "\u202e", "é" * 3000, "x" * 50_000, "{}", "{}" * 1000,
    "{0.__class__}", "{0.__init__.__globals__}", "{:>1000000000}", "{", "}", "%s%n", "../../etc/passwd",
    "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "http://169.254.169.254/latest", "data:,", "data:image/",
    "data:image/png;base64,", "data:image/png;base64,%", "data:image/png;base64,!!!!", "data:image/svg+xml,<svg/>",
    "data:image/png," + "%89" * 500, "data:" + "x" * 300 + ",", "' OR 1=1 --", "'; DROP TABLE images; --", "\\'",
    "<script>", "\r\nX-Injected: 1", "nan", "true", "-1", "1e999", "<|endoftext|>" * 90, "\u200d" * 4000,
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), float("-inf"), [], {}, [[]], [{}], [None], {"": None}, [[[[]]]], {"a": {"b": {"c": []}}},
    [1, "a", None, {}], ["a"] * 3000, [0] * 300, [[0] * 300], [True], {"text": 1}, {"text": "a", "image": "b"},
    [{"text": None}], {"url": 3}, {"$ref": "#"}, {"__class__": "x"},
]  # fmt: skip
LITERALS = ["NaN", "-Infinity", "1" * 5000, "1e99999", "-", "tru", '"\\ud800"', '"\\u0000"', '"\\x"', DEEP, "'a'", ""]
TYPES = [
    "text/plain", "application/xml", "application/json; charset=utf-16", "application/json;charset=\xff", "",
    "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 5000,
    "application/x-www-form-urlencoded", "\xff", "application/json, text/plain", "multipart/form-data; boundary=b",
    "multipart/form-data; boundary=b; charset=utf-7", "multipart/form-data; boundary=b; charset=unicode_escape",
    "multipart/form-data; boundary=b; charset=idna", "multipart/form-data; boundary=b; charset=zlib",
]  # fmt: skip
PATHS = [
    "/v1/embeddings/", "//v1/embeddings", "/v1/../v1/embeddings", "/v1/%2e%2e/etc/passwd", "/%00", "/%ff%fe", "/v1",
    "/docs/oauth2-redirect", "/predict/", "/ping/x", "/metrics/", "/V1/EMBEDDINGS", "/static/../../etc/passwd",
    "/v1/models/" + "x" * 3000, "/?" + "q=%00&" * 500, "/v1/chat/completions", "/.git/config", "/rerank",
]  # fmt: skip
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "PPM", "TGA", "PCX"]
ENTRIES = {"clip": {"visual": {"modelName": "ViT-B-32__openai", "options": {"mode": "x"}}}}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Bytes of a file, cut off or changed in some places."""
    way = chance.randrange(4)
    if way == 0:
        return content[: chance.randrange(len(content))]
    if way == 1:
        return b""
    changed = bytearray(content + bytes(chance.randrange(50)) if way == 2 else content)
    for _ in range(chance.choice([1, 3, 30])):
        changed[chance.randrange(min(len(changed), chance.choice([30, 200, 10**6])))] = chance.randrange(256)
    return bytes(changed)


def places_of(body: Any, place: tuple = ()) -> list[tuple]:
    """Every place of a JSON value, its own first."""
    inner = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    return [place] + [found for key, value in inner for found in places_of(value, (*place, key))]


def replaced(body: Any, place: tuple, value: Any) -> Any:
    """A copy of a JSON value with another value in one place."""
    if not place:
        return value
    body = copy.deepcopy(body)
    inner = body
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return body


class BadRequests:
    """Makes bad requests: a good one, spoiled in one or several ways."""

    def __init__(self, image: Image.Image):
        self.chance = random.Random(SEED)
        uri = as_uri(image)
        files = []
        for kind in FORMATS:
            file = BytesIO()
            image.convert("P" if kind in ("GIF", "PCX") else "RGB").save(file, kind)
            files.append(file.getvalue())
        self.files = [*files, bomb(60_000, 60_000), bomb(400, 400), bomb(3_000_000, 1), bomb(0, 5)]
        part = {"type": "image_url", "image_url": {"url": uri, "detail": "auto"}}
        compared = {"eq": 1, "gt": 1, "gte": 1, "lt": 1, "lte": 1}
        self.bodies: list[tuple[str, Any]] = [
            ("/v1/embeddings", {"model": NAME, "input": ["one", uri], "encoding_format": "float", "dimensions": 8}),
            ("/embeddings", {"model": NAME, "input": "one", "modality": "auto", "truncate_prompt_tokens": -1}),
            ("/v1/embeddings", {"input": [{"text": "one"}, {"image": uri}], "normalized": True, "truncate": True}),
            ("/v1/embeddings", {"input": [uri[22:]], "modality": "image", "embedding_type": "base64"}),
            ("/v1/embeddings", {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, part]}]}),
            ("/v1/classify", {"images": [uri], "labels": {"a": ["b", "c"]}, "templates": ["a {}"], "background": ["d"],
                              "scores": "softmax", "top_k": 1, "threshold": 0.5}),
            ("/v1/classify", {"images": uri, "labels": ["a", "b"], "templates": "a {}"}),
            ("/v1/search", {"query": ["one"], "image": [uri], "minus": "two", "more_like": [1], "top": 3,
                            "filter": {"width": compared, "size": {"gt": 1}, "caption": {"contains": "a", "eq": "b"}},
                            "templates": True, "all_copies": False, "thumbnails": True}),
            ("/v1/search", {"query": "one", "filter": {"height": {"gte": 1}}}),
        ]  # fmt: skip

    def spoiled_text(self, body: Any) -> bytes:
        """JSON with one to three wrong values."""
        chance = self.chance
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            place = chance.choice(places_of(body))
            found = chance.random()
            value = chance.choice(TEXTS) if found < 0.4 else chance.choice(VALUES)
            if found > 0.85:
                uri = b"data:image/x;base64," + base64.b64encode(damaged(chance.choice(self.files), chance))
                value = uri.decode()
            body = replaced(body, place, value)
        text = json.dumps(body, ensure_ascii=chance.random() < 0.5)
        way = chance.random()
        if way < 0.15:
            text = json.dumps(replaced(body, chance.choice(places_of(body)), "@@")).replace(
                '"@@"', chance.choice(LITERALS)
            )
        if 0.25 < way < 0.28 and isinstance(body, dict):  # a key twice
            text = (
                text[:-1] + "," * bool(body) + json.dumps({chance.choice([*body, "input"]): chance.choice(TEXTS)})[1:]
            )
        encoding = chance.choice(["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "latin-1"]) if way > 0.97 else "utf-8"
        content = text.encode(encoding, "surrogatepass" if 0.9 < way <= 0.97 else "replace")
        return damaged(content, chance) if 0.15 < way < 0.25 and content else content

    def form(self) -> bytes:
        """A multipart form for Immich's dialect, with wrong, missing or repeated parts."""
        chance = self.chance
        names = chance.choices(
            ["entries", "image", "text", "", "x" * 2000, "\xff", '"', "a\r\nb: c"], k=chance.randrange(4)
        )
        names = [*chance.choice([["entries", "image"], ["entries"], ["entries"] * 2, [], ["image"] * 3]), *names]
        form = b""
        for name in names:
            head = f'Content-Disposition: form-data; name="{name}"'
            head += '; filename="../../x"' if name == "image" or chance.random() < 0.2 else ""
            head += chance.choice(["", "", "\r\nContent-Type: a/b; charset=utf-7", "\r\n" + "X: y\r\n" * 20 + "Z: 1"])
            if name == "image":
                value = chance.choice(self.files)
                value = damaged(value, chance) if chance.random() < 0.8 else value
            elif name == "entries" and chance.random() < 0.6:
                value = json.dumps(ENTRIES).encode()
            else:
                value = self.spoiled_text(ENTRIES)
            form += b"--b\r\n" + head.encode("latin-1", "replace") + b"\r\n\r\n" + value + b"\r\n"
        form += b"--b--\r\n"
        return damaged(form, chance) if chance.random() < 0.4 else form

    def make(self) -> dict[str, Any]:
        """The next request: method, url, headers, content."""
        chance = self.chance
        headers = [("authorization", f"Bearer {KEY}")]
        way, method = chance.random(), "POST"
        if way < 0.2:
            path, content = "/predict", self.form()
            kind: str = "multipart/form-data; boundary=b"
        else:
            path, body = chance.choice(self.bodies)
            content, kind = self.spoiled_text(body), "application/json"
        if way > 0.94:
            path = chance.choice(PATHS)
        elif way > 0.88:
            method = chance.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
        elif way > 0.82:
            kind = chance.choice(TYPES)
        elif way > 0.77:
            wrong = ["Bearer", "Bearer " + KEY[:-1], "Basic " + KEY, "Bearer\t" + KEY + "x", "\xff\xfe", "", KEY]
            headers = chance.choice([[], [("authorization", chance.choice(wrong))], [("x-api-key", "\xe9")]])
        headers.append(("content-type", kind))
        if chance.random() < 0.05:
            extra = [("content-type", "text/plain"), ("content-length", "9" * 30), ("content-encoding", "gzip")]
            extra += [("transfer-encoding", "chunked, chunked"), ("host", "evil.test"), ("content-length", "-1")]
            headers.insert(chance.randrange(len(headers) + 1), chance.choice(extra))
        sent: Any = content
        if chance.random() < 0.1:  # in chunks
            sent = iter([content[at : at + 997] for at in range(0, len(content), 997)] or [b""])
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        return {"method": method, "url": path, "headers": encoded, "content": sent}


def held_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def check_answer(answer: Any, path: str) -> None:
    """An error is JSON in its dialect's form, and no answer tells what nobody should know."""
    assert answer.status_code < 500
    text = answer.text
    for word in (KEY, "Traceback", "site-packages", str(Path.cwd()), str(Path.home()) + "/", ".py", "/tmp/"):
        assert word not in text
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        body = answer.json()
        if path.rstrip("/") in ("/predict", "/ping"):
            assert list(body) == ["detail"]
            assert isinstance(body["detail"], str)
        else:
            assert body["error"].keys() == {"message", "type", "param", "code"}
            assert isinstance(body["error"]["message"], str)
        assert len(text) < 4000


@pytest.fixture(scope="module")
def small_index(plain_model, images, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("lancedb")
    from hf_clip.search.image_index import ImageIndex

    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "photos").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "photos" / f"{number}.png")
    index = ImageIndex.open(folder / "index", model=plain_model[0], processor=plain_model[1])
    index.add(folder / "photos")
    return index


@pytest.mark.parametrize("count", [1500, pytest.param(5000, marks=pytest.mark.slow)])
def test_bad_requests(client_with, small_index, plain_model, images, count: int):
    client = client_with(index=small_index, api_key=KEY, most_bytes=300_000, most_pixels=500_000)
    client._transport.raise_server_exceptions = False
    requests, statuses, held = BadRequests(images[0]), [], []
    for number in range(count):
        request = requests.make()
        answer = client.request(**request, follow_redirects=False)
        try:
            check_answer(answer, request["url"])
        except AssertionError as error:
            raise AssertionError(f"request {number}: {str(request)[:3000]} → {answer.text[:1000]}") from error
        statuses.append(answer.status_code)
        if number + 1 in (count // 2, count):
            held.append(held_mib())
    assert {400, 401, 404, 405, 413, 415, 422} <= set(statuses)
    assert sum(status >= 400 for status in statuses) > 0.8 * count
    assert held[1] - held[0] < FLAT_MIB
    assert client.app.state.server.memory.held == 0
    for kind in ("text", "image"):
        assert client.app.state.server.encoder.batcher.waiting(kind) == 0
    good = client.post("/v1/embeddings", json={"input": "three"}, headers={"x-api-key": KEY}).json()
    expected = encode_texts(*plain_model, ["three"])[0]
    assert np.allclose(good["data"][0]["embedding"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/embeddings", b'{"input":[' + b"[]," * 300_000 + b"1]}", 413),
        ("/v1/embeddings", b'{"input":[' + b"{}," * 300_000 + b"1]}", 413),
        ("/v1/embeddings", b'{"input":[' + b'"",' * 600_000 + b"1]}", 413),
        ("/v1/embeddings", b'{"input":[' + b'"a",' * 190_000 + b"1]}", 400),
        ("/v1/embeddings", b'{"input":"' + b",[{" * 300_000 + b'"}', 400),
        ("/v1/search", b"{" + b",".join(b'"x%d":1' % n for n in range(20_000)) + b"}", 413),
        (
            "/v1/classify",
            json.dumps({"images": "", "labels": [*map(str, range(1500))], "templates": "{}" + "a" * 9000}).encode(),
            413,
        ),
    ],
    ids=["lists", "objects", "texts", "last", "signs in a text", "keys", "templates"],
)
def test_what_would_grow_in_memory_is_refused_before_it_does(client_with, small_index, path, content, status):
    client = client_with(index=small_index)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250 * 1024  # kilobytes


def test_length_that_is_given_in_two_ways_is_refused(client):
    headers = {"content-type": "application/json", "transfer-encoding": "chunked", "content-length": "2"}
    answer = client.post("/v1/embeddings", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_framing")


@pytest.mark.parametrize("key", ["", " ", "key "])
def test_key_that_no_client_could_send_is_refused(client_with, key: str):
    with pytest.raises(ValueError, match="The API key is empty, or has spaces at an end"):
        client_with(api_key=key)


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "idna", "zlib"])
def test_form_of_another_charset_is_refused(client, charset: str):
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    answer = client.post("/predict", content=b"--b--\r\n", headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (415, "The form has another charset than utf-8.")


def test_escapes_are_replaced_across_parts():
    content = random.Random(0).randbytes(50_000)
    text = "".join(f"%{byte:02x}" for byte in content)
    for shift in range(3):
        assert unquoted("a" * shift + text) == b"a" * shift + content
    assert unquoted("%%%4" * 40_000 + "%") == b"%%%4" * 40_000 + b"%"
