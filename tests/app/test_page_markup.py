"""The page's HTML: what it shows, and that nothing of a visitor's or a file's becomes a tag."""

import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from hf_clip.app.page_heat import HeatMap
from hf_clip.app.page_labels import LabelledImage
from hf_clip.app.page_markup import heat_cards, how_to_index, label_cards, problem, result_grid, selected_image
from hf_clip.app.page_queries import Found
from hf_clip.search.image_index import SearchResult
from hf_clip.search.result_output import BLANK

EVIL = '<img src=x onerror="alert(1)">'
PNG = b"\x89PNG"


def result(id: int = 1, score: float = 0.5, **given: object) -> SearchResult:
    return SearchResult(id, f"/photos/{id}.jpg", score, 640, 480, **{"thumbnail": b"\xff\xd8", **given})  # type: ignore[arg-type]


class Tags(HTMLParser):
    """The names of all attributes, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}


def test_bars_are_as_long_as_their_scores():
    html = label_cards([LabelledImage("a.png", 16, PNG, [("cat", 0.75), (None, 0.25)])], 0.5)
    assert 'class="bar best" data-score="0.750000"' in html
    assert 'class="bar none below" data-score="0.250000"' in html
    assert 'style="width:75.0%"' in html
    assert "none of these" in html
    assert "--threshold:50.0%" in html
    assert 'class="pixels" src="data:image/png;base64,' in html


def test_many_labels_are_folded():
    scores: list[tuple[str | None, float]] = [(f"label {place}", 0.01) for place in range(25)]
    html = label_cards([LabelledImage("a.png", 640, PNG, scores)], 0)
    assert "<summary>15 more</summary>" in html
    assert html.count('class="bar') == 26  # the list itself is of class "bars"


def test_results_are_buttons_with_their_near_duplicates():
    found = Found("a cat", [result(1, 0.8), result(2, 0.4, duplicates=["/a", "/b"], caption="two cats")])
    html = result_grid(found, cutoff=0.6)
    assert "2 images for a cat" in html
    assert ", 1 hidden" in html
    assert '<li data-share="1.000000"><button type="button" data-place="0"' in html
    assert '<li data-share="0.500000" hidden><button type="button" data-place="1"' in html
    assert 'aria-label="two cats, score 0.400, 2 near duplicates"' in html
    assert ">+2</span>" in html


def test_scores_below_zero():
    assert " hidden" not in result_grid(Found("a cat", [result(1, -0.1), result(2, -0.2)]), cutoff=0.6)
    found = Found("a cat", [result(1, 0.1), result(2, -0.2)])
    assert " hidden" not in result_grid(found, cutoff=0.0)
    assert '<li data-share="0.000000" hidden>' in result_grid(found, cutoff=0.01)


def test_image_without_a_thumbnail_is_made_of_its_file_or_blank(tmp_path: Path):
    """As in an index that was made of embeddings."""
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    known = [SearchResult(1, str(tmp_path / "a.png"), 0.5, 0, 0), SearchResult(2, "data#1", 0.4, 0, 0)]
    html = result_grid(Found("a cat", known))
    assert 'src="data:image/jpeg;base64,/9j' in html
    assert f'src="{BLANK}"' in html
    assert "<dt>Size</dt>" not in selected_image(known[1], b"")


def test_nothing_found():
    said = "No image of the index fits a cat. Without “Only images that fit”, the nearest are shown."
    assert result_grid(Found("a cat", [])) == f'<p class="hint">{said}</p>'


def test_selected_image_with_what_the_index_knows():
    metadata = '{"year": 2023, "words": ["a"]}'
    html = selected_image(result(7, caption="two cats", metadata=metadata, duplicates=["/a.jpg"]), b"\xff\xd8")
    for said in ("/photos/7.jpg", "640 × 480", "two cats", "<dt>year</dt><dd>2023</dd>", "1 near duplicate", "/a.jpg"):
        assert said in html
    assert "words" not in html
    assert selected_image(result(7, metadata="{"), b"\xff\xd8")


def test_nothing_that_was_written_becomes_a_tag():
    labelled = label_cards([LabelledImage(EVIL, 640, PNG, [(EVIL, 0.5)])], 0)
    evil = SearchResult(1, EVIL, 0.5, 1, 1, EVIL, json.dumps({EVIL: EVIL}), PNG, [EVIL])
    for html in (
        labelled,
        result_grid(Found(EVIL, [evil])),
        selected_image(evil, PNG),
        problem(ValueError(EVIL)),
        how_to_index(EVIL),
        heat_cards([HeatMap(EVIL, PNG, EVIL)]),
    ):
        assert "&lt;img src=x" in html
        assert "<img src=x" not in html
        found = Tags()
        found.feed(html)
        assert not found.attributes & {"onerror", "x"}


def test_problem_is_one_line_that_is_read_out():
    assert problem(ValueError("a\n  b")) == '<p class="problem" role="alert">a b</p>'
