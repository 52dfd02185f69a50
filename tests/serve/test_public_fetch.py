"""Images by address: fetched from where that is allowed, and from nowhere else."""

import asyncio
import gzip
import ipaddress
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from hf_clip.serve import encoder, public_fetch
from hf_clip.serve.encoder import Encoder, ImageItem
from hf_clip.serve.public_fetch import MOST_ADDRESSES, PublicFetcher, in_turn, is_elsewhere, is_own, is_public
from hf_clip.serve.request_error import RequestError
from hf_clip.serve.serve_options import ServeOptions
from hf_clip.zero_shot.features import encode_images

from ..waiting import LONGEST_WAIT
from .conftest import as_file


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "::127.0.0.1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe", "::ffff:0:127.0.0.1", "::ffff:0:10.0.0.1", "64:ff9b:1::a00:1",
        "2001:470:1:1:0:5efe:7f00:1", "2001:470:1:1:200:5efe:a00:1", "fec0::1", "fd00:ec2::254", "3fff::1",
        "192.0.0.192", "192.88.99.1", "168.63.129.16", "::ffff:168.63.129.16", "2002:a83f:8110::",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str):
    assert not is_public(ipaddress.ip_address(address))


def test_addresses_of_this_machine():
    assert is_own(ipaddress.ip_address("127.0.0.1"))
    assert not is_own(ipaddress.ip_address("192.0.2.1"))
    assert not is_own(ipaddress.ip_address("2001:db8::1"))
    assert not is_elsewhere(ipaddress.ip_address("127.0.0.1"))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2002:808:808::", "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8"]
)
def test_addresses_that_are_public(address: str):
    assert is_public(ipaddress.ip_address(address))


class Site(ThreadingHTTPServer):
    """A site with an image, and with what a site should not do."""

    daemon_threads = True

    def __init__(self, image: bytes):
        self.image, self.hosts, self.over = image, [], threading.Event()
        super().__init__(("127.0.0.1", 0), Page)


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site: Any = self.server
        site.hosts.append(self.headers["Host"])
        port = site.server_port
        leads_to = {
            "/near": "/image.png",
            "/inside": f"http://inside.test:{port}/image.png",
            "/file": "file:///etc/passwd",
            "/port": "http://images.test:99999/",
            "/user": f"http://user:word@images.test:{port}/image.png",
            "/loop": "/loop",
        }
        if self.path in leads_to:
            self.send_response(302)
            self.send_header("Location", leads_to[self.path])
            self.end_headers()
        elif self.path == "/crumbs":
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1\r\na\r\n" * 400 + b"0\r\n\r\n")
        elif self.path == "/zipped":
            self.send_response(200)
            self.send_header("Content-Encoding", "identity")
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(gzip.compress(bytes(1000)))
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            site.over.wait(LONGEST_WAIT)
        else:
            self.send_response(200)
            self.end_headers()
            try:
                self.wfile.write(bytes(300_000) if self.path == "/large" else site.image)
            except ConnectionError:
                return

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def site(images) -> Iterator[Site]:
    found = Site(as_file(images[0]))
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()


ADDRESSES = {"images.test": ["127.0.0.1"], "inside.test": ["10.0.0.1"], "both.test": ["127.0.0.1", "10.0.0.1"]}


@pytest.fixture
def fetching_within(client_with):
    """Makes a client of a server for which 127.0.0.1 is the public internet, and which waits so long for an image."""

    async def resolve(host: str, port: int) -> list[Any]:
        if host not in ADDRESSES:
            raise OSError("no such name")
        return [ipaddress.ip_address(address) for address in ADDRESSES[host]]

    def make(seconds: float) -> Any:
        fetcher = PublicFetcher(seconds, 200_000, is_allowed=lambda a: str(a) == "127.0.0.1", resolve=resolve)
        return client_with(fetcher=fetcher, allow_urls=True)

    return make


@pytest.fixture
def fetching(fetching_within):
    """A client of a server that waits as long as any machine needs."""
    return fetching_within(LONGEST_WAIT)


@pytest.mark.parametrize("path", ["/image.png", "/near"])
def test_image_is_fetched_by_its_name(fetching, site, plain_model, images, path: str):
    url = f"http://images.test:{site.server_port}{path}"
    answer = fetching.post("/v1/embeddings", json={"input": [url], "modality": "image"})
    found = answer.json()["data"][0]["embedding"]
    assert np.allclose(found, encode_images(*plain_model, images[:1])[0], rtol=0, atol=1e-6)
    assert site.hosts[-1] == f"images.test:{site.server_port}"
    messages = [{"content": [{"type": "image_url", "image_url": {"url": url}}]}]
    assert fetching.post("/v1/embeddings", json={"messages": messages}).json()["data"][0]["embedding"] == found


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://inside.test/", "does not lead to the public internet"),
        ("http://both.test/", "does not lead to the public internet"),
        ("http://images.test:{port}/inside", "does not lead to the public internet"),
        ("http://images.test:{port}/file", "only http and https are fetched"),
        ("http://images.test:{port}/loop", "redirected more than 3 times"),
        ("http://images.test:{port}/missing", "the server answered 404"),
        ("http://images.test:{port}/large", "larger than 200,000 bytes"),
        ("http://user:word@images.test:{port}/image.png", "holds a user or a password"),
        ("http://nowhere.test/", "there is no such address, or it does not answer"),
        ("http://images.test:{port}/crumbs", "comes in too many parts"),
        ("http://images.test:{port}/zipped", "it is compressed, which was not asked for"),
        ("http://images.test:{port}/port", "there is no port 99999"),
        ("http://images.test:{port}/user", "holds a user or a password"),
        ("http://images.test:65536/", "there is no port 65536"),
        ("http://images.test:0/", "there is no port 0"),
        ("http://images.test:-1/", "there is no port -1"),
        ("http://images.test:80\\@inside.test/", "holds a user or a password"),
        ("http://127。0。0。1/", "there is no such address"),
        ("http://", "only http and https are fetched"),
        ("http://[::1/", "there is no such address"),
    ],
)
def test_what_is_not_fetched(fetching, site, monkeypatch: pytest.MonkeyPatch, url: str, message: str):
    monkeypatch.setattr(public_fetch, "MOST_PARTS", 300)
    body = {"input": [url.format(port=site.server_port)], "modality": "image"}
    answer = fetching.post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("input[0] cannot be fetched: ")
    assert message in answer.json()["error"]["message"]


