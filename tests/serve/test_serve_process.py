"""The server as a process: its port, its clients' libraries, clients that stall, and its end."""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from select import select
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import torch
import uvicorn
from starlette.testclient import TestClient

from hf_clip import HfClipModel
from hf_clip.checkpoints import in_memory
from hf_clip.commands.program import main
from hf_clip.serve import server_process
from hf_clip.serve.served_model import load_served, public_name
from hf_clip.serve.server_process import ANSWER_SECONDS, LEAST_TAKEN, PatientProtocol
from hf_clip.serve.web_app import build_app
from hf_clip.taken_port import take_port
from hf_clip.zero_shot.features import encode_images, encode_texts

from ..waiting import LONGEST_WAIT, until
from .conftest import as_uri

ROOT = Path(__file__).resolve().parents[2]

SLOW_TEXT = "three " * 16


class Process:
    """`hf-clip serve` of a small model on a free port, with a key in its environment; see `controlled_server.py`."""

    def __init__(self, model: Path, log: Path):
        environment = os.environ | {"HF_CLIP_API_KEY": "secret-key", "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-W", "ignore", "-m", "tests.serve.controlled_server"]
        self.log = log
        with log.open("wb") as errors:
            self.started = subprocess.Popen(
                [*program, "serve", str(model), "--port", "0"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.pid = self.started.pid
        line = self._next_line()
        found = re.match(r"(http://127.0.0.1:\d+) serves vit, 32 numbers; see /docs", line)
        assert found, line + log.read_text()
        self.address = found[1]

    def _next_line(self) -> str:
        assert self.started.stdout is not None
        return self.started.stdout.readline().decode()

    def order(self, name: str, *given: Any) -> Any:
        """Have the process do something, and return what it answers."""
        assert self.started.stdin is not None
        self.started.stdin.write(json.dumps([name, *given]).encode())
        self.started.stdin.flush()
        return json.loads(self._next_line())

    @contextmanager
    def limited(self, name: str, seconds: float) -> Iterator[None]:
        """Shorten a time limit while the block runs. None else is near."""
        before = self.order("limit", name, seconds)
        try:
            yield
        finally:
            self.order("limit", name, before)

    def close(self) -> None:
        self.started.kill()
        self.started.communicate()


@pytest.fixture(scope="module")
def process(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with closing(Process(digits / "vit", tmp_path_factory.mktemp("serve") / "log")) as found:
        yield found


@pytest.fixture(scope="module")
def openai_client(process: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.address}/v1", api_key="secret-key", max_retries=0) as found:
        yield found


def connect(process: Any) -> socket.socket:
    place = urlsplit(process.address)
    return socket.create_connection((place.hostname, place.port), timeout=LONGEST_WAIT)


def request_of(content: bytes, length: int | None = None, path: str = "/v1/embeddings") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-key\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content) if length is None else length}\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    """What comes until the connection ends, in whichever way."""
    found = b""
    with suppress(ConnectionResetError):  # it was closed before the server had read all that was sent
        while part := connection.recv(65536):
            found += part
    return found


def test_client_of_openai_gets_embeddings(openai_client, plain_model, images):
    texts = ["three", "a photo of a green eight"]
    found = openai_client.embeddings.create(model="vit", input=texts)  # asks for base64
    assert np.allclose([row.embedding for row in found.data], encode_texts(*plain_model, texts), rtol=0, atol=1e-6)
    assert found.usage.total_tokens > 4
    found = openai_client.embeddings.create(
        model="vit", input=[as_uri(image) for image in images], encoding_format="float", dimensions=32
    )
    assert np.allclose([row.embedding for row in found.data], encode_images(*plain_model, images), rtol=0, atol=1e-6)
    assert [entry.id for entry in openai_client.models.list()] == ["vit"]
    assert openai_client.models.retrieve("vit").id == "vit"


def test_client_of_openai_gets_its_errors(openai_client, process):
    with pytest.raises(openai.NotFoundError, match="The model 'gpt' is not served here: ask for 'vit'"):
        openai_client.embeddings.create(model="gpt", input="x")
    with pytest.raises(openai.BadRequestError, match="input is empty") as caught:
        openai_client.embeddings.create(model="vit", input=[])
    assert (caught.value.param, caught.value.code) == ("input", "empty_input")
    with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
        openai_client.with_options(api_key="x").models.list()


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/emb", b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"],
    ids=["nothing", "half a line", "half a head"],
)
def test_client_that_stalls_before_its_request_is_cut(process, sent: bytes):
    with process.limited("HEAD_SECONDS", 0.2), connect(process) as connection:
        connection.sendall(sent)
        assert read_all(connection) == b""


