"""Files that were written anew, and kept their size and time of writing: found by a hash, which others never cost."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_clip.search import data_set_rows, folder_scan, index_update
from hf_clip.search.folder_scan import SETTLED_AFTER_NS, FileState, scan_folder
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import CTIME
from hf_clip.search.index_update import UNSETTLED
from hf_clip.search.indexed_image import content_hash
from hf_clip.search.unchanged_folders import UnchangedFolders

from .conftest import make_image
from .test_data_set_rows import save
from .test_index_update import paths_of

NewIndex = Callable[..., ImageIndex]
SECOND = 1_000_000_000
NOW = 1_800_000_000 * SECOND


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images of one size and a broken one. Bitmaps of one size in pixels have one size in bytes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(["a.bmp", "b.bmp"]):
        make_image(seed).save(folder / name)
    (folder / "broken.bmp").write_bytes(bytes((folder / "a.bmp").stat().st_size))
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that an update hashes."""
    found: list[str] = []
    file_hash = index_update.file_hash
    monkeypatch.setattr(index_update, "file_hash", lambda path: (found.append(Path(path).name), file_hash(path))[1])
    return found


def write_unseen(path: Path, seed: int) -> None:
    """Write another image of the same size, and set the time of writing back."""
    before = path.stat()
    make_image(seed).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.fixture
