"""Fetching images' addresses: every deadline, limit and redirect, against a server that keeps to none of them."""

import asyncio
import base64
import gzip
import pickle
import socket
import socketserver
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_clip import HfClipImageProcessor
from hf_clip.model import fetch as fetch_module
from hf_clip.model.fetch import FetchError, fetch
from hf_clip.model.open_image import UnreadableImageError, open_image

from ..waiting import LONGEST_WAIT, until

CONTENT = bytes(range(256)) * 4
MIB = 2**20


class Server:
    """Answers path by path: `answers` maps each to what is sent, one element for each request, the last one for ever.

    An answer is all bytes that are sent, or a function that gets the socket.
    """

    def __init__(self, port: int):
        self.url, self.paths, self.answers = f"http://127.0.0.1:{port}", [], {}
        self.paths: list[str]
        self.answers: dict[str, list[bytes | Callable[[socket.socket], None]]]
        self.over, self.ended = threading.Event(), 0  # the second: answers that came to their end

    def __call__(self, *answers: bytes | Callable[[socket.socket], None], path: str = "/image") -> str:
        self.answers[path] = list(answers)
        return self.url + path

    def answer(self, connection: socket.socket) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked:
            if not (received := connection.recv(4096)):
                return
            asked += received
        path = asked.split()[1].decode()
        self.paths.append(path)
        answers = self.answers[path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer(connection)
        else:
            connection.sendall(answer)

    def drip(self, piece: bytes, start: bytes = b"") -> Callable[[socket.socket], None]:
        """A piece every few milliseconds without end: no single wait is long."""

        def send(connection: socket.socket) -> None:
            connection.sendall(start)
            while not self.over.wait(0.01):
                connection.sendall(piece)

        return send

    def say_nothing(self, connection: socket.socket) -> None:
        self.over.wait(LONGEST_WAIT)

    def pour(self, start: bytes, piece: bytes, count: int, sent: list[int]) -> Callable[[socket.socket], None]:
        def send(connection: socket.socket) -> None:
            connection.sendall(start)
            for _ in range(count):
                connection.sendall(piece)
                sent.append(len(piece))

        return send


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # the client has gone, as it should
                serving.answer(self.request)
            serving.ended += 1

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        serving = Server(running.server_address[1])
        threading.Thread(target=running.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
        yield serving
        serving.over.set()
        running.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "FIRST_WAIT", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def ok(content: bytes = CONTENT, *headers: str, length: int | None = None) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(content) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def status(code: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {code} Reason", "Content-Length: 0", *headers, "", ""]).encode()


def redirect(to: str) -> bytes:
    return status(302, f"Location: {to}")


def has_ended() -> bool:
    """Whether no content is fetched any more."""
    return not any(thread.name == "hf_clip fetch" for thread in threading.enumerate())


def refused(address: str, message: str, **how: float) -> FetchError:
    with pytest.raises(FetchError, match=message) as error:
        fetch(address, **how)
    assert error.value.address == address
    assert len(str(error.value).splitlines()) == 1
    return error.value


OPEN_ENDED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b""),
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X-More: yes\r\n"),
        (OPEN_ENDED, b"x"),
        (CHUNKED, b"1\r\nx\r\n"),
        (CHUNKED, b"0"),
    ],
    ids=["nothing", "status line", "headers", "body", "chunks", "chunk's length"],
)
def test_one_deadline_ends_whatever_trickles(server: Server, start: bytes, piece: bytes):
    address = server(server.drip(piece, start) if piece else server.say_nothing)
    error = refused(address, "did not arrive within 0.3 s", timeout=0.3)
    assert error.status is None
    # The thread that fetched ends too, and its connection with it.
    until(has_ended, "its end")


def test_silent_server_is_left_before_the_deadline(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch_module, "READ_TIMEOUT", 0.2)
    refused(server(server.say_nothing), "the server sent nothing for 0.2 s")


def test_name_that_is_looked_up_for_ever_is_left_behind(monkeypatch: pytest.MonkeyPatch):
    over = threading.Event()

    def look_up(*_: object, **__: object) -> list:
        over.wait(LONGEST_WAIT)
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    refused("http://nobody.invalid/x.png", "did not arrive within 0.2 s", timeout=0.2)
    over.set()


