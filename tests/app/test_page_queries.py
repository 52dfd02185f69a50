"""Queries of a page: texts, uploads, more of the same; and files of the machine, which it never opens."""

import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from hf_clip.app import page_queries
from hf_clip.app.page_model import PageError, PageModel
from hf_clip.app.page_queries import Found, find_images, find_like, large_copy, name_of, query_parts, text_parts
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import SearchIndexError
from hf_clip.search.query import QueryPart

from ..search.conftest import make_image


def test_text_that_reads_as_a_path_is_a_text(page_files: Path):
    path = str(page_files / "photos" / "photo-0.png")
    for text in (path, "https://example.org/cat.jpg"):
        assert text_parts(text) == [QueryPart("text", text)]
    assert text_parts(f'"a cat" - {path}') == [QueryPart("text", "a cat"), QueryPart("text", path, -1.0)]


def test_text_image_and_minus_are_added_up(page_files: Path):
    path = str(page_files / "photos" / "photo-0.png")
    parts, title = query_parts(" a cat ", path, "a dog")
    assert parts == [QueryPart("text", "a cat"), QueryPart("image", path), QueryPart("text", "a dog", -0.5)]
    assert title == "a cat + photo-0.png − a dog"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "There is nothing to look for: write a text, such as a dog on a beach, or drop an image."),
        ({"minus": "snow"}, "There is nothing to look for: write a text, such as a dog on a beach, or drop an image."),
        ({"text": '- "snow"'}, "The query only subtracts: write what to look for, too."),
        ({"text": "a" * 2001}, "The query has 2,001 letters, and the page takes 2,000: write less."),
        ({"text": '"a cat" "a dog"'}, 'The query \'"a cat" "a dog"\' cannot be read from \'"a dog"\' on: write parts '),
    ],
)
def test_queries_that_cannot_be_used(given: dict[str, str], said: str):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        query_parts(**given)
    assert str(error.value).startswith(said)


def test_image_is_found_by_itself(page: PageModel, page_files: Path):
    path = str(page_files / "photos" / "photo-3.png")
    found = find_images(page, *query_parts(image=path), top=3)
    assert Path(found.results[0].path).name == "photo-3.png"
    assert found.title == "photo-3.png"
    assert len(found.results) == 3


def test_more_like_an_image(page: PageModel):
    found = find_images(page, *query_parts("a red one"), top=100)
    assert sorted(len(result.duplicates) for result in found.results) == [0, 0, 0, 0, 0, 1]
    like = find_like(page, found.results[2])
    assert like.results[0].id == found.results[2].id
    assert like.results[0].score == pytest.approx(1, abs=1e-3)
    assert like.title == f"more like {name_of(found.results[2])}"


def test_results_end_where_images_no_longer_fit(page: PageModel, monkeypatch: pytest.MonkeyPatch):
    given: list[object] = []
    assert page.index is not None
    monkeypatch.setattr(page.index, "search", lambda parts, top, cutoff: given.append(cutoff) or [])
    for only_fitting in (True, False):
        assert find_images(page, *query_parts("a"), only_fitting=only_fitting).results == []
    assert given == ["auto", None]


def test_as_many_results_as_a_page_shows(page: PageModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_queries, "MOST_RESULTS", 2)
    assert len(find_images(page, *query_parts("a"), top=50).results) == 2
    assert len(find_images(page, *query_parts("a"), top=-5).results) == 1


def test_page_without_an_index(page: PageModel):
    with pytest.raises(PageError, match="^This page has no index to search: start it with --index.$"):
        find_images(PageModel(page.model, page.processor, "small"), *query_parts("a"))


def test_index_without_images(page: PageModel, tmp_path: Path):
    from hf_clip.search.image_index import ImageIndex

    empty = ImageIndex.open(tmp_path / "empty", model=page.model, processor=page.processor)
    with pytest.raises(PageError, match="has no images yet: `hf-clip index FOLDER` adds some.$"):
        find_images(PageModel(page.model, page.processor, "small", empty), *query_parts("a"))


def test_large_copy_is_of_the_file_or_the_thumbnail(page: PageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    result = find_images(page, *query_parts("a red one"), top=1).results[0]
    assert Image.open(BytesIO(large_copy(result))).size == (240, 160)
    assert large_copy(replace(result, path="data:train#3")) == result.thumbnail
    (tmp_path / "now-text.png").write_text("")
    assert large_copy(replace(result, path=str(tmp_path / "now-text.png"))) == result.thumbnail
    monkeypatch.setattr(page_queries, "MOST_PIXELS", 100)
    assert large_copy(result) == result.thumbnail


@pytest.fixture
def own_page(page: PageModel, tmp_path: Path) -> PageModel:
    """A page with an index of its own, of no images yet."""
    return PageModel(page.model, page.processor, "small", index_in(tmp_path / "index", page))


def index_in(folder: Path, page: PageModel, *seeds: int) -> ImageIndex:
    """An index, as another process makes or updates it."""
    photos = folder.with_name(f"photos-{'-'.join(map(str, seeds))}")
    photos.mkdir()
    for seed in seeds:
        make_image(seed).save(photos / f"photo-{seed}.png")
    found = ImageIndex.open(folder, model=page.model, processor=page.processor)
    if seeds:
        found.add(photos)
    return found


def names_of(found: Found) -> list[str]:
    return sorted(name_of(result) for result in found.results)


def test_what_is_added_to_the_index_is_found(own_page: PageModel, tmp_path: Path):
    with pytest.raises(PageError, match="has no images yet"):
        find_images(own_page, *query_parts("a"))
    index_in(tmp_path / "index", own_page, 1)
    assert names_of(find_images(own_page, *query_parts("a"))) == ["photo-1.png"]
    index_in(tmp_path / "index", own_page, 2, 3)
    assert names_of(find_images(own_page, *query_parts("a"))) == ["photo-1.png", "photo-2.png", "photo-3.png"]


def test_index_that_goes_and_is_made_anew(own_page: PageModel, tmp_path: Path):
    index_in(tmp_path / "index", own_page, 1)
    known = find_images(own_page, *query_parts("a")).results[0]
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(SearchIndexError, match=f"^There is no index at {tmp_path / 'index'}: "):
        find_images(own_page, *query_parts("a"))
    index_in(tmp_path / "index", own_page, 2)
    found = find_images(own_page, *query_parts("a"))
    assert names_of(found) == ["photo-2.png"]
    assert found.results[0].id == known.id
    with pytest.raises(PageError, match="^The index has changed since this search, and the image is no longer there: "):
        find_like(own_page, known)
    assert names_of(find_like(own_page, found.results[0])) == ["photo-2.png"]


def test_index_that_another_model_makes_in_its_place(own_page: PageModel, digits: Path, tmp_path: Path):
    shutil.rmtree(tmp_path / "index")
    ImageIndex.open(tmp_path / "index", model=digits / "resnet")
    with pytest.raises(SearchIndexError, match="was made of another model"):
        find_images(own_page, *query_parts("a"))
