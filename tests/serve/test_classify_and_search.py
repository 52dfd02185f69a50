"""`/v1/classify` and `/v1/search`: the results of direct calls, and nothing that strangers should not see."""

import asyncio
import base64
import json
import shutil
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from hf_clip import HfClipModel, ZeroShotClassifier
from hf_clip.serve.search_request import SearchRequest, condition_of
from tests.search.conftest import make_image

from ..waiting import LONGEST_WAIT
from .conftest import NAME, as_uri

LABELS = ["three", "eight", "one"]


@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        (LABELS, {}),
        (LABELS, {"templates": ["a photo of a {}.", "{} in red"], "scores": "cosine"}),
        ({"three": ["three", "the digit three"], "eight": "eight"}, {"background": ["paper"]}),
        (LABELS, {"templates": "cifar_18"}),
    ],
)
def test_labels_are_those_of_a_direct_call(client, plain_model, images, labels: Any, settings: dict):
    body = {"model": NAME, "images": [as_uri(image) for image in images], "labels": labels, "top_k": 2} | settings
    expected = ZeroShotClassifier(*plain_model, labels, progress=False, **settings).classify(images, top_k=2)
    for _ in range(2):  # the second time the labels are not encoded again
        found = client.post("/v1/classify", json=body).json()
        for entry, direct in zip(found["data"], expected, strict=True):
            assert [one["label"] for one in entry["labels"]] == [one["label"] for one in direct]
            scores = [one["score"] for one in entry["labels"]]
            assert scores == pytest.approx([one["score"] for one in direct], abs=1e-5)


def test_threshold_leaves_labels_out(client, images):
    body = {"images": as_uri(images[0]), "labels": LABELS}
    scores = [entry["score"] for entry in client.post("/v1/classify", json=body).json()["data"][0]["labels"]]
    kept = client.post("/v1/classify", json=body | {"threshold": scores[1]}).json()["data"][0]["labels"]
    assert [entry["score"] for entry in kept] == scores[:2]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"labels": []}, 400, "There are no labels"),
        ({"labels": ["a", "a"]}, 400, "The label 'a' appears twice"),
        ({"background": ["one"]}, 400, "'one' is both a label and a background label"),
        ({"templates": "/etc/passwd"}, 400, "A template must hold {}"),
        ({"templates": "{:>1000000000}{}"}, 400, "A template must hold {}"),
        ({"templates": "{0.__class__} {}"}, 400, "A template must hold {}"),
        ({"templates": ["imagenet_7"]}, 400, "A template must hold {}"),
        ({"templates": []}, 400, "There are no templates"),
        ({"labels": [str(n) for n in range(40)], "templates": "imagenet_80"}, 413, "make 3,200 prompts, but at most"),
        ({"labels": ["three " * 30]}, 400, "a label in its template has"),
        ({"images": []}, 400, "input is empty"),
        ({"images": ["no image"]}, 400, "images[0] is no image"),
        ({"top_k": 0}, 400, "top_k cannot be used"),
        ({"scores": "logits"}, 400, "scores cannot be used"),
        ({"model": "other"}, 404, "is not served here"),
    ],
)
def test_classify_refuses(client, images, change: dict, status: int, message: str):
    answer = client.post("/v1/classify", json={"images": as_uri(images[0]), "labels": LABELS} | change)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, plain_model: Any) -> Any:
    pytest.importorskip("lancedb")
    from hf_clip.search.image_index import ImageIndex

    folder = tmp_path_factory.mktemp("secret-folder")
    for seed in range(5):
        make_image(seed, (60 + 10 * seed, 40)).save(folder / f"image-{seed}.png")
    found = ImageIndex.open(folder.parent / "search-index", model=plain_model[0], processor=plain_model[1])
    found.add(folder)
    return found


