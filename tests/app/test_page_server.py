"""Taking a port, and what the address says; the server itself is tested in test_page_in_browser.py."""

import os
import socket

import pytest

from hf_clip.app.page_server import SETTINGS, address_of, is_loopback, listen, own_folder


def test_port_that_is_taken():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        said = f"Port {port} of 127.0.0.1 is taken by another program: end that, or give another port, such as --port "
        with pytest.raises(OSError, match=said + r"\d+\.$"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_host_that_is_not_this_machine(host: str):
    with pytest.raises(OSError, match=f"^{host} is no (name or )?address of this machine.*: give --host 127.0.0.1 for"):
        listen(host, 0)


def test_port_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch):
    def bind(self: object, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(
        OSError, match="^Port 80 is not allowed for this user: give one above 1023, such as --port 7860.$"
    ):
        listen("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("my-machine", False)],
)
def test_which_addresses_are_for_this_machine_alone(host: str, is_own: bool):
    assert is_loopback(host) == is_own


def test_address_that_a_browser_opens():
    with listen("0.0.0.0", 0) as taken:
        assert address_of(taken) == f"http://127.0.0.1:{taken.getsockname()[1]}/"


def test_uploads_go_when_the_page_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with own_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == folder
        assert {name: os.environ[name] for name in SETTINGS} == SETTINGS
        with open(os.path.join(folder, "upload.png"), "w"):
            pass
    assert not os.path.exists(folder)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "True"
    assert "GRADIO_TEMP_DIR" not in os.environ
