"""A page of a small model, with an index of a few images, two of which are near duplicates."""

from pathlib import Path
from typing import Any

import pytest

from ..search.conftest import make_image

pytest.importorskip("lancedb")
pytest.importorskip("gradio", reason="the extra `app` brings it")

LABELS = ["a photo of a red one on blue paper", "a photo of a green eight on purple paper"]


@pytest.fixture(scope="session")
def page_files(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, and `index`, an index of them. Tests must not write there."""
    from hf_clip.search.image_index import ImageIndex

    folder = tmp_path_factory.mktemp("page")
    photos = folder / "photos"
    photos.mkdir()
    for seed in range(6):
        make_image(seed, (240, 160)).save(photos / f"photo-{seed}.png")
    make_image(0, (120, 80)).save(photos / "smaller.png")
    ImageIndex.open(folder / "index", model=digits / "vit").add(photos)
    return folder


@pytest.fixture(scope="session")
def page(digits: Path, page_files: Path) -> Any:
    """PageModel."""
    from hf_clip.app.page_model import PageModel

    return PageModel.load(str(digits / "vit"), str(page_files / "index"))