def test_search_by_text_is_that_of_the_index(client_with, index):
    client = client_with(index=index)
    for query in ("three", "the digit eight in red on blue paper"):
        answer = client.post("/v1/search", json={"query": query, "top": 3})
        found = answer.json()["results"]
        expected = index.search(query, top=3)
        assert [entry["id"] for entry in found] == [result.id for result in expected]
        assert [entry["score"] for entry in found] == pytest.approx([r.score for r in expected], abs=1e-5)
        assert [entry["name"] for entry in found] == [Path(result.path).name for result in expected]
        assert "secret-folder" not in answer.text
        assert "/" not in "".join(entry["name"] for entry in found)


def test_index_that_is_removed_and_made_anew(client_with, plain_model, served, tmp_path: Path, caplog):
    """Of as many images, by as many writes: only the folder tells the two apart."""
    pytest.importorskip("lancedb")
    from hf_clip.search.image_index import ImageIndex

    def made(seed: int, model: Any, processor: Any) -> Any:
        (tmp_path / str(seed)).mkdir()
        make_image(seed).save(tmp_path / str(seed) / f"image-{seed}.png")
        found = ImageIndex.open(tmp_path / "index", model=model, processor=processor)
        found.add(tmp_path / str(seed))
        return found

    def search() -> Any:
        return client.post("/v1/search", json={"query": "three"})

    client = client_with(index=made(1, *plain_model))
    assert search().json()["results"][0]["name"] == "image-1.png"
    shutil.rmtree(tmp_path / "index")
    answer = search()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "index_unavailable")
    assert str(tmp_path) not in answer.text
    assert f"The index {tmp_path / 'index'} cannot be read" in caplog.text
    expected = made(2, *plain_model).search("three")
    [found] = search().json()["results"]
    assert found["name"] == "image-2.png"
    assert found["score"] == pytest.approx(expected[0].score, abs=1e-5)
    shutil.rmtree(tmp_path / "index")
    other = HfClipModel(plain_model[0].config).eval()
    made(3, other, plain_model[1])
    assert search().status_code == 503
    assert client.post("/v1/embeddings", json={"input": "three"}).status_code == 200


def test_search_compares_in_the_thread_that_encodes(client_with, served, index, monkeypatch: pytest.MonkeyPatch):
    """What else is computed takes no team of threads."""
    from hf_clip.search import exact_scan, image_index

    seen: list[tuple[str, threading.Thread, int]] = []

    def watch(kind: Any, name: str) -> None:
        run = getattr(kind, name)

        def watched(*given: Any, **named: Any) -> Any:
            seen.append((name, threading.current_thread(), torch.get_num_threads()))
            return run(*given, **named)

        monkeypatch.setattr(kind, name, watched)

    watch(exact_scan.EmbeddingMatrix, "similarities")
    watch(image_index.ImageIndex, "search")
    assert client_with(index=index).post("/v1/search", json={"query": "one"}).status_code == 200
    (_, searching, alone), (_, comparing, _) = seen
    assert [name for name, _, _ in seen] == ["search", "similarities"]
    assert comparing is served.computing.run(threading.current_thread)
    assert searching not in (comparing, threading.main_thread())
    assert alone == 1


def test_search_by_image_and_more(client_with, index):
    client = client_with(index=index)
    body = {"image": as_uri(make_image(2, (80, 40))), "thumbnails": True, "top": 1}
    [first] = client.post("/v1/search", json=body).json()["results"]
    assert (first["name"], first["score"]) == ("image-2.png", pytest.approx(1, abs=1e-3))
    assert Image.open(BytesIO(base64.b64decode(first["thumbnail"]))).format == "JPEG"
    more = client.post("/v1/search", json={"more_like": first["id"], "minus": ["three"]}).json()["results"]
    assert more[0]["id"] == first["id"]
    wide = client.post("/v1/search", json={"query": "one", "filter": {"width": {"gte": 80, "lt": 100}}}).json()
    assert sorted(entry["width"] for entry in wide["results"]) == [80, 90]
    none = client.post("/v1/search", json={"query": "one", "filter": {"caption": {"contains": "it's"}}})
    assert none.json()["results"] == []


