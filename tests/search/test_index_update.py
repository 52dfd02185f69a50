"""An index follows its folder: what is unchanged is not opened, what was moved is not encoded, what is gone goes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from hf_clip import encode_images
from hf_clip.commands.program import main
from hf_clip.model.open_image import open_image
from hf_clip.search import index_encoding, indexed_image
from hf_clip.search.folder_scan import scan_folder
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import IndexTables, SearchIndexError
from hf_clip.search.index_writer import only_writer
from hf_clip.search.indexed_image import full_size
from hf_clip.search.unchanged_folders import UnchangedFolders

from .conftest import make_image

pytestmark = pytest.mark.usefixtures("hour_later")

NAMES = ["a.png", "b.jpg", "c.webp", "inner/d.jpg", "inner/e.png", "inner/f.jpg"]
NewIndex = Callable[..., ImageIndex]


def paths_of(index: ImageIndex) -> dict[str, dict[str, Any]]:
    columns = ["id", "path", "content", "size", "mtime_ns", "width", "height", "embedding"]
    return {row["path"]: row for row in index.tables.rows(columns).to_pylist()}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Contents of images that were opened and encoded."""
    found: list[bytes] = []
    prepare = indexed_image.prepare

    def counting(content: bytes, *args: Any) -> Any:
        found.append(content)
        return prepare(content, *args)

    monkeypatch.setattr(index_encoding, "prepare", counting)
    return found


def test_rows_are_those_of_the_images(photos: Path, new_index: NewIndex, small_model: tuple[Any, Any, str]):
    index = new_index()
    changes = index.add(photos)
    assert (changes.added, changes.unchanged, changes.removed) == (6, 0, 0)
    assert list(changes.problems) == [str(photos / "broken.png")]
    rows = paths_of(index)
    assert list(rows) == [str(photos / name) for name in NAMES]
    assert [row["id"] for row in rows.values()] == [1, 2, 3, 4, 5, 6]
    expected = encode_images(*small_model[:2], [photos / name for name in NAMES])
    found = torch.from_numpy(np.array([row["embedding"] for row in rows.values()], dtype=np.float32))
    assert (found - expected).abs().max() < 1e-3  # float16
    assert {(row["width"], row["height"]) for row in rows.values()} == {(60, 40)}
    for name, row in zip(NAMES, rows.values(), strict=True):
        state = (photos / name).stat()
        assert (row["size"], row["mtime_ns"]) == (state.st_size, state.st_mtime_ns)
        assert row["content"] == indexed_image.content_hash((photos / name).read_bytes())


def test_unchanged_files_are_not_opened(
    photos: Path, new_index: NewIndex, opened: list[bytes], monkeypatch: pytest.MonkeyPatch
):
    new_index().add(photos)
    del opened[:]
    monkeypatch.setattr("hf_clip.search.index_update.file_hash", lambda path: pytest.fail("it was read"))
    changes = new_index().add(photos)
    assert (changes.unchanged, changes.added, len(opened)) == (6, 0, 0)
    assert len(changes.problems) == 1  # is still told


def test_what_was_moved_copied_or_touched_is_not_encoded(photos: Path, new_index: NewIndex, opened: list[bytes]):
    index = new_index()
    index.add(photos)
    before = paths_of(index)
    del opened[:]
    (photos / "a.png").rename(photos / "inner/renamed.png")
    shutil.copy(photos / "b.jpg", photos / "copy.jpg")
    os.utime(photos / "c.webp", ns=(1, 1))
    changes = index.add(photos)
    assert (changes.moved, changes.unchanged, changes.added, changes.updated, changes.removed) == (3, 4, 0, 0, 0)
    assert opened == []
    rows = paths_of(index)
    assert rows[str(photos / "inner/renamed.png")]["id"] == before[str(photos / "a.png")]["id"]
    assert rows[str(photos / "copy.jpg")]["embedding"] == before[str(photos / "b.jpg")]["embedding"]
    assert rows[str(photos / "copy.jpg")]["id"] == 7
    assert rows[str(photos / "c.webp")] == before[str(photos / "c.webp")] | {"mtime_ns": 1}
    assert str(photos / "a.png") not in rows
    assert index.add(photos).unchanged == 7


