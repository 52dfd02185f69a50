"""The page at /docs: made of the routes, right in its commands, and whole without any other server."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hf_clip.serve.docs_page import EXAMPLES, address_in, make_page, type_in_words
from hf_clip.serve.request_schema import described
from hf_clip.serve.search_request import SearchRequest
from hf_clip.serve.serve_options import ServeOptions
from hf_clip.serve.web_app import build_app

from ..waiting import LONGEST_WAIT
from .conftest import NAME, as_file
from .test_clients import running

KEY = "secret-key"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(served: Any) -> Iterator[str]:
    """A server that needs a key."""
    with running(build_app(served, ServeOptions(api_key=KEY))) as found:
        yield found


def commands_of(page: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(r'<pre class="command">(.*?)</pre>', page, flags=re.DOTALL)]


def test_page_has_every_path_and_every_field(client):
    schema, page = client.get("/openapi.json").json(), client.get("/docs").text
    assert schema["paths"].keys() >= {"/v1/embeddings", "/embeddings", "/v1/classify", "/predict", "/metrics"}
    assert "/v1/search" not in schema["paths"]  # without an index
    for path, methods in schema["paths"].items():
        assert re.search(rf"<h2><code>{'|'.join(methods).upper()} ([^<]*, )?{path}[,<]", page), path
        for content in methods.get("post", {}).get("requestBody", {}).get("content", {}).values():
            for name, field in content["schema"]["properties"].items():
                assert f"<td><code>{name}</code></td>" in page
                assert html.escape(field["description"].replace("`", "")) in page  # of the docstring's Attributes
    assert f"hf_clip serves <code>{NAME}</code>, <code>digits-alias</code>" in page
    assert "have 32 numbers" in page
    assert "key" not in page.partition("<h2>")[0]


def test_fields_of_a_search_are_told_in_words():
    schema = described(SearchRequest)["requestBody"]["content"]["application/json"]["schema"]
    fields = {name: type_in_words(field) for name, field in schema["properties"].items()}
    assert (fields["query"], fields["more_like"]) == (
        "text or list of texts",
        "whole number or list of whole numbers",
    )
    assert (fields["top"], fields["templates"], fields["filter"]) == ("whole number", "true or false", "object")
    assert "a small JPEG" in schema["properties"]["thumbnails"]["description"]
    page = make_page({"paths": {"/v1/search": {"post": described(SearchRequest)}}}, "http://x", ["a"], 1, False)
    [command] = commands_of(page)
    SearchRequest.model_validate_json(re.search(r"-d '(.*)'", command)[1])  # type: ignore[index]


def test_commands_work_as_they_are_copied(address: str, images, tmp_path: Path):
    (tmp_path / "cats.jpg").write_bytes(as_file(images[0], "JPEG"))
    page = httpx.get(f"{address}/docs", timeout=LONGEST_WAIT).text
    commands = commands_of(page)
    assert len(commands) == sum(len(found) for path, found in EXAMPLES.items() if path != "/v1/search")
    assert all(address in command for command in commands)
    script = "\n".join(f"{command}; echo; echo END" for command in commands)
    done = subprocess.run(
        ["bash", "-c", script.replace("curl ", "curl -sS ")],
        cwd=tmp_path,
        env={"HF_CLIP_API_KEY": KEY, "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    texts, image, labels, immich, models, metrics, health, _ = done.stdout.split("\nEND\n")
    assert [len(row["embedding"]) for row in json.loads(texts)["data"]] == [32, 32]
    assert len(json.loads(image)["data"]) == 1
    assert {entry["label"] for entry in json.loads(labels)["data"][0]["labels"]} == {"a cat", "a dog"}
    assert len(json.loads(json.loads(immich)["clip"])) == 32
    assert json.loads(models)["data"][0]["id"] == NAME
    assert "hf_clip_requests_total" in metrics
    assert json.loads(health)["status"] == "ok"


def test_names_are_quoted_for_shell_and_page(served, client):
    names = ['it\'s <b>"mine"</b>']
    schema = client.get("/openapi.json").json()
    page = make_page(schema, "http://127.0.0.1:7997", names, 32, False)
    assert "<b>" not in page
    command = commands_of(page)[0].replace("curl http", "printf '%s' http")
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed[printed.index("{") :])["model"] == names[0]


@pytest.mark.parametrize("host", ["a;reboot", "$(reboot)", '"><script>', "", "a b", "[::1", "a/../b?c"])
def test_foreign_host_comes_into_no_command(host: str):
    assert address_in("http", host, "") == "http://localhost"


def test_address_is_the_one_that_was_asked():
    assert address_in("https", "clip.example:8443", "/api") == "https://clip.example:8443/api"
    assert address_in("http", "[::1]:7997", "") == "http://[::1]:7997"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_page_is_whole_in_a_browser_without_a_network(address: str):
    """No script, nothing of other servers, and the policy lets the page's own style through."""
    sync_api = pytest.importorskip("playwright.sync_api")
    switches = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    said: list[str] = []
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches, timeout=1000 * LONGEST_WAIT)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(1000 * LONGEST_WAIT)
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        answer = page.goto(f"{address}/docs")
        assert "script-src" not in answer.headers["content-security-policy"]
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
        assert page.get_by_role("heading", name="POST /v1/classify").is_visible()
        assert page.get_by_text("Least score of a label that is returned.").is_visible()
        assert page.locator("pre").first.evaluate("each => getComputedStyle(each).whiteSpace") == "pre-wrap"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # a phone scrolls down alone
        assert page.locator("script").count() == 0
        assert said == []  # what a policy blocks is said there
        page.get_by_role("link", name="OpenAPI").click()
        page.wait_for_url(f"{address}/openapi.json")  # of which a browser may miss an icon
        browser.close()
    assert [url for url in asked if not url.startswith(address)] == []
