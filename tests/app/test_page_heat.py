"""Maps of a page are those of the functions, over the image that was sent."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.app.page_heat import MOST_TEXTS, look_inside, split_texts, view_of
from hf_clip.app.page_model import PageError, PageModel
from hf_clip.zero_shot.heat_overlay import overlay
from hf_clip.zero_shot.relevance import relevance_map

from ..search.conftest import make_image


@pytest.fixture(scope="module")
def pages(digits: Path, page: PageModel) -> dict[str, Any]:
    folder = digits / "resnet"
    model, processor = HfClipModel.from_pretrained(folder).eval(), HfClipProcessor.from_pretrained(folder)
    return {"vit": page, "resnet": PageModel(model, processor, "resnet")}


def test_a_map_for_each_text_and_one_of_the_attention(tower: str, pages: dict[str, Any], tmp_path: Path):
    page = pages[tower]
    make_image(1, (90, 60)).save(tmp_path / "image.png")
    found = look_inside(page, str(tmp_path / "image.png"), "a red one\n\na blue two")
    last = "attention, through all layers" if tower == "vit" else "attention of the pool"
    assert [each.title for each in found] == ["the image", "a red one", "a blue two", last]
    sizes = {Image.open(BytesIO(each.shown)).size for each in found}
    assert sizes == {(448, 299)}


def test_maps_share_their_colours(page: PageModel, tmp_path: Path):
    make_image(1, (90, 60)).save(tmp_path / "image.png")
    image = Image.open(tmp_path / "image.png")
    maps = relevance_map(page.model, page.processor, image, ["a red one", "a blue two"], image_size=32)
    low, high = float(maps.min()), float(maps.max())
    how = {"processor": page.processor, "image_size": 32, "low": low, "high": high}
    expected = np.asarray(overlay(view_of(image).convert("L"), maps[1], **how), dtype=float)
    shown = look_inside(page, str(tmp_path / "image.png"), "a red one\na blue two", "twice as fine")[2]
    assert f"the lightest colour is {high:.2f}".replace("-", "−") in shown.note
    found = np.asarray(Image.open(BytesIO(shown.shown)), dtype=float)
    assert np.abs(found - expected).mean() < 8  # of 255; it is a JPEG


def test_small_images_are_enlarged_with_sharp_pixels():
    view = view_of(Image.fromarray(np.uint8([[[255, 0, 0], [0, 0, 255]]])))
    assert view.size == (448, 224)
    assert view.getpixel((223, 100)) == (255, 0, 0)
    assert view.getpixel((224, 100)) == (0, 0, 255)


def test_what_cannot_be_used(page: PageModel, page_files: Path):
    with pytest.raises(PageError, match="^There is no image: drop one, or choose a file.$"):
        look_inside(page, None, "a cat")
    with pytest.raises(PageError, match="^There are 7 texts, and the page shows 6 maps: give fewer.$"):
        look_inside(page, str(page_files / "photos" / "photo-0.png"), "\n".join(map(str, range(MOST_TEXTS + 1))))
    assert split_texts("a\n\na\nb") == ["a", "b"]
    image = str(page_files / "photos" / "photo-0.png")
    with pytest.raises(PageError, match="^The text 'a a .*' has 1,002 tokens, start and end included, but the model "):
        look_inside(page, image, "a " * 1000)