def test_filter_takes_every_integer_of_64_bits(client_with, index):
    """Although widths have 32 bits in the index."""
    client = client_with(index=index)
    for column in ("width", "height", "size"):
        for value, is_low in ((2**31, False), (2**63 - 1, False), (-(2**31) - 1, True), (-(2**63), True)):
            for sign, holds in (("gt", is_low), ("lte", not is_low), ("eq", False)):
                answer = client.post("/v1/search", json={"query": "one", "filter": {column: {sign: value}}})
                assert answer.status_code == 200, (column, sign, value)
                assert bool(answer.json()["results"]) == holds


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "There is nothing to look for"),
        ({"minus": "x"}, 400, "There is nothing to look for"),
        ({"query": "x", "minus": "x", "templates": False}, 400, ""),
        ({"query": ""}, 400, "query is empty"),
        ({"query": "x", "top": 0}, 400, "top cannot be used"),
        ({"query": "x", "top": 201}, 400, "top cannot be used"),
        ({"more_like": 77}, 404, "no image with an id of more_like"),
        ({"query": ["x"] * 17}, 413, "more than 16 parts"),
        ({"query": "x", "filter": "path LIKE '%'"}, 400, "filter cannot be used"),
        ({"query": "x", "filter": {"path": {"contains": "secret"}}}, 400, "filter.path"),
        ({"query": "x", "filter": {"width": {"contains": "1"}}}, 400, "filter.width takes eq, gt, gte, lt, lte, with"),
        ({"query": "x", "filter": {"caption": {"gte": 1}}}, 400, "filter.caption takes eq and contains, with texts"),
        ({"query": "x", "where": "1=1"}, 400, "where cannot be used"),
    ],
    ids=range(13),
)
def test_search_refuses(client_with, index, body: dict, status: int, message: str):
    answer = client_with(index=index).post("/v1/search", json=body)
    if body.get("minus") == "x" and body.get("query"):  # half of the weight is left
        assert answer.status_code == 200
        return
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_filter_cannot_leave_its_quotation_marks():
    filter = json.loads("""{"caption": {"eq": "x' OR path LIKE '%a"}, "width": {"gt": 3}}""")
    assert condition_of(SearchRequest(query="x", filter=filter).filter) == (
        "caption = 'x'' OR path LIKE ''%a' AND CAST(width AS BIGINT) > 3"
    )
    with pytest.raises(ValidationError):
        SearchRequest(query="x", filter={"width": {"gt": "3 OR 1=1"}})


def test_server_without_an_index_says_so(client):
    answer = client.post("/v1/search", json={"query": "one"})
    assert answer.status_code == 404
    assert "--index" in answer.json()["error"]["message"]


def test_search_whose_client_is_gone(client_with, index, monkeypatch: pytest.MonkeyPatch):
    """One that runs comes to its end unheard, one that waits is not begun, and the server goes on."""
    client = client_with(index=index)
    search = client.app.state.server.search
    begun, may_end, queries = threading.Event(), threading.Event(), []
    run = search._search

    def slowly(*given: Any) -> Any:
        queries.append(given[-1].query)
        begun.set()
        assert may_end.wait(LONGEST_WAIT)
        return run(*given)

    monkeypatch.setattr(search, "_search", slowly)
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]

    async def leave(query: str, when: threading.Event) -> int:
        """Ask, and close the connection. Returns the status that is counted."""
        messages = [{"type": "http.request", "body": json.dumps({"query": query}).encode()}]
        sent: list[Any] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while not when.is_set():
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": headers, "query_string": b""}
        await client.app(scope, receive, send)
        return sent[0]["status"]

    async def both() -> list[int]:
        return await asyncio.gather(leave("three", begun), leave("eight", begun))

    assert asyncio.run(both()) == [499, 499]
    may_end.set()
    found = client.post("/v1/search", json={"query": "one", "top": 1})
    assert found.status_code == 200
    assert len(queries) == 2
    assert queries[1] == "one"