@pytest.mark.parametrize("path", ["/v1/embeddings", "/predict"])
def test_client_that_stalls_within_its_request_is_told_so_and_cut(process, openai_client, path: str):
    sent = request_of(b'{"input": "', length=1000, path=path)
    if path == "/predict":
        sent = sent.replace(b"application/json", b"multipart/form-data; boundary=b")
    with process.limited("body_seconds", 0.5), connect(process) as connection:
        connection.sendall(sent)
        found = read_all(connection)
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    message = "The request did not arrive within 0.5 s."
    answer = json.loads(body)
    assert answer["detail"] == message
    assert path == "/predict" or answer["error"]["code"] == "request_timeout"
    assert openai_client.embeddings.create(model="vit", input="one").data


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "invalid_http"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "invalid_http"),  # without Host
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000, 400, "invalid_http"),
        (b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(200), 400, "invalid_http"),  # https
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "invalid_http"),
        (
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nX-Api-Key: secret-key\r\nContent-Type: application/json\r\n"
            b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"inp\r\nZZZ\r\n',
            400,
            "invalid_http",
        ),
        (
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nX-Api-Key: secret-key\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n",
            400,
            "invalid_framing",
        ),
        (
            b"GET http://evil.example/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Api-Key: secret-key\r\n\r\n",
            404,
            "not_found",
        ),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Api-Key: secret-key\r\n\r\n", 404, "not_found"),
    ],
    ids=["words", "host", "large head", "https", "two lengths", "chunks", "two framings", "absolute", "star"],
)
def test_request_that_is_none_gets_one_error(process, sent: bytes, status: int, code: str):
    with connect(process) as connection:
        connection.sendall(sent)
        found = read_all(connection)
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert b"application/json" in head
    assert json.loads(body)["error"]["code"] == code  # and nothing follows


def test_requests_that_are_sent_together_are_answered_in_turn(process):
    content = [json.dumps({"input": text, "encoding_format": "base64"}).encode() for text in ("one", "two", "one")]
    last = b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connect(process) as connection:
        connection.sendall(b"".join(map(request_of, content)) + last)
        found = read_all(connection)
    assert found.count(b"HTTP/1.1 200 OK") == 4
    assert found.endswith(b"pong")
    first, second, third = re.findall(rb'"embedding":"([^"]+)"', found)
    assert first == third != second


def test_client_that_waits_for_leave_to_send_is_told_to_go_on(process):
    content = b'{"input": "one"}'
    head, _, body = request_of(content).partition(b"\r\n\r\n")
    with connect(process) as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_all(connection).startswith(b"HTTP/1.1 200 OK")


def files_of(process: Any) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the server's files")
def test_client_that_does_not_take_its_answers_is_cut(process):
    """Whether much of an answer waits, or little: also what waits when the connection is closed."""
    before = files_of(process)
    small = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    connections = []
    try:
        with process.limited("ANSWER_SECONDS", 0.5):
            for count in range(250, 410, 10):  # until the buffers of the connection are full, and some more
                connection = socket.socket()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect((urlsplit(process.address).hostname, urlsplit(process.address).port))
                connection.sendall(small * count)
                connections.append(connection)
            for connection in connections:  # the server has accepted each, and begins to answer
                assert select([connection], [], [], LONGEST_WAIT)[0]
            until(lambda: files_of(process) <= before, "the end of these connections")
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the server's files")
def test_connections_that_stall_make_room_for_others(process, openai_client):
    before, connections = files_of(process), []
    sent = [b"", b"POST /v1/embeddings HTTP/1.1\r\n", request_of(b'{"input": "', length=1000)]
    try:
        for number in range(150):
            connections.append(connect(process))
            connections[-1].sendall(sent[number % 3])
            if number % 10 == 9:
                assert openai_client.embeddings.create(model="vit", input="one").data
                assert files_of(process) <= before + 70
    finally:
        for connection in connections:
            connection.close()