def test_redirects_and_retries_share_the_deadline(server: Server):
    address = server(redirect("/next"))
    server(server.say_nothing, path="/next")
    for seconds in (0.3, 1, 5, 25):  # for a machine on which the first may be over before it was redirected
        refused(address, f"did not arrive within {seconds} s", timeout=seconds)
        if "/next" in server.paths:
            break
    assert "/next" in server.paths
    server.paths.clear()
    refused(server(status(503, "Retry-After: 60")), "answered 503 Reason, to be asked again in 60 s", timeout=50)
    assert server.paths == ["/image"]  # it isn't waited for in vain


@pytest.mark.parametrize("claimed", ["claimed", "huge", "not claimed", "too little claimed"])
def test_large_answer_is_not_read(server: Server, claimed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch_module, "MAX_BYTES", 2 * MIB)
    lengths = {"claimed": 2**30, "huge": 10**19, "too little claimed": 10}
    start = OPEN_ENDED if claimed == "not claimed" else ok(b"", length=lengths[claimed])
    sent: list[int] = []
    address = server(server.pour(start, bytes(MIB), 1024, sent))
    if claimed == "too little claimed":
        assert fetch(address) == bytes(10)
    else:
        refused(address, "its content is larger than 2 MiB")
    until(lambda: server.ended and has_ended(), "its end")
    assert sum(sent) < 64 * MIB  # what lies in the system's buffers, not a gigabyte


def test_answer_that_unpacks_to_more_is_cut_short(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch_module, "MAX_BYTES", 4 * MIB)
    packed = gzip.compress(bytes(256 * MIB), 1)
    assert len(packed) < 4 * MIB
    tracemalloc.start()
    refused(server(ok(packed, "Content-Encoding: gzip")), "its content is larger than 4 MiB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * MIB
    nothing = b"".join(gzip.compress(b"") for _ in range(3))  # much arrives and nothing is in it
    assert fetch(server(ok(nothing, "Content-Encoding: gzip"))) == b""


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZip"])
def test_packed_answer_is_unpacked(server: Server, encoding: str):
    packed = zlib.compress(CONTENT) if encoding == "deflate" else gzip.compress(CONTENT)
    assert fetch(server(ok(packed, f"Content-Encoding: {encoding}"))) == CONTENT
    refused(server(ok(packed[:-12], f"Content-Encoding: {encoding}")), f"its {encoding.lower()} encoding is cut off")
    refused(server(ok(b"no " + packed, f"Content-Encoding: {encoding}")), f"{encoding.lower()} encoding is damaged")


def test_encoding_that_is_not_read_is_named(server: Server):
    refused(
        server(ok(CONTENT, "Content-Encoding: br")), "it is encoded as 'br', but gzip, deflate or nothing is needed"
    )


def test_redirects_lead_to_http_only_and_not_for_ever(server: Server):
    server(ok(), path="/end")
    for target in ("/end", "end", f"{server.url}/end"):
        assert fetch(server(redirect(target))) == CONTENT
    for target in ("file:///etc/hostname", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "gopher://127.0.0.1/"):
        refused(
            server(redirect(target)), f"it leads to '{target.split(':')[0]}:.*', but only http and https are followed"
        )
    server.paths.clear()
    refused(server(redirect("/image")), "it is redirected more than 5 times")
    assert len(server.paths) == 6
    sent: list[int] = []
    large = server.pour(
        b"HTTP/1.1 302 Found\r\nLocation: /end\r\nContent-Length: 1073741824\r\n\r\n", bytes(MIB), 1024, sent
    )
    assert fetch(server(large)) == CONTENT
    assert sum(sent) < 64 * MIB


def test_what_may_pass_is_tried_again(server: Server):
    for first in (
        reset,
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf",
        *map(status, (429, 500, 502, 503, 504)),
    ):
        assert fetch(server(first, ok())) == CONTENT
    now = formatdate(usegmt=True)
    assert fetch(server(status(503, "Retry-After: 0"), status(429, f"Retry-After: {now}"), ok())) == CONTENT
    server.paths.clear()
    assert refused(server(status(503)), "the server answered 503 Reason$").status == 503
    refused(server(reset), "reset by peer|disconnected|closed")
    assert len(server.paths) == 6


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 501])
def test_what_will_not_pass_is_not_tried_again(server: Server, code: int):
    assert refused(server(status(code)), f"the server answered {code} Reason$").status == code
    assert server.paths == ["/image"]