def test_moved_folder_is_known_again(photos: Path, new_index: NewIndex, opened: list[bytes]):
    index = new_index()
    index.add(photos)
    del opened[:]
    moved = photos.rename(photos.parent / "elsewhere")
    before = sorted(row["id"] for row in paths_of(index).values())
    assert index.add(moved).moved == 6
    rows = paths_of(index)
    assert list(rows) == [str(moved / name) for name in NAMES]
    assert sorted(row["id"] for row in rows.values()) == before
    assert len(opened) == 1  # the broken one, of which nothing is known


def test_what_was_written_anew_is_encoded_again(photos: Path, new_index: NewIndex, opened: list[bytes]):
    index = new_index()
    index.add(photos)
    before = paths_of(index)
    del opened[:]
    make_image(50, (30, 80)).save(photos / "a.png")
    changes = index.add(photos)
    assert (changes.updated, changes.added, changes.unchanged, len(opened)) == (1, 0, 5, 1)
    row = paths_of(index)[str(photos / "a.png")]
    assert (row["id"], row["width"], row["height"]) == (before[str(photos / "a.png")]["id"], 30, 80)
    assert row["embedding"] != before[str(photos / "a.png")]["embedding"]


def test_what_is_gone_goes_or_is_kept(photos: Path, new_index: NewIndex):
    index = new_index()
    index.add(photos)
    (photos / "a.png").unlink()
    assert (index.add(photos, keep_missing=True).kept, len(index)) == (1, 6)
    assert (index.add(photos).removed, len(index)) == (1, 5)


def test_other_folders_are_left_alone(photos: Path, new_index: NewIndex):
    index = new_index()
    other = photos.parent / "photos of others"  # whose name begins with that of the first
    other.mkdir()
    make_image(30).save(other / "g.png")
    index.add(photos)
    index.add(other)
    assert len(index) == 7
    (photos / "a.png").unlink()
    index.add(photos)
    assert str(other / "g.png") in paths_of(index)


def test_folder_that_cannot_be_read_keeps_its_images(
    photos: Path, new_index: NewIndex, monkeypatch: pytest.MonkeyPatch
):
    index = new_index()
    index.add(photos)
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    changes = index.add(photos)
    assert (changes.removed, changes.unchanged, len(index)) == (0, 3, 6)
    assert changes.problems[str(photos / "inner")] == "Permission denied"


def test_folder_without_images_empties_nothing(photos: Path, new_index: NewIndex):
    index = new_index()
    index.add(photos)
    for path in photos.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no images.* The 6 images of it that the index has stay there"):
        index.add(photos)
    assert len(index) == 6


def test_broken_file_that_is_mended_comes_in(photos: Path, new_index: NewIndex):
    index = new_index()
    index.add(photos)
    shutil.copy(photos / "inner/d.jpg", photos / "broken.png")
    changes = index.add(photos)
    assert (changes.added + changes.moved, changes.problems) == (1, {})
    assert index.add(photos).problems == {}


def test_file_that_could_not_be_read_comes_in_when_it_can(
    photos: Path, new_index: NewIndex, monkeypatch: pytest.MonkeyPatch
):
    """Permissions and networks change without the file's size and time."""
    is_denied, read = True, Path.read_bytes

    def check(path: Any) -> None:
        if is_denied and str(path) == str(photos / "a.png"):
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", lambda path: (check(path), read(path))[1])
    monkeypatch.setattr(indexed_image, "open", lambda *given: (check(given[0]), open(*given))[1], raising=False)  # noqa: SIM115
    index = new_index()
    for problems in range(1, 3):
        changes = index.add(photos)
        assert changes.problems[str(photos / "a.png")] == "Permission denied"
        assert (len(index), changes.unread, len(changes.problems)) == (5, 1, 2), problems
        assert UnchangedFolders.read(index.tables.place).changes(scan_folder(photos)) is None
    is_denied = False
    changes = index.add(photos)
    assert (changes.added, changes.unread, list(changes.problems)) == (1, 0, [str(photos / "broken.png")])
    assert len(index) == 6
    assert index.add(photos).unchanged == 6


