"""Whoever searches while an index is written sees whole commits, and no error."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_clip.search import index_encoding, index_table
from hf_clip.search.image_index import ImageIndex

from ..waiting import LONGEST_WAIT
from .conftest import make_image
from .test_interrupted_update import PROGRAM

TEXT = "a blue three on yellow paper"


def make_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        make_image(number).save(folder / f"{number:03}.png")
    return folder


def search_until(
    reader: ImageIndex, is_done: Callable[[], bool], advance: Callable[[], object] = lambda: None
) -> list[int]:
    """Search again and again, and once more after the end. Returns how many images each search found."""
    found = []
    going = True
    while going:
        going = not is_done()
        results = reader.search(TEXT, top=1000, folded=False)
        assert len({result.path for result in results}) == len(results)
        assert all(result.thumbnail for result in results)
        found.append(len(results))
        advance()
    return found


def test_searches_see_whole_commits(
    tmp_path: Path, new_index: Callable[..., ImageIndex], monkeypatch: pytest.MonkeyPatch
):
    """Rows are added, replaced and removed, and pieces are joined, while another searches."""
    monkeypatch.setattr(index_encoding, "COMMIT_AT", 4)
    monkeypatch.setattr(index_table, "COMMITS_KEPT_APART", 3)
    folder = make_folder(tmp_path / "many", 40)
    writer, reader = new_index(), new_index()
    errors: list[BaseException] = []
    searched, add = threading.Semaphore(0), writer.tables.add

    def add_and_wait(rows: list[Any]) -> None:
        """After each commit a search ends, so that what it shows is seen."""
        add(rows)
        if rows:
            while searched.acquire(blocking=False):
                pass
            assert searched.acquire(timeout=LONGEST_WAIT)
            assert searched.acquire(timeout=LONGEST_WAIT)  # the first may have begun before the commit

    monkeypatch.setattr(writer.tables, "add", add_and_wait)

    def write() -> None:
        try:
            writer.add(folder, batch_size=2, threads=1)
            for number in range(0, 40, 2):
                make_image(1000 + number).save(folder / f"{number:03}.png")
            writer.add(folder, batch_size=2, threads=1)
            for number in range(20):
                (folder / f"{number:03}.png").unlink()
            writer.add(folder)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    found = search_until(reader, lambda: not thread.is_alive(), searched.release)
    thread.join()
    assert errors == []
    assert found[-1] == 20
    assert all(count % 4 == 0 for count in found)
    assert set(found) >= {*range(4, 44, 4)}


@pytest.mark.slow
def test_another_process_writes(tmp_path: Path, new_index: Callable[..., ImageIndex], small_model: Any):
    folder = make_folder(tmp_path / "many", 60)
    ImageIndex.open(tmp_path / "index", model=small_model[2])
    reader = ImageIndex.open(tmp_path / "index", model=small_model[0], processor=small_model[1])
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "index"), small_model[2], str(folder)]
    with subprocess.Popen(words) as process:
        found = search_until(reader, lambda: process.poll() is not None)
    assert process.returncode == 0
    assert found == sorted(found)
    assert found[-1] == 60
    assert all(count % 4 == 0 for count in found)
    assert len(set(found)) > 5
