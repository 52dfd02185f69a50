"""Whatever kills an update, the index holds whole commits, and the next run ends where an uninterrupted one does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_clip.search import index_encoding
from hf_clip.search.image_index import ImageIndex

from .conftest import make_image
from .test_index_update import paths_of

PROGRAM = """
import sys
from hf_clip.search import index_encoding
from hf_clip.search.image_index import ImageIndex
index_encoding.COMMIT_AT = 4
print("ready", flush=True)
ImageIndex.open(sys.argv[1], model=sys.argv[2]).add(sys.argv[3], batch_size=2, threads=1)
"""


def check_equal(found: ImageIndex, expected: ImageIndex) -> None:
    """Rows are equal; embeddings up to the rounding of float16, since batches were cut elsewhere."""
    found_rows, expected_rows = paths_of(found), paths_of(expected)
    for path, row in found_rows.items():
        assert row.pop("embedding") == pytest.approx(expected_rows[path].pop("embedding"), abs=1e-3)
    assert found_rows == expected_rows


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        make_image(number).save(folder / f"{number:02}.png")
    return folder


def test_commits_are_whole_at_every_point(
    many: Path, new_index: Callable[..., ImageIndex], monkeypatch: pytest.MonkeyPatch
):
    """An error at each commit in turn, which loses that commit alone."""
    monkeypatch.setattr(index_encoding, "COMMIT_AT", 4)
    expected = new_index("whole")
    expected.add(many)
    index = new_index()
    add, written = index.tables.add, 0

    def failing(rows: list[Any]) -> None:
        nonlocal written
        if written >= limit:
            raise KeyboardInterrupt
        add(rows)
        written += bool(rows)

    monkeypatch.setattr(index.tables, "add", failing)
    for limit in range(1, 10):
        with pytest.raises(KeyboardInterrupt):
            index.add(many, batch_size=2)
        assert len(index) == 4 * limit
    limit = 1000
    index.add(many, batch_size=2)
    check_equal(index, expected)


def test_ctrl_c_ends_at_a_batch(many: Path, new_index: Callable[..., ImageIndex], monkeypatch: pytest.MonkeyPatch):
    """What was encoded is written, and the next run encodes the rest only."""
    encode, calls = index_encoding.encode_pixels, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(*arguments)

    index = new_index()
    with monkeypatch.context() as patch:
        patch.setattr(index_encoding, "encode_pixels", interrupted)
        with pytest.raises(KeyboardInterrupt, match="interrupted after 6 images, which are indexed; the same command"):
            index.add(many, batch_size=2)
    assert (calls, len(index)) == (3, 6)
    assert index.add(many, batch_size=2).describe() == "34 added, 6 unchanged"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_file_that_broke_leaves_the_index_after_an_interruption(
    photos: Path, new_index: Callable[..., ImageIndex], monkeypatch: pytest.MonkeyPatch
):
    """It was noted that the file cannot be opened, and the run ended before its row was removed."""
    index = new_index()
    index.add(photos)
    (photos / "a.png").write_bytes(b"none")

    def end(ids: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index.tables, "remove", end)
        with pytest.raises(KeyboardInterrupt):
            index.add(photos)
    assert str(photos / "a.png") in index.add(photos).problems
    assert str(photos / "a.png") not in paths_of(index)


@pytest.mark.slow
def test_twenty_kills(many: Path, tmp_path: Path, new_index: Callable[..., ImageIndex], small_model: Any):
    expected = new_index("whole")
    expected.add(many)
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "killed"), small_model[2], str(many)]
    kept = 0
    for kill in range(20):
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.02 + 0.03 * (kill % 10))
            process.send_signal(signal.SIGKILL)
        if (tmp_path / "killed" / "images.lance").exists():
            count = len(ImageIndex.open(tmp_path / "killed"))
            assert count >= kept
            assert count % 4 == 0
            kept = count
    subprocess.run(words, check=True)
    check_equal(ImageIndex.open(tmp_path / "killed"), expected)
