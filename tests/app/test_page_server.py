"""What lies on the disk while a page is served; the server itself is tested in test_page_in_browser.py."""

import os

import pytest

from hf_clip.app.page_server import SETTINGS, own_folder


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
