"""A small model that is served within the test's process."""

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_clip import HfClipModel, HfClipProcessor
from tests.search.conftest import make_image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from starlette.testclient import TestClient

from hf_clip.serve.serve_options import ServeOptions
from hf_clip.serve.served_model import ServedModel
from hf_clip.serve.web_app import build_app

NAME = "clip-digits"


def as_file(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image as the bytes of a file."""
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def as_uri(image: Image.Image) -> str:
    """An image as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(as_file(image)).decode()}"


@pytest.fixture(scope="session")
def plain_model(digits: Path) -> tuple[Any, Any]:
    """Model and processor as they are called directly."""
    return HfClipModel.from_pretrained(digits / "vit").eval(), HfClipProcessor.from_pretrained(digits / "vit")


@pytest.fixture(scope="session")
def served(digits: Path) -> ServedModel:
    """The same model, optimized as the command does."""
    model = HfClipModel.from_pretrained(digits / "vit").eval()
    model.optimize_for_inference()
    return ServedModel(model, HfClipProcessor.from_pretrained(digits / "vit"), [NAME, "digits-alias"])


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Images that differ."""
    return [make_image(seed) for seed in range(3)]


@pytest.fixture(scope="session")
def client(served: ServedModel) -> Iterator[TestClient]:
    """A client of a server with the usual options."""
    with TestClient(build_app(served), raise_server_exceptions=True) as found:
        yield found


@pytest.fixture
def client_with(served: ServedModel) -> Iterator[Callable[..., TestClient]]:
    """Makes clients of servers with options of one's own."""
    opened: list[TestClient] = []

    def make(index: Any = None, fetcher: Any = None, **options: Any) -> TestClient:
        found = TestClient(build_app(served, ServeOptions(**options), index, fetcher))
        found.__enter__()
        opened.append(found)
        return found

    yield make
    for found in opened:
        found.__exit__(None, None, None)