def test_file_that_breaks_goes_out(photos: Path, new_index: NewIndex):
    index = new_index()
    index.add(photos)
    (photos / "a.png").write_bytes(b"no image at all")
    changes = index.add(photos)
    assert len(changes.problems) == 2
    assert len(index) == 5
    assert "cannot identify image file" in changes.problems[str(photos / "a.png")]


def test_names_that_are_no_utf8(photos: Path, new_index: NewIndex):
    name = os.fsencode(photos) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        make_image(9).save(file, "PNG")
    index = new_index()
    assert index.add(photos).added == 7
    assert index.add(photos).unchanged == 7
    assert str(photos / "caf\N{REPLACEMENT CHARACTER}.png") in paths_of(index)
    found = index.search(os.fsdecode(name), top=1)[0]
    assert os.fsencode(found.path) == name


def test_formats_of_phones_and_animations(tmp_path: Path, new_index: NewIndex):
    """HEIC and AVIF, upright by their orientation; the first frame of an animation; a bomb is a problem."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    folder = tmp_path / "phone"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    make_image(1, (64, 48)).save(folder / "a.heic")
    make_image(2, (64, 48)).save(folder / "b.avif")
    make_image(3, (64, 48)).save(folder / "c.jpg", exif=exif)
    make_image(4, (64, 48)).save(folder / "d.gif", save_all=True, append_images=[make_image(5, (64, 48))])
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    index = new_index()
    changes = index.add(folder)
    assert {Path(path).name: (row["width"], row["height"]) for path, row in paths_of(index).items()} == {
        "a.heic": (64, 48),
        "b.avif": (64, 48),
        "c.jpg": (48, 64),
        "d.gif": (64, 48),
    }
    assert list(changes.problems) == [str(folder / "bomb.png")]
    assert index.search(str(folder / "a.heic"), top=1)[0].path == str(folder / "a.heic")


def test_large_jpeg_is_drafted_and_keeps_its_size(
    tmp_path: Path, new_index: NewIndex, small_model: tuple[Any, Any, str]
):
    folder = tmp_path / "large"
    folder.mkdir()
    make_image(1, (900, 700)).save(folder / "a.jpg", quality=95)
    index = new_index()
    index.add(folder)
    (row,) = paths_of(index).values()
    assert (row["width"], row["height"]) == (900, 700)
    exact = encode_images(*small_model[:2], folder / "a.jpg")[0]
    assert torch.tensor(row["embedding"]).float() @ exact > 0.999


def test_exact_run_decodes_in_full_what_the_index_has_as_drafts(
    tmp_path: Path, new_index: NewIndex, small_model: tuple[Any, Any, str], capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "large"
    folder.mkdir()
    make_image(1, (900, 700)).save(folder / "a.jpg", quality=95)
    make_image(2, (900, 700)).save(folder / "b.png")
    make_image(3, (40, 30)).save(folder / "small.jpg")
    index = new_index()
    index.add(folder)
    draft = paths_of(index)[str(folder / "a.jpg")]
    expected = encode_images(*small_model[:2], folder / "a.jpg")[0].half()
    assert not torch.equal(torch.tensor(draft["embedding"]).half(), expected)

    changes = index.add(folder, exact=True)
    assert (changes.updated, changes.unchanged) == (1, 2)
    row = paths_of(index)[str(folder / "a.jpg")]
    assert row["id"] == draft["id"]
    assert torch.tensor(row["embedding"]).half().tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert row["embedding"] != draft["embedding"]
    assert index.add(folder, exact=True).describe() == "3 unchanged"
    assert index.add(folder).describe() == "3 unchanged"  # and what is exact stays so
    assert paths_of(index)[str(folder / "a.jpg")]["embedding"] == row["embedding"]

    make_image(4, (900, 700)).save(folder / "new.jpg", quality=95)
    assert index.add(folder).added == 1
    assert main(["index", str(folder), "--exact", "--into", str(index.tables.place)]) == 0
    assert "2 updated, 2 unchanged" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(1000, 999), (999, 1000), (1000, 1000), (900, 700)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_size_of_a_draft_is_that_of_the_upright_image(size: tuple[int, int], orientation: int, tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    make_image(1, size).save(tmp_path / "a.jpg", exif=exif)
    draft = open_image(tmp_path / "a.jpg", draft=24)
    assert draft.width < 300
    assert full_size((tmp_path / "a.jpg").read_bytes(), draft) == open_image(tmp_path / "a.jpg").size


def test_links_in_a_circle_end(photos: Path, new_index: NewIndex):
    (photos / "inner/again").symlink_to(photos)
    (photos / "link.png").symlink_to(photos / "a.png")
    assert new_index().add(photos).added == 7


def test_an_index_of_another_model_is_refused_by_name(
    photos: Path, new_index: NewIndex, repositories: dict[str, Path], tmp_path: Path, small_model: tuple[Any, Any, str]
):
    ImageIndex.open(tmp_path / "index", model=small_model[2]).add(photos)
    with pytest.raises(
        SearchIndexError, match=rf"made of another model \({small_model[2]}\) than {repositories['vit']}"
    ):
        ImageIndex.open(tmp_path / "index", model=repositories["vit"])
    processor = type(small_model[1]).from_pretrained(small_model[2])
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(SearchIndexError, match=r"other settings of the image processor \(image_mean\)"):
        ImageIndex.open(tmp_path / "index", model=small_model[0], processor=processor)


def test_two_writers(photos: Path, new_index: NewIndex, tmp_path: Path):
    index = new_index()
    with only_writer(str(tmp_path / "index")), pytest.raises(SearchIndexError, match="Another process is writing"):
        index.add(photos)


def test_what_is_no_index(tmp_path: Path, photos: Path, small_model: tuple[Any, Any, str]):
    with pytest.raises(SearchIndexError, match=r"There is no index at .*nothing: make one with `hf-clip index"):
        IndexTables.open(str(tmp_path / "nothing"))
    with pytest.raises(SearchIndexError, match="holds other files, and no index"):
        ImageIndex.open(photos, model=small_model[0], processor=small_model[1])
    with pytest.raises(SearchIndexError, match=r"notes\.txt is a file, but an index is a folder"):
        IndexTables.open(str(photos / "notes.txt"))


def test_index_of_another_version(photos: Path, new_index: NewIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    new_index().add(photos)
    monkeypatch.setattr("hf_clip.search.index_table.FORMAT", 2)
    with pytest.raises(SearchIndexError, match="has layout 1, and this version reads layout 2"):
        new_index()


def test_optimized_model_gives_the_same_embeddings(
    photos: Path, tmp_path: Path, new_index: NewIndex, small_model: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hf_clip.search.updatable_index.OPTIMIZED_FROM", 6)
    plain = new_index("plain")
    plain.add(photos)
    assert plain.model.optimizations is None, "a model that was passed is its owner's"
    index = ImageIndex.open(tmp_path / "optimized", model=small_model[2])
    index.add(photos)
    assert index.model.optimizations is not None
    assert index.tables.description == plain.tables.description
    expected, found = paths_of(plain), paths_of(index)
    for path, row in expected.items():
        assert row["embedding"] == pytest.approx(
            found[path]["embedding"], abs=1e-3
        )  # float16 rounds to 2.4e-4 near 0.5
    make_image(70).save(photos / "new.png")
    assert ImageIndex.open(tmp_path / "optimized", model=index.model, processor=index.processor).add(photos).added == 1


def test_dtype_to_compute_in_leaves_the_index_the_same(
    photos: Path, tmp_path: Path, new_index: NewIndex, small_model: Any
):
    plain = new_index("plain")
    plain.add(photos)
    index = ImageIndex.open(tmp_path / "bfloat16", model=small_model[2], dtype="bfloat16")
    index.add(photos)
    assert index.model.dtype == torch.bfloat16
    assert index.tables.description == plain.tables.description
    expected, found = paths_of(plain), paths_of(index)
    assert expected.keys() == found.keys()
    cosines = [float(np.dot(np.float32(expected[p]["embedding"]), np.float32(found[p]["embedding"]))) for p in expected]
    assert min(cosines) > 0.999
    assert any(expected[path]["embedding"] != found[path]["embedding"] for path in expected), "it computed in float32"
    again = ImageIndex.open(tmp_path / "bfloat16", model=small_model[2])
    assert again.add(photos).unchanged == len(expected)
    assert again.model.dtype == torch.float32
