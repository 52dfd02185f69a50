"""Rows of folders and data sets, from any place on, and their embeddings."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk

from hf_clip import encode_images
from hf_clip.search import image_rows
from hf_clip.search.image_rows import Position, open_image_rows, rows_from
from hf_clip.search.row_encoding import embed_rows

from .conftest import make_image
from .test_data_set_rows import png, save


def save_tars(folder: Path, counts: list[int]) -> str:
    """Webdataset tars of images with captions; the first image of the second tar is broken."""
    folder.mkdir()
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for place in range(count):
                content = b"no image" if (shard, place) == (1, 0) else png(number)
                parts = {"png": content, "txt": f"image {number}".encode(), "json": json.dumps({"n": number}).encode()}
                for ending, data in parts.items():
                    info = tarfile.TarInfo(f"{number:05}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))
                number += 1
    return f"{folder}/{{000..{len(counts) - 1:03}}}.tar"


@pytest.fixture(params=["folder", "saved", "parquet", "tars"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Seven rows in several units, with a broken image."""
    monkeypatch.setattr(image_rows, "UNIT_ROWS", 3)
    if request.param == "folder":
        for number in range(7):
            (tmp_path / "images").mkdir(exist_ok=True)
            (tmp_path / "images" / f"{number}.png").write_bytes(b"no image" if number == 3 else png(number))
        return str(tmp_path / "images")
    if request.param == "tars":
        return save_tars(tmp_path / "tars", [3, 2, 2])
    saved = save(tmp_path / "saved", list(range(7)), broken=3)
    if request.param == "saved":
        return saved
    table = load_from_disk(saved)
    for shard, places in enumerate([range(3), range(3, 5), range(5, 7)]):
        table.select(places).to_parquet(tmp_path / f"part-{shard}.parquet")
    return str(tmp_path / "part-*.parquet")


def test_rows_can_be_taken_up_at_each_place(source: str):
    rows = open_image_rows(source)
    assert rows.units == 3
    assert rows.fingerprint
    found = list(rows)
    assert [row.number for row in found] == list(range(7))
    assert [row.unit for row in found] == [
        0,
        0,
        0,
        *([1, 1, 1, 2] if len(list(rows.rows_of(1))) == 3 else [1, 1, 2, 2]),
    ]
    for number, row in enumerate(found):
        offset = sum(other.unit == row.unit for other in found[:number])
        assert list(rows_from(rows, Position(row.unit, offset, number))) == found[number:]
    if rows.is_numbered:
        assert [row.path for row in found] == [f"{source}#{number}" for number in range(7)]
        assert [row.caption for row in found] == [f"image {number}" for number in range(7)]


def test_embeddings_are_those_of_the_images(source: str, small_model: tuple[Any, Any, str]):
    model, processor, _ = small_model
    rows = open_image_rows(source)
    found = list(embed_rows(rows, rows.content, model, processor, batch_size=2, look=lambda data, image: image.size))
    assert [row.row.number for row in found if row.problem] == [3]
    assert "cannot be opened" in str(found[3].problem)
    assert found[3].embedding is None
    others = [row for row in found if not row.problem]
    expected = encode_images(model, processor, [make_image(row.row.number) for row in others]).numpy()
    assert np.allclose([row.embedding for row in others], expected, atol=1e-5)
    assert {row.seen for row in others} == {(60, 40)}


def test_what_is_no_source(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no images"):
        open_image_rows(str(tmp_path / "empty"))
    (tmp_path / "no.csv").write_text("")
    with pytest.raises(ValueError, match=r"no\.csv"):
        open_image_rows(str(tmp_path / "no.csv"))
