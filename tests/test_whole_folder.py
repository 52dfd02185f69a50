"""Folders appear whole or not at all."""

import os
import tempfile
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
        (folder / "b.txt").touch(mode=0o600)
    (tmp_path / "ordinary").mkdir()
    (tmp_path / "ordinary.txt").touch()
    for made, ordinary in [("out", "ordinary"), ("out/a.txt", "ordinary.txt"), ("out/b.txt", "ordinary.txt")]:
        assert (tmp_path / made).stat().st_mode == (tmp_path / ordinary).stat().st_mode


def test_symbolic_link_to_a_folder_is_followed(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    with whole_folder(tmp_path / "link") as folder:
        (folder / "a.txt").write_text("a")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["a.txt"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="another file system is needed")
def test_folder_on_another_file_system_is_filled(tmp_path: Path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        (tmp_path / "link").symlink_to(other)
        (Path(other) / "a.txt").write_text("old")
        with whole_folder(tmp_path / "link") as folder:
            (folder / "a.txt").write_text("new")
        assert {path.name: path.read_text() for path in Path(other).iterdir()} == {"a.txt": "new"}


def test_failed_last_step_puts_the_old_files_back_and_keeps_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.txt", "b.txt"):
        (out / name).write_text("old")
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target) == out / "b.txt" and "unfinished" in str(source):
            raise OSError("Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with (
        pytest.raises(OSError, match="could not be moved to .*out .*; they are in") as caught,
        whole_folder(out) as folder,
    ):
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text("new")
    assert {name: (out / name).read_text() for name in ("a.txt", "b.txt")} == {"a.txt": "old", "b.txt": "old"}
    kept = Path(str(caught.value).rpartition("they are in ")[2].rstrip("."))
    assert {path.name: path.read_text() for path in kept.iterdir()} == {"a.txt": "new", "b.txt": "new"}


def test_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PermissionError, match="file is no folder that you may write to"):
        check_destination(tmp_path / "file" / "deep")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a file system that takes no files is needed")
def test_file_system_that_takes_no_files_is_refused_before_any_work():
    with pytest.raises(PermissionError, match="/proc/out cannot be written: /proc takes no files \\(No such file"):
        check_destination("/proc/out")
