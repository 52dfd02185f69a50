"""A folder in which nothing has changed: the same result as by comparing, without LanceDB, torch and transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_clip.commands.program import main
from hf_clip.search.folder_scan import scan_folder
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.unchanged_folders import NAME, UnchangedFolders

from .conftest import make_image

pytestmark = pytest.mark.usefixtures("hour_later")

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, os, sys
from hf_clip.commands.program import main
for words in json.loads(os.environ["LINES"]):
    status = main(words)
    print(status, sorted({"torch", "transformers", "lancedb"} & set(sys.modules)), file=sys.stderr)
"""


def known(index: ImageIndex, folder: Path, model: str | None = None) -> Any:
    found = UnchangedFolders.read(index.tables.place)
    return None if found is None else found.changes(scan_folder(folder), model)


def test_what_is_known_equals_what_comparing_finds(photos: Path, new_index: Callable[..., ImageIndex]):
    """After each kind of change."""
    index = new_index()
    (photos / os.fsdecode(b"\xff broken.png")).write_bytes(b"none")

    def rename() -> None:
        (photos / "a.png").rename(photos / "inner" / "moved.png")
        (photos / "copy.jpg").write_bytes((photos / "b.jpg").read_bytes())

    def write_anew() -> None:
        make_image(50).save(photos / "b.jpg")
        make_image(51).save(photos / "broken.png")

    def remove() -> None:
        (photos / "c.webp").unlink()

    for change in (lambda: None, rename, write_anew, remove):
        change()
        assert known(index, photos) is None
        index.add(photos)
        found = known(index, photos)
        assert found == index.add(photos)
        assert found == known(index, photos)
        assert found.problems


def test_what_ends_it(
    photos: Path, tmp_path: Path, new_index: Callable[..., ImageIndex], small_model: tuple[Any, Any, str]
):
    index = new_index()
    index.add(photos)
    index.add(photos / "inner")
    assert known(index, photos) is None, "the tables have another folder now"
    index.add(photos)
    for folder in (photos, photos / "inner"):  # an update without changes leaves what is known of others
        assert known(index, folder, small_model[2]) is not None
        assert known(index, folder, "another/model") is None

    index.tables.remove([1])  # by another process, say
    assert known(index, photos) is None
    index.add(photos)
    os.utime(photos / "a.png", ns=(0, 0))
    assert known(index, photos) is None
    index.add(photos)
    assert known(index, photos) is not None
    assert known(index, photos / "inner") is None, "the tables have changed since"

    (photos / "a.png").rename(tmp_path / "a.png")
    assert index.add(photos, keep_missing=True).kept == 1
    assert known(index, photos) is None, "a run without --keep-missing has something to do"
    index.add(photos)
    (Path(index.tables.place) / NAME).write_text("[]")
    assert known(index, photos) is None


def test_processes_import_what_they_need(
    photos: Path, tmp_path: Path, small_model: tuple[Any, Any, str], capsys: pytest.CaptureFixture[str]
):
    program, place = tmp_path / "hf-clip", str(tmp_path / "index")
    program.write_text(PROGRAM)

    def run(*lines: list[str]) -> tuple[str, list[str]]:
        """Run command lines in one process. Returns what it printed, and the lines of its errors."""
        command = [sys.executable, str(program), *lines[0]]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "LINES": json.dumps(lines)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout, done.stderr.splitlines()

    assert main(["index", str(photos), "--model", small_model[2], "--into", place]) == 2
    capsys.readouterr()
    again = ["index", str(photos), "--into", place]
    expected = f"{photos}: 6 unchanged\n6 images in {place}\n"
    lost = "1 file could not be opened; --errors lists them"
    found = run(again, again[:1] + again[2:], [*again, "--model", small_model[2]])
    assert found == (3 * expected, 3 * [lost, "2 []"])
    (Path(place) / NAME).unlink()
    assert run(again) == (expected, [lost, "2 ['lancedb']"])

    by_id = ["search", "--more-like", "1", "--index", place]
    by_text = ["search", "a blue three", "--index", place]
    out, err = run(by_id)
    assert err == ["0 ['lancedb']"]
    assert " 1  " in out.splitlines()[0]
    both = run(by_text, by_id)  # by a copy
    assert both[1] == 2 * ["0 []"]
    assert both[0].endswith(out)
    assert run([*by_text, "--filter", "width > 0"], by_text)[1] == 2 * ["0 ['lancedb']"]

    (tmp_path / "empty").mkdir()
    nowhere, missing = str(tmp_path / "nowhere"), str(tmp_path / "missing")
    wrong = [
        ["search", "x", "--index", nowhere],
        ["search", "--index", place],
        ["duplicates", "--index", nowhere],
        ["index", missing, "--into", place],
        ["index", str(tmp_path / "empty"), "--into", nowhere, "--model", small_model[2]],
        ["index", str(photos), "--into", nowhere, "--model", missing],
    ]
    out, err = run(*wrong)
    assert out == ""
    assert len(err) == 2 * len(wrong)
    assert all(line.startswith("error: ") for line in err[::2])
    assert set(err[1::2]) == {"1 []"}
    assert not Path(nowhere).exists()