def test_connection_serves_several_requests(process):
    """However long it waits between them: then no head is on its way."""
    content, headers = json.dumps({"input": "one"}), {"X-Api-Key": "secret-key", "Content-Type": "application/json"}

    def ask(connection: HTTPConnection) -> Any:
        connection.request("POST", "/v1/embeddings", content, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert json.loads(answer.read())["data"]
        return connection.sock.getsockname()

    for seconds in (0.2, 1, 5, 25):
        connection = HTTPConnection(urlsplit(process.address).netloc, timeout=LONGEST_WAIT)
        with process.limited("HEAD_SECONDS", seconds), closing(connection):
            try:
                place = ask(connection)
            except ConnectionError:  # this process stood still before it had sent its first head
                continue
            time.sleep(2 * seconds)
            assert ask(connection) == place
            return
    pytest.fail("no request was answered")


def figures(process: Any) -> str:
    """What the server counts."""
    with connect(process) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Api-Key: secret-key\r\nConnection: close\r\n\r\n")
        return read_all(connection).decode()


def test_work_of_a_client_that_is_gone_is_dropped(process, openai_client):
    """Of 300 texts the first batch is computed, in which the client left."""

    def gone() -> int:
        counts = re.findall(r'^hf_clip_requests_total\{.*status="499"\} (\S+)', figures(process), re.MULTILINE)
        return sum(int(float(count)) for count in counts)

    before = gone()
    process.order("hold")
    slow = request_of(json.dumps({"input": [SLOW_TEXT + str(n) for n in range(300)], "truncate": True}).encode())
    with connect(process) as connection:
        connection.sendall(slow)
        until(lambda: process.order("held"), "the first batch")
    until(lambda: gone() == before + 1, "the end of the request")
    process.order("release")
    assert openai_client.embeddings.create(model="vit", input="one").data
    until(lambda: 'hf_clip_waiting{kind="text"} 0.0' in figures(process), "the end of what waits")
    assert process.order("held") == [64]


def test_sigterm_finishes_what_was_begun(process):
    """The last test of the process."""
    accepted, begun = process.order("count", "accepted"), process.order("count", "begun")
    process.order("hold")
    process.order("limit", "body_seconds", 0.5)
    asking, stalled, silent = (connect(process) for _ in range(3))
    asking.sendall(request_of(json.dumps({"input": SLOW_TEXT, "encoding_format": "base64"}).encode()))
    stalled.sendall(request_of(b'{"input": "', length=1000))
    until(lambda: process.order("held"), "the text's batch")
    until(lambda: process.order("count", "accepted") == accepted + 3, "the connections")
    until(lambda: process.order("count", "begun") == begun + 2, "the requests")
    for _ in range(2):
        process.started.send_signal(signal.SIGTERM)

    def is_refused() -> bool:
        try:
            connect(process).close()
        except ConnectionError:
            return True
        return False

    until(is_refused, "the end of the port")
    process.order("release")
    with asking, stalled, silent:
        answers = [read_all(connection) for connection in (asking, stalled, silent)]
    assert process.started.wait(LONGEST_WAIT) == 0
    body = json.loads(answers[0].partition(b"\r\n\r\n")[2])
    assert len(base64.b64decode(body["data"][0]["embedding"])) == 32 * 4
    assert answers[1].startswith(b"HTTP/1.1 408")
    assert answers[2] == b""
    log = process.log.read_text()
    assert "Traceback" not in log
    assert "three" not in log


def test_port_is_open_when_the_line_is_printed(digits: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []

    def printed(line: str, **options: Any) -> None:
        lines.append(line)
        if found := re.match(r"http://127.0.0.1:(\d+) serves", line):
            socket.create_connection(("127.0.0.1", int(found[1])), timeout=LONGEST_WAIT).close()

    monkeypatch.setattr("builtins.print", printed)
    monkeypatch.setattr("hf_clip.serve.server_process.keep_loaded", lambda: None)
    monkeypatch.setattr("hf_clip.serve.server_process.serve_forever", lambda app, taken: None)
    assert main(["serve", str(digits / "vit"), "--port", "0", "--no-optimize"]) == 0
    assert sum(" serves vit, 32 numbers" in line for line in lines) == 1


def test_server_that_is_at_work_for_all_refuses_further_connections():
    class Connection:
        response_complete = more_body = False

        def __init__(self, heard_at: float, is_waiting: bool):
            self.transport, self.app, self._heard_at = self, None, heard_at
            self.cycle = None if is_waiting else self
            self.is_cut = False

        def is_closing(self) -> bool:
            return self.is_cut

        def abort(self) -> None:
            self.is_cut = True

        _is_waiting = PatientProtocol._is_waiting

    new, old, older = Connection(9, True), Connection(2, True), Connection(1, True)
    busy = Connection(0, False)
    new.connections = {new, old, older, busy}  # type: ignore[attr-defined]
    for expected in (older, old):
        PatientProtocol._make_room(new)  # type: ignore[arg-type]
        assert expected.is_cut
        assert new.app is None
    PatientProtocol._make_room(new)  # type: ignore[arg-type]
    assert not busy.is_cut
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    for path in ("/v1/embeddings", "/predict/"):
        asyncio.run(new.app({"type": "http", "path": path}, None, send))  # type: ignore[misc]
    assert sent[0]["status"] == sent[2]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "overloaded"
    assert json.loads(sent[3]["body"]) == {"detail": "The server has too many connections; ask again in 1 s."}


def test_client_that_takes_its_answer_slowly_and_steadily_is_not_cut():
    left, waits, cut = [10 * LEAST_TAKEN], [], []

    class Connection:
        loop = SimpleNamespace(call_later=lambda seconds, *rest: waits.append((seconds, rest)))
        transport = SimpleNamespace(get_write_buffer_size=lambda: left[0], abort=lambda: cut.append(left[0]))

        def __getattr__(self, name: str) -> Any:
            return partial(getattr(PatientProtocol, name), self)

    Connection()._wait_for_client()
    for taken in (LEAST_TAKEN, 5 * LEAST_TAKEN, LEAST_TAKEN - 1):
        assert not cut
        seconds, (check, before) = waits.pop()
        assert seconds == ANSWER_SECONDS
        left[0] -= taken
        check(before)
    assert cut == [3 * LEAST_TAKEN + 1]
    assert not waits


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["{folder}", "--port", "{taken}"],
            "error: Port {taken} of 127.0.0.1 is taken by another program: end that, or",
        ),
        (
            ["{folder}", "--host", "192.0.2.1", "--port", "0"],
            "error: 192.0.2.1 is no name or address of this machine (",
        ),
        (
            ["{folder}", "--host", "no.such.invalid"],
            "error: no.such.invalid is no name or address of this machine: give",
        ),
        (["{folder}/none", "--port", "0"], "error: "),
        (["{folder}", "--port", "0"], "error: {folder} is a folder without a model"),
        (["{folder}", "--index", "{folder}/none", "--port", "0"], "error: There is no index at {folder}/none"),
        (["{model}", "--device", "gpu", "--port", "0"], "error: device='gpu' is no device"),
        (["{folder}", "--api-key", " ", "--port", "0"], "error: The API key is empty, or has spaces at an end, which"),
        (["{folder}", "--api-key", "", "--port", "0"], "error: api-key is given as an empty text; write what is meant"),
    ],
    ids=["port", "host", "name", "missing", "no-model", "no-index", "device", "blank-key", "no-key"],
)
def test_what_keeps_a_server_from_starting(words, line, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "notes.txt").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"model": digits / "vit", "folder": tmp_path, "taken": taken.getsockname()[1]}
        assert main(["serve", *[word.format(**names) for word in words]]) == 1
    [last] = [one for one in capsys.readouterr().err.splitlines() if "error" in one]
    assert last.startswith(line.format(**names))


