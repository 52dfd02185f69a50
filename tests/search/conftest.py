"""Images that differ, and a small model that is loaded once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_clip import HfClipModel, HfClipProcessor

pytest.importorskip("lancedb")


@pytest.fixture(scope="session")
def small_model(digits: Path) -> tuple[Any, Any, str]:
    """Model, processor, and their folder."""
    folder = digits / "vit"
    return HfClipModel.from_pretrained(folder).eval(), HfClipProcessor.from_pretrained(folder), str(folder)


def make_image(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """An image of smooth colours, another for each seed."""
    levels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with six images on two levels, a broken one, and what is none."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(["a.png", "b.jpg", "c.webp", "inner/d.jpg", "inner/e.png", "inner/f.jpg"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:100])
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes((folder / "a.png").read_bytes())
    return folder


@pytest.fixture
def new_index(tmp_path: Path, small_model: tuple[Any, Any, str]) -> Callable[..., Any]:
    """Makes or opens an index beside the images."""
    from hf_clip.search.image_index import ImageIndex

    model, processor, _ = small_model
    return lambda name="index": ImageIndex.open(tmp_path / name, model=model, processor=processor)


@pytest.fixture
def hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at as if an hour had passed since they were written, so that none may change again unseen."""
    monkeypatch.setattr("hf_clip.search.folder_scan.SETTLED_AFTER_NS", -3600 * 10**9)