def on_fat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that keeps no time of the last change, as FAT: it is the time of writing."""
    of = lambda path, found: FileState(path, found.st_size, found.st_mtime_ns, found.st_mtime_ns)  # noqa: E731
    monkeypatch.setattr(FileState, "of", of)


def is_known(index: ImageIndex, folder: Path) -> bool:
    found = UnchangedFolders.read(index.tables.place)
    return found is not None and found.changes(scan_folder(folder)) is not None


@pytest.mark.usefixtures("on_fat")
def test_file_that_was_written_anew_in_the_same_tick_is_found(folder: Path, new_index: NewIndex):
    index = new_index()
    assert index.add(folder).added == 2
    before = paths_of(index)
    write_unseen(folder / "a.bmp", 7)
    write_unseen(folder / "broken.bmp", 8)
    assert not is_known(index, folder)
    changes = index.add(folder)
    assert (changes.updated, changes.added, changes.unchanged, changes.problems) == (1, 1, 1, {})
    rows = paths_of(index)
    assert rows[str(folder / "a.bmp")]["embedding"] != before[str(folder / "a.bmp")]["embedding"]
    assert rows[str(folder / "b.bmp")] == before[str(folder / "b.bmp")]


def test_file_is_trusted_once_it_was_verified(
    folder: Path, new_index: NewIndex, hashed: list[str], monkeypatch: pytest.MonkeyPatch
):
    index = new_index()
    index.add(folder)
    assert hashed == []
    version = index.tables.images.version
    for _ in range(2):
        assert index.add(folder).describe() == "2 unchanged"
        assert sorted(hashed) == ["a.bmp", "b.bmp"]
        assert index.tables.images.version == version, "nothing is written while it may change unseen"
        assert not is_known(index, folder)
        hashed.clear()
    monkeypatch.setattr(folder_scan, "SETTLED_AFTER_NS", -SECOND)  # as if time had passed
    assert index.add(folder).describe() == "2 unchanged"
    assert sorted(hashed) == ["a.bmp", "b.bmp"]
    stored = index.tables.rows(["path", CTIME]).to_pylist()
    assert {row["path"]: row[CTIME] for row in stored} == {
        str(path): path.stat().st_ctime_ns for path in folder.glob("[ab].bmp")
    }
    hashed.clear()
    assert index.add(folder).describe() == "2 unchanged"
    assert hashed == []
    assert is_known(index, folder)


@pytest.mark.usefixtures("hour_later")
def test_time_of_writing_that_was_set_back_hides_nothing(folder: Path, new_index: NewIndex, hashed: list[str]):
    """As `cp -p` and `touch -r` do."""
    index = new_index()
    index.add(folder)
    assert is_known(index, folder)
    write_unseen(folder / "a.bmp", 7)
    write_unseen(folder / "broken.bmp", 8)
    assert not is_known(index, folder)
    assert index.add(folder).describe() == "1 added, 1 updated, 1 unchanged"
    assert "b.bmp" not in hashed


@pytest.mark.usefixtures("hour_later")
def test_other_changes_of_a_file_cost_one_hash(
    folder: Path, new_index: NewIndex, hashed: list[str], monkeypatch: pytest.MonkeyPatch
):
    index = new_index()
    index.add(folder)
    (folder / "a.bmp").chmod(0o600)
    assert index.add(folder).describe() == "2 unchanged"
    assert hashed == ["a.bmp"]
    assert index.add(folder).describe() == "2 unchanged"
    assert hashed == ["a.bmp"]

    def refuse(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    (folder / "b.bmp").chmod(0o600)
    with monkeypatch.context() as patch:
        patch.setattr(index_update, "file_hash", refuse)
        changes = index.add(folder)
        assert (changes.unchanged, changes.unread, len(index)) == (2, 1, 2), "what cannot be read stays"
        assert not is_known(index, folder)
    assert index.add(folder).describe() == "2 unchanged"
    assert hashed == ["a.bmp", "b.bmp"]
    assert is_known(index, folder)


@pytest.mark.parametrize(
    ("mtime", "ctime", "expected"),
    [
        (-3600, -3600, False),
        (-3.5, -3.5, False),
        (-2.9, -2.9, True),
        (0, 0, True),
        (-3600, -1, True),  # `cp -p`
        (3600, -3600, False),  # a camera whose clock is wrong, and `touch -d`
        (3600, -1, True),
        (3600, 3600, True),  # a server whose clock is ahead, or FAT of a machine in another zone
        (90_000, 90_000, False),  # FAT of a camera whose clock is wrong, which the next run must not hash again
        (-3600, 90_000, False),  # as it was before this machine's clock was set right
        (90_000, -1, True),
        (2, 2, True),
        (0, -3600, True),  # a file system that does not keep it
    ],
)
def test_which_files_may_change_unseen(mtime: float, ctime: float, expected: bool):
    state = FileState("a.png", 1, NOW + int(mtime * SECOND), NOW + int(ctime * SECOND))
    assert SETTLED_AFTER_NS == 3 * SECOND
    assert state.may_change_unseen(NOW) == expected


@pytest.mark.usefixtures("hour_later")
def test_index_of_an_earlier_version_has_no_such_column_and_gets_it_with_the_first_row(
    folder: Path, new_index: NewIndex, hashed: list[str]
):
    index = new_index()
    index.add(folder)
    for table in (index.tables.images, index.tables.problems):
        table.drop_columns([CTIME])
    index, before = new_index(), paths_of(new_index())
    version = index.tables.images.version
    assert index.add(folder).describe() == "2 unchanged"
    assert (hashed, index.tables.images.version) == ([], version), "a file is known by its size and time of writing"
    assert len(index.search("three", folded=False)) == 2

    make_image(30, (20, 20)).save(folder / "c.bmp")
    (folder / "broken.bmp").write_bytes(b"none")
    assert index.add(folder).describe() == "1 added, 2 unchanged"
    stored = {Path(row["path"]).name: row[CTIME] for row in index.tables.rows(["path", CTIME]).to_pylist()}
    assert stored == {"a.bmp": None, "b.bmp": None, "c.bmp": (folder / "c.bmp").stat().st_ctime_ns}
    assert {path: row for path, row in paths_of(index).items() if path in before} == before
    assert index.add(folder).describe() == "3 unchanged"
    assert hashed == []
    os.utime(folder / "a.bmp")
    assert index.add(folder).describe() == "1 moved, 2 unchanged"
    (row,) = index.tables.rows([CTIME], "path LIKE '%a.bmp'").to_pylist()
    assert row[CTIME] == (folder / "a.bmp").stat().st_ctime_ns


def test_mark_of_a_file_that_may_change_unseen(folder: Path, new_index: NewIndex):
    index = new_index()
    index.add(folder)
    assert index.tables.rows([CTIME])[CTIME].to_pylist() == [UNSETTLED, UNSETTLED]
    assert [row[CTIME] for row in index.tables.problem_rows()] == [UNSETTLED]


def test_data_set_that_was_just_written_is_compared_by_hashes(
    tmp_path: Path, new_index: NewIndex, monkeypatch: pytest.MonkeyPatch
):
    index, source = new_index(), save(tmp_path / "data", [1, 2, 3])
    index.add_data_set(source)
    read: list[bytes] = []

    def counting(content: bytes) -> str:
        read.append(content)
        return content_hash(content)

    monkeypatch.setattr(data_set_rows, "content_hash", counting)
    assert index.add_data_set(source).unchanged == 3
    assert len(read) == 3
    monkeypatch.setattr(folder_scan, "SETTLED_AFTER_NS", -SECOND)
    index.add_data_set(source)
    read.clear()
    assert index.add_data_set(source).unchanged == 3
    assert read == []
