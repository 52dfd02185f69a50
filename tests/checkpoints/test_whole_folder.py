"""Folders appear whole or not at all."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from hf_clip.checkpoints import whole_folder as whole_folder_module
from hf_clip.checkpoints.whole_folder import DiskFullError, FolderInUseError, check_destination, whole_folder
from hf_clip.model.checked_files import read_unchanged

from ..waiting import LONGEST_WAIT

ALONE = {"PYTHONPATH": str(Path(whole_folder_module.__file__).parent)}
"""The environment of a process that imports this module without the package, which takes seconds."""


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
def test_file_system_that_takes_no_files_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda place, mode: True)  # as for root
    with pytest.raises(PermissionError, match="/proc/out cannot be written: /proc takes no files \\(No such file"):
        check_destination("/proc/out")


# --- several at once -----------------------------------------------------------------------------------------------


def test_second_writer_is_refused_while_the_first_writes(tmp_path: Path):
    out = tmp_path / "out"
    with whole_folder(out) as folder:
        (folder / "a.txt").write_text("first")
        with (
            pytest.raises(FolderInUseError, match="out is in use by another program .*; wait") as caught,
            whole_folder(out),
        ):
            pass
        assert caught.value.folder == out.resolve()
        with whole_folder(tmp_path / "other") as other:
            (other / "b.txt").write_text("b")
    assert (out / "a.txt").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_second_writer_finds_what_the_first_has_written(tmp_path: Path):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("first")
    with pytest.raises(FileExistsError, match="is not empty"), whole_folder(tmp_path / "out", overwrite=False):
        pass


def test_order_of_files_lets_no_reader_see_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While config.json stands there, all files beside it are of one writing, after every single step."""
    out = tmp_path / "out"
    names = ("config.json", "tokenizer.json", "model.safetensors", "merges.txt")
    steps: list[dict[str, str]] = []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        steps.append({path.name: path.read_text() for path in out.iterdir() if path.is_file()})

    for text in ("old", "new"):
        with whole_folder(out) as folder:
            for name in names:
                (folder / name).write_text(text)
            if text == "new":
                monkeypatch.setattr(os, "replace", replace)
    seen = [set(files.values()) for files in steps if "config.json" in files]
    assert len(steps) > 2 * len(names)
    assert seen
    assert all(len(texts) == 1 for texts in seen)


WRITERS = """
import sys, time
from pathlib import Path
from whole_folder import FolderInUseError, whole_folder
out, text, over = *sys.argv[1:3], Path(sys.argv[3])
written, refused = 0, 0
while not over.exists() or not written:
    try:
        with whole_folder(out) as folder:
            for name in ("a.txt", "model.bin", "config.json"):
                (folder / name).write_text(f"{text}-{written}")
            time.sleep(0.01)  # a file's time moves on by ticks of up to that; real models take longer to write
        written += 1
    except FolderInUseError:
        refused += 1
print(written, refused)
"""


def test_readers_beside_two_writers_see_no_mixture(tmp_path: Path):
    out, over = tmp_path / "place" / "out", tmp_path / "over"
    with whole_folder(out) as folder:
        for name in ("a.txt", "model.bin", "config.json"):
            (folder / name).write_text("first")
    (out / "README.md").write_text("mine")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITERS, str(out), text, str(over)],
            env=os.environ | ALONE,
            stdout=subprocess.PIPE,
        )
        for text in ("x", "y")
    ]
    seen: set[str] = set()
    mixtures = []
    end = time.monotonic() + LONGEST_WAIT

    def read_all() -> list[str]:
        return [(out / name).read_text() for name in ("config.json", "a.txt", "model.bin")]

    while (len(seen) < 20 or not {"x", "y"} <= {text[0] for text in seen}) and time.monotonic() < end:
        try:
            texts = read_unchanged(out, read_all)
        except OSError:  # replaced ten times in a row, or between two
            continue
        seen.update(texts)
        mixtures += [texts] if len(set(texts)) > 1 else []
    over.touch()
    results = [[int(count) for count in writer.communicate()[0].split()] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert min(written for written, _ in results) > 0
    assert len(seen) >= 20
    assert mixtures == []
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "a.txt", "config.json", "model.bin"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
import whole_folder
real = os.replace
def replace(source, target):
    real(source, target)
    if os.path.basename(target) == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
with whole_folder.whole_folder(sys.argv[1]) as folder:
    for name in ("a.txt", "model.bin", "config.json"):
        (folder / name).write_text("new")
    if sys.argv[2] == "":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
@pytest.mark.parametrize(("place", "left"), [("", "old"), ("model.bin", "old"), ("config.json", "new")])
def test_what_a_killed_writer_left_is_undone_by_the_next(tmp_path: Path, place: str, left: str):
    """Killed while it wrote, when the first old file had left, and when the last new one had come."""
    out = tmp_path / "out"
    with whole_folder(out) as folder:
        for name in ("a.txt", "model.bin", "config.json"):
            (folder / name).write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), place], env=os.environ | ALONE, check=False)
    assert killed.returncode == -9
    assert any(path.name.startswith(".") for path in (*out.iterdir(), *tmp_path.iterdir()))
    with pytest.raises(RuntimeError, match="stop"), whole_folder(out):
        raise RuntimeError("stop")  # so that what is there now is what was put back
    texts = {path.name: path.read_text() for path in out.iterdir()}
    assert texts.keys() == {"a.txt", "model.bin", "config.json"}
    assert len(set(texts.values())) == 1
    if place != "config.json":
        assert set(texts.values()) == {left}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_others_stay(tmp_path: Path):
    for name in (".other-unfinished-abcdefgh", ".out-unfinished-mine", ".out.notes"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out-unfinished-abcdefgh").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other-unfinished-abcdefgh",
        ".out-unfinished-mine",
        ".out.notes",
        "out",
    ]


def test_file_system_without_locks_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", fail)
    (tmp_path / ".out-unfinished-abcdefgh").mkdir()  # who knows whose
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-unfinished-abcdefgh", "out"]


def test_folder_that_a_process_stands_in_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    before = Path.cwd().stat().st_ino
    with whole_folder(".") as folder:
        (folder / "a.txt").write_text("a")
    assert (Path.cwd() / "a.txt").read_text() == "a"
    assert (tmp_path / "out").stat().st_ino == before


# --- no room -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed: file write failed"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["os", "limit", "torch", "safetensors", "tokenizers"],
)
def test_full_disk_is_one_line_whichever_library_meets_it(tmp_path: Path, error: Exception):
    message = r"No space left for .*out\. Nothing was written\. Make room"  # more seems to be free than is needed
    with pytest.raises(DiskFullError, match=message) as found, whole_folder(tmp_path / "out", needed=7):
        raise error
    assert found.value.needed == 7
    assert found.value.folder == (tmp_path / "out").resolve()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("needed", "free", "said"),
    [
        (7000, 30, ": it needs 7,000 bytes, and 30 are free"),
        (30, 7000, ""),
        (7000, None, ": it needs 7,000 bytes"),
        (None, 3000, ": it needs more than the 3,000 bytes that are free"),
        (None, None, ""),
    ],
)
def test_full_disk_is_told_in_whole_sentences(needed: int | None, free: int | None, said: str):
    assert str(DiskFullError(Path("here/out"), needed, free)) == (
        f"No space left for here/out{said}. Nothing was written. Make room there, or name a folder on another disk."
    )


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path):
    message = "it needs 1,152,921,504,606,846,976 bytes, and"
    with pytest.raises(DiskFullError, match=message), whole_folder(tmp_path / "out", needed=2**60):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []
