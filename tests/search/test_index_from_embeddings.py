"""An index made of embeddings in files, ours and clip-retrieval's, is searched as one made of images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_clip.commands.program import main
from hf_clip.search import result_output
from hf_clip.search.embed_source import embed_source
from hf_clip.search.embedding_place import EmbeddingFilesError
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import SearchIndexError

from .test_data_set_rows import save

TEXT = "a blue three on yellow paper"


@pytest.fixture
def embeddings(tmp_path: Path, photos: Path, small_model: tuple[Any, Any, str]) -> Callable[..., Path]:
    """Embeds the folder of images, or another source."""
    model, processor, _ = small_model

    def embed(name: str = "embeddings", source: Any = photos, **how: Any) -> Path:
        embed_source(source, tmp_path / name, model=model, processor=processor, shard_rows=4, **how)
        return tmp_path / name

    return embed


@pytest.mark.parametrize("layout", ["parquet", "safetensors", "clip-retrieval"])
def test_search_finds_what_an_index_of_the_images_finds(
    layout: str, photos: Path, new_index: Callable[..., ImageIndex], embeddings: Callable[..., Path], tmp_path: Path
):
    of_images, of_files = new_index("of-images"), new_index("of-files")
    of_images.add(photos)
    place = embeddings(layout=layout)
    assert of_files.add_embeddings(place).describe() == "6 added"
    assert of_files.add_embeddings(place).describe() == "6 unchanged"
    expected, found = of_images.search(TEXT), of_files.search(TEXT)
    assert [result.path for result in found] == [result.path for result in expected]
    assert [result.score for result in found] == pytest.approx([result.score for result in expected], abs=1e-3)
    assert {(result.width, result.height, result.thumbnail) for result in found} == {(0, 0, b"")}
    assert of_files.duplicates() == []


def test_what_a_search_writes_without_thumbnails(
    photos: Path, new_index: Callable[..., ImageIndex], embeddings: Callable[..., Path], tmp_path: Path
):
    index = new_index()
    index.add_embeddings(embeddings())
    (photos / "a.png").unlink()
    found = index.search(TEXT)
    result_output.write_page(tmp_path / "page.html", found, TEXT)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,/9j/") == 5  # made of the files that are there
    assert page.count(result_output.BLANK) == 1
    result_output.write_sheet(tmp_path / "sheet.png", found)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 6 * 168 + 8
    assert len(json.loads(result_output.as_json(found))["results"]) == 6


def test_rows_that_come_again_are_replaced(
    tmp_path: Path, new_index: Callable[..., ImageIndex], embeddings: Callable[..., Path]
):
    index = new_index()
    source = save(tmp_path / "data", [1, 2, 3])
    index.add_embeddings(embeddings("first", source))
    save(tmp_path / "data", [1, 9, 3, 4])
    assert index.add_embeddings(embeddings("second", source)).describe() == "1 added, 3 updated"
    assert len(index) == 4
    (row,) = index.search(TEXT, where="caption = 'image 9'")
    assert row.path == f"{source}#1"
    assert json.loads(row.metadata or "") == {"kind": "odd", "year": 2009}
    assert index.add_data_set(source).updated == 4  # opened now, so that there are thumbnails
    assert all(result.thumbnail for result in index.search(TEXT, folded=False))


def write_as_clip_retrieval(folder: Path, vectors: np.ndarray, table: dict[str, Any], texts: bool = False) -> Path:
    """As clip-retrieval's writer does: npy, and parquet by pandas."""
    for name in ("img_emb", "metadata", *(["text_emb"] if texts else [])):
        (folder / name).mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(vectors)), 2)):
        np.save(folder / f"img_emb/img_emb_{number}.npy", vectors[part])
        if texts:
            np.save(folder / f"text_emb/text_emb_{number}.npy", vectors[part])
        columns = {name: [values[place] for place in part] for name, values in table.items()}
        pd.DataFrame(columns).to_parquet(folder / f"metadata/metadata_{number}.parquet")
    return folder


def test_files_of_clip_retrieval(tmp_path: Path, new_index: Callable[..., ImageIndex]):
    index = new_index()
    width = index.tables.description.width
    vectors = np.random.default_rng(0).normal(size=(5, width)).astype(np.float16)
    vectors[3] = 0
    table = {
        "image_path": [f"{number:09}" for number in range(5)],
        "caption": ["one", None, "three", "four", "five"],
        "url": [f"https://example.org/{number}.jpg" for number in range(5)],
        "similarity": [0.5] * 5,
    }
    changes = index.add_embeddings(write_as_clip_retrieval(tmp_path / "theirs", vectors, table, texts=True))
    assert changes.added == 4
    assert changes.problems == {"000000003": "its embedding is zero or not finite"}
    import torch

    direction = torch.nn.functional.normalize(torch.from_numpy(vectors[4].astype(np.float32)), dim=0)
    best = index.search(direction, top=1)[0]
    assert (best.path, best.caption, best.score) == ("000000004", "five", pytest.approx(1, abs=1e-3))
    assert json.loads(best.metadata or "") == {"url": "https://example.org/4.jpg", "similarity": 0.5}
    urls = write_as_clip_retrieval(tmp_path / "urls", vectors[:3], {"url": table["url"][:3]})
    assert index.add_embeddings(urls).added == 3
    assert index.search(direction, where="path = 'https://example.org/2.jpg'")[0].caption is None


def test_embeddings_of_another_model_are_refused(
    tmp_path: Path, new_index: Callable[..., ImageIndex], embeddings: Callable[..., Path], digits: Path
):
    from hf_clip import HfClipModel, HfClipProcessor

    index = new_index()
    model, processor = (
        HfClipModel.from_pretrained(digits / "resnet").eval(),
        HfClipProcessor.from_pretrained(digits / "resnet"),
    )
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one/a.png")
    embed_source(tmp_path / "one", tmp_path / "other", model=model, processor=processor)
    with pytest.raises(SearchIndexError, match=r"was made of another model \(.*vit\) than .*resnet: their embeddings"):
        index.add_embeddings(tmp_path / "other")
    wide = write_as_clip_retrieval(tmp_path / "wide", np.ones((4, 7), np.float32), {"url": ["a", "b", "c", "d"]})
    with pytest.raises(EmbeddingFilesError, match=r"wide holds embeddings of 7 numbers, and the index .* of \d+: they"):
        index.add_embeddings(wide)
    nowhere = write_as_clip_retrieval(
        tmp_path / "nowhere", np.ones((4, index.tables.description.width), np.float32), {"width": [1, 2, 3, 4]}
    )
    with pytest.raises(EmbeddingFilesError, match="have none of the columns image_path, path, url, key"):
        index.add_embeddings(nowhere)
    with pytest.raises(EmbeddingFilesError, match="holds no embeddings"):
        index.add_embeddings(tmp_path / "photos")
    assert len(index) == 0


def test_command(embeddings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place, index = embeddings(), tmp_path / "index"
    assert main(["index", str(place), "--into", str(index)]) == 0  # the model is the one that the files name
    assert capsys.readouterr().out == f"{place}: 6 added\n6 images in {index}\n"
    assert main(["search", TEXT, "--index", str(index), "--top", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    (place / "embeddings-00001.parquet").write_bytes(b"PAR1")
    assert main(["index", str(place), "--into", str(tmp_path / "other")]) == 1
    assert "embeddings-00001.parquet is damaged: it has 4 bytes, and" in capsys.readouterr().err