def fetch_from(resolve: Any, port: int, is_allowed: Any = lambda address: address.is_loopback) -> bytes:
    fetcher = PublicFetcher(LONGEST_WAIT, 200_000, is_allowed=is_allowed, resolve=resolve)
    return asyncio.run(fetcher.fetch(f"http://images.test:{port}/image.png", "image"))


def test_addresses_of_a_name_are_tried_one_after_the_other(site):
    """As of a host with an IPv6 address, where this machine has no IPv6."""
    asked = []

    async def resolve(host: str, port: int) -> list[Any]:
        asked.append(host)
        return list(map(ipaddress.ip_address, ("127.0.0.7", "127.0.0.7", "127.0.0.1")))

    assert fetch_from(resolve, site.server_port) == site.image
    assert asked == ["images.test"]
    assert site.hosts[-1] == f"images.test:{site.server_port}"


def test_addresses_of_both_kinds_are_tried_in_turn():
    """CloudFront's names have eight of IPv6, and a machine without it would try no other."""
    addresses = list(map(ipaddress.ip_address, [*(f"2600::{place}" for place in range(8)), "192.0.2.2", "192.0.2.1"]))
    found = in_turn(addresses)
    assert list(map(str, found[:5])) == ["2600::", "192.0.2.2", "2600::1", "192.0.2.1", "2600::2"]
    assert sorted(map(str, found)) == sorted(map(str, addresses))
    assert in_turn(addresses[:8]) == addresses[:8]


def test_of_a_name_with_many_addresses_a_few_are_tried(site):
    async def resolve(host: str, port: int) -> list[Any]:
        unanswered = [f"127.0.0.{place}" for place in range(2, 2 + MOST_ADDRESSES)]
        return list(map(ipaddress.ip_address, [*unanswered, "127.0.0.1"]))

    with pytest.raises(RequestError, match="there is no such address, or it does not answer"):
        fetch_from(resolve, site.server_port)


@pytest.mark.parametrize("answers", [["127.0.0.7", "127.0.0.1"], ["127.0.0.7"]], ids=["together", "in turn"])
def test_name_that_is_public_and_then_private_leads_nowhere_private(site, answers: list[str]):
    """127.0.0.7 stands for a public address that does not answer, 127.0.0.1 for a private one that does."""
    asked = []

    async def resolve(host: str, port: int) -> list[Any]:
        asked.append(host)
        return list(map(ipaddress.ip_address, answers if len(asked) == 1 else ["127.0.0.1"]))

    before = len(site.hosts)
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch_from(resolve, site.server_port, is_allowed=lambda address: str(address) == "127.0.0.7")
    assert asked == ["images.test"]
    assert len(site.hosts) == before


def test_redirect_to_a_name_that_has_become_private_is_refused(site):
    asked = []

    async def resolve(host: str, port: int) -> list[Any]:
        asked.append(host)
        return [ipaddress.ip_address("127.0.0.1" if len(asked) == 1 else "10.0.0.1")]

    fetcher = PublicFetcher(LONGEST_WAIT, 200_000, is_allowed=lambda address: address.is_loopback, resolve=resolve)
    with pytest.raises(RequestError, match="does not lead to the public internet"):
        asyncio.run(fetcher.fetch(f"http://images.test:{site.server_port}/near", "image"))
    assert asked == ["images.test", "images.test"]


def test_image_that_does_not_come_is_not_waited_for(fetching_within, site):
    body = {"input": [f"http://images.test:{site.server_port}/slow"], "modality": "image"}
    answer = fetching_within(0.7).post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "input[0] cannot be fetched: it did not arrive within 0.7 s."


def test_machine_itself_is_not_fetched(client_with, site):
    client = client_with(allow_urls=True)
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433"):
        body = {"input": f"http://{host}:{site.server_port}/image.png", "modality": "image"}
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code == 400, host
        assert "cannot be fetched" in answer.json()["error"]["message"]


def test_fetches_at_the_same_time_are_limited(served, images):
    class Counting:
        """Fetches once as many as are allowed are at it, and no more begin."""

        now = most = 0

        async def fetch(self, url: str, name: str) -> bytes:
            self.now += 1
            self.most = max(self.most, self.now)
            for _ in range(50):
                await asyncio.sleep(0)
            self.now -= 1
            return as_file(images[0])

    async def ask(*counts: int) -> int:
        counting = Counting()
        encoding = Encoder(served, ServeOptions(threads=1), counting)  # type: ignore[arg-type]
        requests = [[ImageItem(f"http://images.test/{n}") for n in range(count)] for count in counts]
        found = await asyncio.gather(*map(encoding.encode, requests))
        assert [len(each.features) for each in found] == list(counts)
        encoding.close()
        return counting.most

    assert asyncio.run(ask(20)) == encoder.MOST_OF_ONE == 8
    assert asyncio.run(ask(20, 20, 20)) == encoder.MOST_FETCHED == 16