@pytest.mark.parametrize("key", ["schlüssel", "a\nb", "k\udcff"])
def test_key_that_clients_cannot_send_is_refused(key: str, capsys: pytest.CaptureFixture):
    assert main(["serve", "nothing", "--port", "0", "--api-key", key]) == 1
    assert "error: The API key has other characters than ASCII's letters, digits and signs" in capsys.readouterr().err


@pytest.mark.parametrize("name", [" ", "a\nb", "x\udcff"])
def test_name_that_no_answer_can_hold_is_refused(name: str, capsys: pytest.CaptureFixture):
    assert main(["serve", "nothing", "--port", "0", "--name", name]) == 1
    assert "is blank, or has characters that cannot be shown: call the model otherwise." in capsys.readouterr().err


def test_name_of_a_folder_that_is_no_text(tmp_path: Path):
    for name, shown in ((os.fsdecode(b"mod\xe4l"), "mod�l"), ("ne\nw", "ne�w"), ("日本 é", "日本 é")):
        assert public_name(str(tmp_path / name)) == shown


@pytest.mark.parametrize("is_optimized", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_weights_that_are_overwritten_do_not_matter(
    kind: str, is_optimized: bool, digits: Path, tmp_path: Path, images
):
    """A training saves its model anew where the served one came from. What is still mapped would end the process."""
    folder = tmp_path / kind
    shutil.copytree(digits / kind, folder)
    served = load_served(str(folder))
    if is_optimized:
        served.model.optimize_for_inference()
    body = {"input": ["one two", as_uri(images[0])]}
    with TestClient(build_app(served)) as client:
        before = client.post("/v1/embeddings", json=body).json()["data"]
        with (folder / "model.safetensors").open("r+b") as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
        assert client.post("/v1/embeddings", json=body).json()["data"] == before


def test_empty_key_of_the_environment_is_no_open_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """As of a container whose settings name a variable that is not set. It is said before a model is looked for."""
    monkeypatch.setenv("HF_CLIP_API_KEY", "")
    assert main(["serve", "nothing", "--port", "0"]) == 1
    assert "error: The API key is empty" in capsys.readouterr().err


WITHOUT_TORCH = """
import sys
sys.argv[0] = "hf-clip"
sys.modules["torch"] = sys.modules["transformers"] = None
from hf_clip.commands.program import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "model", "--port", "{taken}"], "error: Port {taken} of 127.0.0.1 is taken by another program"),
        (["serve", "model", "--port", "0", "--index", "no-index"], "error: There is no index at no-index"),
        (["app", "model", "--port", "{taken}"], "error: Port {taken} of 127.0.0.1 is taken by another program"),
    ],
    ids=["port", "index", "page"],
)
def test_what_needs_no_model_is_told_before_torch_is_imported(words: list[str], said: str):
    pytest.importorskip("lancedb")
    pytest.importorskip("gradio")
    with take_port("127.0.0.1", 0) as taken:
        names = {"taken": taken.getsockname()[1]}
        given = [sys.executable, "-c", WITHOUT_TORCH, *(word.format(**names) for word in words)]
        done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said.format(**names))


def test_port_is_listened_on_while_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Who connects meanwhile waits; the port goes with a model that cannot be loaded."""
    ports: list[socket.socket] = []

    def take(host: str, port: int) -> socket.socket:
        ports.append(take_port(host, port))
        return ports[-1]

    def load(*_: Any, **__: Any) -> None:
        socket.create_connection(ports[0].getsockname(), timeout=LONGEST_WAIT).close()
        raise ValueError("no model")

    monkeypatch.setattr("hf_clip.taken_port.take_port", take)
    monkeypatch.setattr("hf_clip.serve.served_model.load_served", load)
    assert main(["serve", "nothing", "--port", "0"]) == 1
    assert "error: no model" in capsys.readouterr().err
    assert [taken.fileno() for taken in ports] == [-1]


def test_index_of_another_model_is_refused_by_its_name(digits: Path, tmp_path: Path, plain_model, images, capsys):
    pytest.importorskip("lancedb")
    from hf_clip.search.image_index import ImageIndex

    (tmp_path / "photos").mkdir()
    images[0].save(tmp_path / "photos" / "a.png")
    ImageIndex.open(tmp_path / "index", model=plain_model[0], processor=plain_model[1]).add(tmp_path / "photos")
    assert main(["serve", str(digits / "resnet"), "--index", str(tmp_path / "index"), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert "was made of another model" in error
    assert f"{digits / 'vit'}" in error


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("hf_clip.extras.is_there", lambda module: module != "uvicorn")
    assert main(["serve", "nothing"]) == 1
    assert 'hf-clip serve needs uvicorn, which this Python does not have: pip install "hf-clip[serve]"' in (
        capsys.readouterr().err
    )


def test_threads_take_turns_more_often_and_the_event_loop_computes_alone(monkeypatch: pytest.MonkeyPatch):
    def look() -> tuple[float, int]:
        return sys.getswitchinterval(), torch.get_num_threads()

    seen: list[tuple[float, int]] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: seen.append(look()))
    before = look()
    with take_port("127.0.0.1", 0) as taken:
        server_process.serve_forever(None, taken)
    assert seen == [(pytest.approx(server_process.SWITCH_SECONDS), 1)]
    assert look() == before
    assert before[0] > server_process.SWITCH_SECONDS


def test_model_is_loaded_and_optimized_in_one_thread(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    threads: list[threading.Thread] = []

    def optimize(model: HfClipModel) -> None:
        threads.append(threading.current_thread())
        raise ValueError("no room")

    monkeypatch.setattr(in_memory, "copy_to_memory", lambda model: threads.append(threading.current_thread()))
    monkeypatch.setattr(HfClipModel, "optimize_for_inference", optimize)
    assert main(["serve", str(digits / "vit"), "--port", "0"]) == 1
    assert "no room" in capsys.readouterr().err
    assert len(threads) == 2
    assert len({threading.main_thread(), *threads}) == 2


def test_thread_that_loads_is_the_one_that_encodes(served, monkeypatch: pytest.MonkeyPatch):
    threads: list[threading.Thread] = []
    encode = served.encode_texts
    monkeypatch.setattr(served, "encode_texts", lambda rows: threads.append(threading.current_thread()) or encode(rows))
    with TestClient(build_app(served)) as client:
        assert client.post("/v1/embeddings", json={"input": "one"}).status_code == 200
    assert threads == [served.computing.run(threading.current_thread)]
