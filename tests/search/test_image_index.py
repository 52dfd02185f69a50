"""Searches: the right images in the right order, filtered, folded, and alike from Python and on the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_clip import encode_images, encode_texts
from hf_clip.commands.program import main
from hf_clip.search.exact_scan import EmbeddingMatrix
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import SearchIndexError
from hf_clip.search.indexed_image import perceptual_hash
from hf_clip.search.query import QueryError
from hf_clip.search.set_bits import count_ones

from .conftest import make_image

NAMES = ["a.png", "b.jpg", "c.webp", "inner/d.jpg", "inner/e.png", "inner/f.jpg"]
TEXT = "a blue three on yellow paper"


@pytest.fixture
def index(photos: Path, new_index: Callable[..., ImageIndex]) -> ImageIndex:
    index = new_index()
    index.add(photos)
    return index


def test_order_is_that_of_all_similarities(photos: Path, index: ImageIndex, small_model: tuple[Any, Any, str]):
    model, processor, _ = small_model
    images = encode_images(model, processor, [photos / name for name in NAMES])
    scores = (images @ encode_texts(model, processor, TEXT)[0]).tolist()
    found = index.search(TEXT, folded=False)
    assert [result.path for result in found] == [
        str(photos / name) for _, name in sorted(zip(scores, NAMES, strict=True), reverse=True)
    ]
    assert [result.score for result in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-3)
    assert index.search(TEXT, top=2, folded=False) == found[:2]


def test_images_and_ids_find_themselves(photos: Path, index: ImageIndex):
    assert index.search(str(photos / "c.webp"), top=1)[0].path == str(photos / "c.webp")
    mixed = f'5:{photos / "c.webp"} + "{TEXT}"'
    assert index.search(mixed, top=1)[0].path == str(photos / "c.webp")
    from hf_clip.search.query import parse_queries

    found = index.search(parse_queries([], more_like=[3]), top=1)[0]
    assert (found.id, found.path) == (3, str(photos / "c.webp"))
    assert found.score == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(QueryError, match="no image with the id 99"):
        index.search(parse_queries([], more_like=[99]))


def test_filter(photos: Path, index: ImageIndex):
    found = index.search(TEXT, where="path LIKE '%/inner/%'", folded=False)
    assert sorted(result.path for result in found) == [str(photos / name) for name in NAMES[3:]]
    assert index.search(TEXT, where="width > 1000") == []
    with pytest.raises(SearchIndexError, match=r"The filter 'colour = 3' cannot be used \(.*colour"):
        index.search(TEXT, where="colour = 3")


def test_searcher_sees_what_another_process_added(
    photos: Path, index: ImageIndex, new_index: Callable[..., ImageIndex]
):
    reader = new_index()
    assert len(reader.search(TEXT)) == 6
    make_image(77).save(photos / "new.png")
    index.add(photos)
    assert len(reader.search(TEXT)) == 7


def test_near_duplicates_are_shown_once(photos: Path, index: ImageIndex):
    with Image.open(photos / "a.png") as image:
        image.convert("RGB").save(photos / "small-copy.jpg", quality=90)
    shutil.copy(photos / "a.png", photos / "same.png")
    index.add(photos)
    found = index.search(str(photos / "a.png"), top=3)
    copies = {str(photos / name) for name in ("a.png", "same.png", "small-copy.jpg")}
    assert {found[0].path, *found[0].duplicates} == copies
    assert not copies & {path for result in found[1:] for path in (result.path, *result.duplicates)}
    assert len(found) == 3
    assert len(index.search(str(photos / "a.png"), top=8, folded=False)) == 8
    (group,) = index.duplicates()
    assert {result.path for result in group} == copies


def test_blocks_give_the_same_as_one_product(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(103, 24, generator=generator), dim=1).half()
    matrix = EmbeddingMatrix(torch.arange(103), embeddings)
    queries = torch.randn(2, 24, generator=generator)
    monkeypatch.setattr("hf_clip.search.exact_scan.BLOCK", 10)
    assert torch.allclose(matrix.similarities(queries), queries @ embeddings.float().T, atol=1e-6)


def differing_bits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return count_ones((first ^ second).view(np.uint64))


def test_perceptual_hash_of_copies_and_of_others(photographs: dict[str, Image.Image]):
    images = list(photographs.values())
    hashes = np.array([perceptual_hash(image) for image in images])
    smaller = np.array([perceptual_hash(image.resize((120, 90))) for image in images])
    assert (differing_bits(hashes, smaller) <= 4).all()
    others = differing_bits(hashes[:, None], hashes[None])[~np.eye(len(images), dtype=bool)]
    assert (others > 12).all()
    assert differing_bits(np.array([-1]), np.array([0])).tolist() == [64]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_commands(photos: Path, tmp_path: Path, small_model: tuple[Any, Any, str], capsys: pytest.CaptureFixture[str]):
    place, model = tmp_path / "index", small_model[2]
    status, out, err = run(capsys, "index", photos, "--model", model, "--into", place)
    assert (status, err) == (2, "1 file could not be opened; --errors lists them\n")
    assert out == f"{photos}: 6 added\n6 images in {place}\n"
    status, out, err = run(capsys, "index", "--into", place, "--errors")
    assert out == f"{photos}: 6 unchanged\n6 images in {place}\n"
    assert err.startswith(f"{photos / 'broken.png'}: cannot be opened (")
    status, out, _ = run(capsys, "search", TEXT, "--index", place, "--json", "--top", 2)
    found = json.loads(out)["results"]
    assert (status, len(found)) == (0, 2)
    assert found[0].keys() == {"path", "score", "id", "width", "height", "duplicates"}
    status, out, _ = run(capsys, "search", TEXT, "--index", place, "--top", 2)
    assert out.splitlines() == [f"{row['score']:.4f}  {row['id']}  {row['path']}" for row in found]
    status, _, err = run(capsys, "search", TEXT, "--index", place, "--filter", "width > 1000")
    assert (status, err) == (2, "no image of the index fits\n")
    status, out, _ = run(capsys, "duplicates", "--index", place)
    assert (status, out) == (0, "0 groups, 0 images beside the largest of each\n")


def test_direction_of_another_width_is_refused(index: ImageIndex):
    with pytest.raises(QueryError, match=r"The direction has the shape \(7,\), but the index needs"):
        index.search(torch.zeros(7))


def test_what_a_search_writes(photos: Path, index: ImageIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from hf_clip.search import result_output

    (photos / "a.png").rename(photos / '<b> & "c".png')
    index.add(photos)
    found = index.search(TEXT, folded=False)
    result_output.write_page(tmp_path / "page.html", found, "a <title>\udcff")  # a query that is no UTF-8
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == 6
    assert "<title>a &lt;title&gt;�</title>" in page
    assert "&lt;b&gt; &amp; &quot;c&quot;.png" in page
    result_output.write_sheet(tmp_path / "sheet.png", found)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 168 + 8, 198 + 8)
    assert result_output.copy_results(tmp_path / "copies", found[:2]) == []
    copied = sorted(path.name for path in (tmp_path / "copies").iterdir())
    assert copied == [f"{rank}-{Path(result.path).name}" for rank, result in enumerate(found[:2], start=1)]
    with pytest.raises(ValueError, match=r"name a file ending in \.png, \.jpg or \.webp"):
        result_output.write_sheet(tmp_path / "sheet.txt", found)
    with pytest.raises(NotADirectoryError, match=r"copied into a folder, but .*page\.html is a file: name another"):
        result_output.copy_results(tmp_path / "page.html", found)
    lines = result_output.format_lines(found, links=True)
    assert "file://" in lines[0]
    assert lines[0].count("\x1b]8;;") == 2
    for copies, said in (([], ""), (["b"], "  (+1 near duplicate)"), (["b", "c"], "  (+2 near duplicates)")):
        result = result_output.SearchResult(1, "/a.jpg", 0.5, 1, 1, duplicates=copies)
        assert result_output.format_lines([result], links=False) == [f"0.5000  1  /a.jpg{said}"]


def test_spaces_of_every_width_are_printed_as_they_are():
    """A path must be one that can be copied from the terminal. Names in Japanese have full-width spaces."""
    from hf_clip.search import result_output

    for name in ("写真　2023.jpg", "a\u00a0b.jpg", "a\u202fb.jpg"):
        result = result_output.SearchResult(1, f"/{name}", 0.5, 1, 1)
        assert result_output.format_lines([result], links=False) == [f"0.5000  1  /{name}"]
    for letter in "\n\x1b\u2028\u200b\u202e":
        result = result_output.SearchResult(1, f"/a{letter}b", 0.5, 1, 1)
        assert result_output.format_lines([result], links=False) == ["0.5000  1  /a�b"]


def test_names_on_a_sheet_have_letters_of_the_font(monkeypatch: pytest.MonkeyPatch):
    """Pillow's own font lacks umlauts, which it would draw as boxes."""
    from PIL import ImageFont

    from hf_clip.search.result_output import _drawable, _font

    class EnglishFont:
        def getmask(self, letter: str) -> bytes:
            return letter.encode("ascii", "replace").replace(b"?", b"box")

    assert _drawable("Größe é café 山 1.jpg", EnglishFont()) == "Grosse e cafe ? 1.jpg"
    with_dejavu = SimpleNamespace(getmask=lambda letter: letter.encode() if letter != "\uffff" else b"box")
    assert _drawable("Gro\u0308ße.jpg", with_dejavu) == "Größe.jpg"
    _font.cache_clear()
    monkeypatch.setattr("hf_clip.search.result_output.FONTS", ("no-such-font.ttf",))
    assert _font().getname() == ImageFont.load_default().getname()
    _font.cache_clear()


