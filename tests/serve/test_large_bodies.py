"""Large bodies and answers: what is too much is refused before it is made, and the event loop turns meanwhile."""

import asyncio
import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from pydantic_core import to_json

from hf_clip.serve import json_values, web_app
from hf_clip.serve.embedding_request import EmbeddingRequest
from hf_clip.serve.json_values import check_values, read_json
from hf_clip.serve.request_error import RequestError
from hf_clip.serve.serve_options import ServeOptions
from hf_clip.serve.web_app import parsed, rows_as_json


def turns_during(work: Any) -> tuple[int, Any]:
    """How often the event loop turned while something was awaited, and its result."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def both() -> Any:
        counting = asyncio.ensure_future(count())
        found = await work
        counting.cancel()
        return found

    found = asyncio.run(both())
    return turns, found


def signs_by_hand(content: bytes) -> tuple[int, int]:
    """Commas and brackets outside of texts, letter by letter."""
    commas = lists = place = 0
    in_text = False
    while place < len(content):
        sign = content[place : place + 1]
        if in_text and sign == b"\\":
            place += 1
        elif sign == b'"':
            in_text = not in_text
        elif not in_text:
            commas += sign == b","
            lists += sign in b"[{"
        place += 1
    return commas, lists


@pytest.mark.parametrize("seed", range(40))
def test_values_are_those_outside_of_texts(monkeypatch: pytest.MonkeyPatch, seed: int):
    monkeypatch.setattr(json_values, "STEP", 7)
    chance = random.Random(seed)
    content = bytes(chance.choices(b'",[{\\a', k=chance.randrange(1, 300)))
    commas, lists = signs_by_hand(content)
    most = max(commas + lists, content.count(b'"') // 4 + 1, content.count(b"\\") // 4 + 1)
    check_values(content, most, lists)
    if commas + lists == most:
        with pytest.raises(RequestError, match="more than"):
            check_values(content, most - 1, lists)
    if lists:
        with pytest.raises(RequestError, match=f"more than {lists - 1:,} lists and objects"):
            check_values(content, most, lists - 1)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"input": [{"text": "a"}] * 100_000}, "9,192 lists and objects"),
        ({"input": [[1]] * 100_000}, "9,192 lists and objects"),
        ({"input": "a", "extra": [{}] * 10_000}, "9,192 lists and objects"),
        ({"input": [1] * 300_000}, "205,800 values"),
        ({"input": ["a,b"] * 300_000}, "205,800 values"),
    ],
    ids=["objects", "lists", "unknown", "ids", "texts"],
)
def test_too_much_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch, body: dict, what: str):
    monkeypatch.setattr(json_values, "from_json", lambda content: pytest.fail("was parsed"))
    with pytest.raises(RequestError, match=f"The body has more than {what}: send several requests.") as caught:
        asyncio.run(parsed(EmbeddingRequest, json.dumps(body).encode(), ServeOptions()))
    assert caught.value.status == 413


def test_items_are_counted_before_they_are_made(client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_clip.serve.embedding_request._item", lambda *_: pytest.fail("was made"))
    answer = client.post("/v1/embeddings", json={"input": ["a"] * 100_000})
    assert answer.status_code == 413
    assert "input has 100,000 items, but at most 2,048 are allowed" in answer.json()["error"]["message"]


def test_event_loop_turns_while_a_large_body_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_values, "STEP", 10_000)
    content = json.dumps({"input": ["a"] * 20_000 + ["[,{" * 90_000]}).encode()
    turns, found = turns_during(read_json(content, 30_000, 10))
    assert found == json.loads(content)
    counted, skipped = len(content) // 10_000, 20_001 // json_values.STRINGS
    assert turns >= counted + skipped


@pytest.mark.parametrize("count", [3, 200])
def test_event_loop_turns_while_a_large_answer_is_written(count: int):
    rows = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    data = [{"index": index, "embedding": row} for index, row in enumerate(rows)]
    lists = [entry | {"embedding": entry["embedding"].tolist()} for entry in data]
    content = {"object": "list", "data": data, "model": 'a "data":[] b', "usage": {"total_tokens": 3}}
    turns, answer = turns_during(rows_as_json(content))
    assert answer.body == to_json(content | {"data": lists})
    assert turns >= count // web_app.ROWS


def test_event_loop_turns_while_a_large_form_is_read(monkeypatch: pytest.MonkeyPatch):
    from starlette.requests import Request

    from hf_clip.serve import request_body

    monkeypatch.setattr(request_body, "FORM_PART", 1000)
    image = random.Random(0).randbytes(50_000)
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    form = head + image + b"\r\n--b--\r\n"
    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    request = Request({"type": "http", "method": "POST", "headers": headers})
    turns, found = turns_during(request_body.read_form(request, form))
    assert found == {"image": image}
    assert turns >= 50


def test_freed_memory_is_returned_after_requests_and_only_then(client_with: Any, monkeypatch: pytest.MonkeyPatch):
    threads: list[str] = []
    monkeypatch.setattr(web_app, "KEPT_SECONDS", 0.02)
    monkeypatch.setattr(web_app, "return_freed_memory", lambda: threads.append(threading.current_thread().name))
    client = client_with()
    time.sleep(0.1)
    assert not threads
    for count in (1, 2):
        assert client.post("/v1/embeddings", content=b"[").status_code == 415  # a bad request frees memory too
        until = time.monotonic() + 10
        while len(threads) < count and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(threads) == count
    assert all(name.startswith("hf_clip images") for name in threads)  # the event loop goes on meanwhile