def test_answers_that_are_no_http(server: Server):
    for answer in (b"\x00\x01\x02 no http at all\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"):
        refused(server(answer), ".")
    endless = server.pour(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 1000, 10**6, sent := [])
    refused(server(endless), ".", timeout=20)
    assert sum(sent) < 64 * MIB


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/my cat.png", "/my%20cat.png"),
        ("/bücher.png?q=ä b", "/b%C3%BCcher.png?q=%C3%A4%20b"),
        ("/b%C3%BCcher%20.png", "/b%C3%BCcher%20.png"),
        ("/a.png#part", "/a.png"),
    ],
    ids=["space", "umlauts", "encoded already", "fragment"],
)
def test_addresses_as_people_write_them(server: Server, path: str, asked: str):
    server(ok(), path=asked)
    for around in ("{}", " {}\n"):
        assert fetch(around.format(server.url.replace("http", "HTTP") + path)) == CONTENT
    assert server.paths == [asked] * 2


def test_hosts_beyond_ascii_are_looked_up_by_the_current_rules(monkeypatch: pytest.MonkeyPatch):
    """By the older ones (IDNA 2003, of Python's own codec) straße.example would be another host, strasse.example."""
    asked = []

    def look_up(host: object, *_: object, **__: object) -> list:
        asked.append(host.decode() if isinstance(host, bytes) else host)
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for host in ("bücher.example", "straße.example"):
        refused(f"http://{host}/x.png", "unknown")
    assert asked == ["xn--bcher-kva.example", "xn--strae-oqa.example"]


@pytest.mark.parametrize("address", ["http://", "http:///x", "http://[::1", "http://a\x00b/", "http://x:99999/"])
def test_addresses_that_are_none(address: str):
    refused(address, ".")


def test_data_uris_in_every_form():
    for data in (CONTENT, CONTENT[:-1], CONTENT[:-2]):
        plain = base64.b64encode(data).decode()
        wrapped = base64.encodebytes(data).decode()
        quoted = plain.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
        for text in (plain, wrapped, wrapped.replace("\n", "\r\n"), quoted, plain.rstrip("="), f" {plain} "):
            assert fetch(f"data:image/png;base64,{text}") == data
        assert fetch(f"DATA:;name=a.png;BASE64,{plain}") == data
        assert fetch("data:image/png," + "".join(f"%{byte:02X}" for byte in data)) == data
    for uri, message in (("data:image/png;base64", "comma"), ("data:image/png;base64,A*==", "its base64 is damaged")):
        with pytest.raises(FetchError, match=message):
            fetch(uri)


def test_fetching_works_within_an_event_loop_and_in_many_threads(server: Server):
    address = server(ok())

    async def in_a_notebook() -> bytes:
        return fetch(address)

    assert asyncio.run(in_a_notebook()) == CONTENT
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(address))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 8


def test_error_outlives_a_way_between_processes():
    error = pickle.loads(pickle.dumps(FetchError("http://a/b", "it is gone", 410, 3.0)))
    assert (error.address, error.reason, error.status, error.retry_after) == ("http://a/b", "it is gone", 410, 3.0)


def test_processor_fetches_and_names_what_it_cannot(server: Server):
    """The limits are the fetcher's own; see `open_image` and the training data's tests for those who call it."""
    file = BytesIO()
    Image.new("RGB", (60, 40), "red").save(file, "PNG")
    good = server(ok(gzip.compress(file.getvalue()), "Content-Encoding: gzip"), path="/good")
    assert np.array_equal(
        HfClipImageProcessor()(good).pixel_values, HfClipImageProcessor()(file.getvalue()).pixel_values
    )
    assert open_image({"bytes": None, "path": good}).size == (60, 40)
    bad = server(status(404), path="/bad")
    html = server(ok(b"<html>sorry</html>" * 10), path="/html")
    for images, message in (
        ([good, bad], "404 Reason"),
        ([good, html], "cannot identify image file: it is damaged, or"),
    ):
        with pytest.raises(UnreadableImageError, match=rf"images\[1\] cannot be opened .*{message}") as error:
            HfClipImageProcessor()(images)
        assert error.value.index == 1
    with pytest.raises(UnreadableImageError, match=r"the image cannot be opened .*did not arrive within 0.2 s"):
        open_image(server(server.drip(b"x", OPEN_ENDED)), timeout=0.2)