def test_model_is_loaded_once(
    photos: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """An index that was just made is empty, and not to be opened again."""
    from hf_clip.search import updatable_index

    loaded: list[str] = []
    load = updatable_index.load
    monkeypatch.setattr(updatable_index, "load", lambda name: loaded.append(name) or load(name))
    _, out, _ = run(capsys, "index", photos, "--model", digits / "vit", "--into", tmp_path / "new-index")
    assert "6 added" in out
    assert loaded == [str(digits / "vit")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "x"], "error: There is no index at"),
        (["search"], "error: There is nothing to look for"),
        (["search", "--minus", "x"], "error: The query only subtracts"),
        (["search", "x", "--open"], "error: --open opens the page that --html writes"),
        (["index", "missing-folder"], "error: There is no index at"),
        (["duplicates"], "error: There is no index at"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_CLIP_INDEX", str(tmp_path / "nothing"))
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (tmp_path / "nothing").exists()


def test_folder_that_is_not_there(photos: Path, index: ImageIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder, message in [
        (photos / "a.png", "is a file, but a folder of images is needed"),
        (photos / "x", "There is no folder"),
    ]:
        status, _, err = run(capsys, "index", folder, "--into", tmp_path / "index")
        assert (status, err.count("\n")) == (1, 1)
        assert message in err


def test_tiny_images_are_shown_in_whole_pixels(tmp_path: Path):
    """An image of 16 x 10 pixels becomes one of 160 x 100, on sheets and on pages."""
    from hf_clip.search import result_output
    from hf_clip.search.image_index import SearchResult
    from hf_clip.search.indexed_image import make_thumbnail

    levels = np.full((10, 16, 3), 255, dtype=np.uint8)
    levels[:, 8:] = (200, 0, 0)
    long = "a-very-long-name-of-a-photograph-from-the-north-of-the-island-0042.jpg"
    found = [SearchResult(1, f"/x/{long}", 0.5, 16, 10, thumbnail=make_thumbnail(Image.fromarray(levels)))]
    sheet = np.asarray(result_output.draw_sheet(found)).astype(int)[38:138, 8:168]
    assert abs(sheet - levels.repeat(10, axis=0).repeat(10, axis=1)).max() < 16
    name = result_output._short_name(long, lambda text: 5.0 * len(text))
    assert (len(name), name[:6], name[-8:]) == (32, "a-very", "0042.jpg")
    assert result_output._short_name("a.jpg", lambda text: 5.0 * len(text)) == "a.jpg"
    result_output.write_page(tmp_path / "page.html", found, "tiny")
    assert (
        'class="tiny" style="width: 160px; height: 100px; margin: 30px auto 30px"'
        in (tmp_path / "page.html").read_text()
    )
