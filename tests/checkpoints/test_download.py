"""Fetching checkpoints, from a server on this machine that can be cut off, lie, or know nothing."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from PIL import Image

from conversion.convert import main
from hf_clip import VARIANTS, convert, load
from hf_clip.checkpoints.download import fetch_original, find_original, originals_folder
from hf_clip.checkpoints.errors import CheckpointError


@dataclass
class Server:
    """What the server sends for any path, and what it was asked for."""

    content: bytes = b""
    stop_after: int | None = None
    knows_ranges: bool = True
    status: int | None = None
    length: str | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requests.append((self.path, wanted))
            if state.status is not None:
                self.send_error(state.status)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.knows_ranges else 0
            if wanted and start >= len(state.content):
                self.send_error(416)
                return
            self.send_response(206 if wanted and state.knows_ranges else 200)
            self.send_header("Content-Length", state.length or str(len(state.content) - start))
            self.end_headers()
            end = len(state.content) if state.stop_after is None else start + state.stop_after
            self.wfile.write(state.content[start:end])

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_CLIP_ORIGINALS", f"http://127.0.0.1:{httpd.server_port}/models/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def published(server: Server, archives: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small archive that stands in for the published RN50, whose sum the table then has."""
    server.content = archives["resnet"].read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setitem(VARIANTS, "RN50", replace(VARIANTS["RN50"], sha256=digest))
    return server.content


def test_name_is_downloaded_once_into_the_cache(server: Server, published: bytes, tmp_path: Path):
    path = find_original("RN50")
    assert path == tmp_path / "cache" / "hf_clip" / "originals" / "RN50.pt"
    assert path.read_bytes() == published
    assert server.requests == [(f"/models/{VARIANTS['RN50'].sha256}/RN50.pt", None)]
    assert find_original("RN50") == path
    assert len(server.requests) == 1
    assert not list(path.parent.glob("*.part"))


def test_name_is_loaded_from_the_server(server: Server, published: bytes, tmp_path: Path):
    """`clip.load("RN50")` as the original has it, with its folder for downloads."""
    model, preprocess = load("RN50", device="cpu", download_root=tmp_path / "downloads")
    assert (tmp_path / "downloads" / "RN50.pt").read_bytes() == published
    image = preprocess(Image.new("RGB", (300, 200))).unsqueeze(0)
    assert model.encode_image(image).shape == (1, 48)
    load("RN50", device="cpu", download_root=tmp_path / "downloads")
    assert len(server.requests) == 1


def test_interrupted_download_goes_on_where_it_stopped(server: Server, published: bytes):
    server.stop_after = 100_000
    with pytest.raises(
        ConnectionError, match=r"RN50.pt could not be downloaded .*The same command goes on where it stopped"
    ):
        fetch_original(VARIANTS["RN50"])
    assert (originals_folder() / "RN50.pt.part").stat().st_size == 100_000
    server.stop_after = None
    assert fetch_original(VARIANTS["RN50"]).read_bytes() == published
    assert server.requests[-1][1] == "bytes=100000-"


def test_server_without_ranges_is_asked_for_the_whole(server: Server, published: bytes):
    server.stop_after = 5000
    with pytest.raises(ConnectionError):
        fetch_original(VARIANTS["RN50"])
    server.stop_after, server.knows_ranges = None, False
    assert fetch_original(VARIANTS["RN50"]).read_bytes() == published


@pytest.mark.parametrize("length", ["many", "-5", "9" * 5000, "1e3"], ids=["word", "negative", "long", "float"])
def test_length_that_is_no_number_tells_nothing(server: Server, published: bytes, length: str):
    server.length = length
    assert fetch_original(VARIANTS["RN50"]).read_bytes() == published


def test_complete_but_unchecked_file_is_checked_and_taken(server: Server, published: bytes):
    originals_folder().mkdir(parents=True)
    (originals_folder() / "RN50.pt.part").write_bytes(published)
    assert fetch_original(VARIANTS["RN50"]).read_bytes() == published


def test_other_content_is_deleted_and_refused(server: Server, published: bytes):
    server.content = published[:-1] + b"x"
    with pytest.raises(CheckpointError, match=f"the published file has {VARIANTS['RN50'].sha256}. It was deleted"):
        fetch_original(VARIANTS["RN50"])
    assert not [path for path in originals_folder().iterdir() if path.suffix != ".lock"]


def test_damaged_file_in_the_cache_is_not_used(server: Server, published: bytes):
    path = fetch_original(VARIANTS["RN50"])
    path.write_bytes(published[:-10])
    with pytest.raises(CheckpointError, match="has sha256 .*Download it again"):
        fetch_original(VARIANTS["RN50"])


@pytest.mark.parametrize("status", [404, 503])
def test_server_that_refuses_is_quoted(server: Server, published: bytes, status: int):
    server.status = status
    with pytest.raises(ConnectionError, match=f"HTTP Error {status}.*or put the file into"):
        fetch_original(VARIANTS["RN50"])


def test_offline_says_where_to_put_the_file(server: Server, published: bytes, monkeypatch: pytest.MonkeyPatch):
    expected = f"nothing is downloaded offline. Put RN50.pt into {originals_folder()}"
    with pytest.raises(FileNotFoundError, match=expected):
        fetch_original(VARIANTS["RN50"], offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=expected):
        find_original("RN50")
    assert server.requests == []
    originals_folder().mkdir(parents=True)
    (originals_folder() / "RN50.pt").write_bytes(published)
    assert find_original("RN50").is_file()


def test_path_is_left_as_it_is(tmp_path: Path):
    assert find_original(tmp_path / "RN50.pt") == tmp_path / "RN50.pt"
    assert find_original("elsewhere/model.pt") == Path("elsewhere/model.pt")


def test_convert_takes_a_name(server: Server, published: bytes, tmp_path: Path):
    config = convert("RN50", tmp_path / "out")
    assert config.vision_config.depths == [1, 2, 1, 1]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_convert_offline_is_one_line(server: Server, published: bytes, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["--offline", "RN50", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: RN50 is not on this machine")
    assert not (tmp_path / "out").exists()
