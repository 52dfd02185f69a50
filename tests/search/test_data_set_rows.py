"""Data sets in an index: rows with captions and columns, kept up to date."""

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from hf_clip.commands.program import main
from hf_clip.search.image_index import ImageIndex

from .conftest import make_image
from .test_index_update import opened  # noqa: F401


def png(seed: int) -> bytes:
    file = BytesIO()
    make_image(seed).save(file, "PNG")
    return file.getvalue()


def save(folder: Path, seeds: list[int], broken: int | None = None) -> str:
    contents = [png(seed) if number != broken else b"no image" for number, seed in enumerate(seeds)]
    rows = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "caption": [f"image {seed}" for seed in seeds],
        "kind": [seed % 2 for seed in seeds],
        "year": [2000 + seed for seed in seeds],
    }
    features = Features(
        {"image": ImageFeature(), "caption": Value("string"), "kind": ClassLabel(names=["even", "odd"])}
        | {"year": Value("int32")}
    )
    Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return str(folder)


def test_rows_come_with_captions_and_columns(tmp_path: Path, new_index: Callable[..., ImageIndex]):
    source = save(tmp_path / "data", [1, 2, 3], broken=1)
    index = new_index()
    changes = index.add_data_set(source)
    assert (changes.added, list(changes.problems)) == (2, [f"{source}#1"])
    assert changes.problems[f"{source}#1"].startswith("cannot be opened (cannot identify image file")
    assert "replace it" not in changes.problems[f"{source}#1"]
    found = index.search(str(save_image(tmp_path, 3)), top=1)[0]
    assert (found.path, found.caption) == (f"{source}#2", "image 3")
    assert json.loads(found.metadata or "") == {"kind": "odd", "year": 2003}
    assert [result.path for result in index.search("x", where="caption = 'image 1'")] == [f"{source}#0"]


def save_image(folder: Path, seed: int) -> Path:
    path = folder / f"query-{seed}.png"
    path.write_bytes(png(seed))
    return path


def test_only_rows_that_changed_are_encoded(
    tmp_path: Path,
    new_index: Callable[..., ImageIndex],
    opened: list[bytes],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    index = new_index()
    source = save(tmp_path / "data", [1, 2, 3])
    index.add_data_set(source)
    without_model = ImageIndex.open(index.tables.place)
    monkeypatch.setattr(without_model, "load_model", lambda: pytest.fail("the model was loaded"))
    assert without_model.add_data_set(source).unchanged == 3
    save(tmp_path / "data", [1, 9])
    changes = index.add_data_set(source)
    assert (changes.unchanged, changes.updated, changes.removed) == (1, 1, 1)
    assert len(index) == 2
    save(tmp_path / "data", [1, 9, 4])
    assert index.add_data_set(source, keep_missing=True).describe() == "1 added, 2 unchanged"


@pytest.mark.usefixtures("hour_later")
def test_rows_of_files_by_a_pattern_are_not_read_again(
    tmp_path: Path, new_index: Callable[..., ImageIndex], monkeypatch: pytest.MonkeyPatch
):
    from .test_image_rows import save_tars

    index, source = new_index(), save_tars(tmp_path / "tars", [3, 2])
    added = index.add_data_set(source).added
    assert added >= 4
    with monkeypatch.context() as patch:
        patch.setattr("hf_clip.search.data_set_rows.content_hash", lambda content: pytest.fail("it was read"))
        assert index.add_data_set(source).unchanged == added
    os.utime(next((tmp_path / "tars").iterdir()), ns=(0, 0))
    assert index.add_data_set(source).unchanged == added  # compared by hashes


def test_folders_and_data_sets_lie_side_by_side(tmp_path: Path, photos: Path, new_index: Callable[..., ImageIndex]):
    index = new_index()
    index.add(photos)
    index.add_data_set(save(tmp_path / "data", [21, 22]))
    assert (index.add(photos).unchanged, len(index)) == (6, 8)


def test_command(tmp_path: Path, small_model: Any, capsys: pytest.CaptureFixture[str]):
    source = save(tmp_path / "data", [1, 2])
    words = [
        "index",
        source,
        "--model",
        small_model[2],
        "--into",
        str(tmp_path / "index"),
        "--caption-column",
        "caption",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"{source}: 2 added\n")
    assert main([*words[:-1], "colour"]) == 1
    assert "has no column 'colour'; its columns are image, caption, kind, year" in capsys.readouterr().err
