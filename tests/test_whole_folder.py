"""Folders appear whole or not at all."""

from pathlib import Path

import pytest

from hf_clip.whole_folder import check_destination, whole_folder


def test_new_folder_appears_only_at_the_end(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as folder:
        (folder / "a.txt").write_text("a")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a.txt"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_error_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(RuntimeError, match="stop"), whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_same_name_are_replaced_and_others_stay(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("old")
    (out / "b.txt").write_text("mine")
    with whole_folder(out) as folder:
        (folder / "a.txt").write_text("new")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a.txt": "new", "b.txt": "mine"}


def test_destination_that_would_lose_something_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        check_destination(tmp_path / "file")
    with pytest.raises(FileExistsError, match="is not empty"):
        check_destination(tmp_path)
    assert check_destination(tmp_path, overwrite=True) == tmp_path
    (tmp_path / "empty").mkdir()
    assert check_destination(str(tmp_path / "empty")) == tmp_path / "empty"
    assert check_destination(tmp_path / "new") == tmp_path / "new"


def test_folder_has_ordinary_permissions(tmp_path: Path):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
