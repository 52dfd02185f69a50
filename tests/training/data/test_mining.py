"""Hard negatives: against a search by hand, and what of it is left out."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip.training.data.load_pairs import load_pairs
from hf_clip.training.data.mined_table import check_table, open_whole, write_mined
from hf_clip.training.data.mining import Mined, MiningOptions, Negative, limits_of, mine_negatives, most_similar
from hf_clip.training.data.pair_table import PairTable

from ..sources import png, write_pictures, write_table

pytestmark = pytest.mark.usefixtures("prepared_here")


def embeds(count: int, seed: int, width: int = 8) -> Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_blocks_find_what_a_whole_matrix_has():
    """Blocks of all sizes, more negatives than there are, own texts in every block."""
    queries, texts = embeds(23, 0), embeds(37, 1)
    own = [[row, (5 * row) % 37] for row in range(23)]
    limits = torch.linspace(-0.2, 1, 23)
    whole = queries @ texts.T
    whole[whole > limits[:, None]] = -torch.inf
    for row, places in enumerate(own):
        whole[row, places] = -torch.inf
    expected, order = whole.sort(dim=1, descending=True, stable=True)
    assert (expected[0] == -torch.inf).sum() > 3
    order[expected == -torch.inf] = -1
    for sizes in ((512, 4096), (5, 4), (1, 1)):
        scores, places = most_similar(queries, texts, limits, own, 37, sizes=sizes)
        assert torch.allclose(scores, expected, atol=1e-6)
        assert torch.equal(places, order)
    scores, places = most_similar(queries, texts, limits, own, 3, sizes=(5, 4))
    assert torch.equal(places, order[:, :3])
    assert most_similar(queries, texts, limits, own, 40)[1].shape == (23, 40)


def test_limit_is_a_share_of_the_own_similarity_and_lies_below_it():
    found = limits_of(torch.tensor([0.4, 0.0, -0.2]), 0.9)
    assert torch.allclose(found, torch.tensor([0.36, 0.0, -0.22]))
    assert torch.equal(limits_of(torch.tensor([0.4, -0.2]), 1.0), torch.tensor([0.4, -0.2]))


@pytest.mark.parametrize("options", [{"by": "sound"}, {"negatives": 0}, {"skip_first": -1}, {"max_share": 0.0}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"^(by is 'sound'|negatives is -?\d, skip_first -?\d and max_share)"):
        MiningOptions(**options)


CAPTIONS = ["a cat", "a dog", "A  Cat", "the moon", "", "a cup"]


@pytest.fixture
def source(tmp_path: Path) -> PairTable:
    """Rows 0 and 3 show one image. Captions 0 and 2 are one to the model. Row 4 has no caption."""
    images = [png(number) for number in (0, 1, 2, 0, 4, 5)]
    Dataset.from_dict({"image": images, "caption": CAPTIONS}).save_to_disk(tmp_path / "data")
    (table,) = load_pairs(str(tmp_path / "data")).sources
    return table


def model_of(repositories: dict[str, Path]) -> tuple[Any, Any]:
    from hf_clip import HfClipModel, HfClipProcessor

    model = HfClipModel.from_pretrained(repositories["vit"])
    return model, HfClipProcessor.from_pretrained(repositories["vit"])


@pytest.mark.parametrize("by", ["image", "text"])
def test_no_caption_of_an_image_is_its_own_negative(source: PairTable, repositories: dict[str, Path], by: str):
    """With all that there are, by a share that leaves nothing out."""
    model, processor = model_of(repositories)
    model.train()
    found = mine_negatives(model, processor, source, MiningOptions(9, by, max_share=1e6), batch_size=2)
    assert model.training
    assert found.of_rows == [0, 1, 2, 0, None, 3]
    assert found.captions == [["a cat", "the moon"], ["a dog"], ["A  Cat"], ["a cup"]]
    assert found.texts == 4
    assert len(found.unusable) == 1
    assert found.unusable[0].startswith("row 4 of ")
    assert [{negative.text for negative in of_image} for of_image in found.negatives] == [
        {"a dog", "a cup"},  # the third image's caption is read as "a cat" is
        {"a cat", "the moon", "a cup"},
        {"a dog", "the moon", "a cup"},
        {"a cat", "a dog", "the moon"},
    ]
    assert found.of_row(3) == found.of_row(0)
    assert found.of_row(4) == []
    scores = [[negative.score for negative in of_image] for of_image in found.negatives]
    assert scores == [sorted(row, reverse=True) for row in scores]
    images = torch.stack([_image_feature(model, processor, number) for number in (0, 1, 2, 5)])
    texts = _text_features(model, processor, ["a cat", "the moon", "a dog", "a cup"])
    if by == "image":
        assert found.negatives[1][0].own_score == pytest.approx(float(images[1] @ texts[2]), abs=1e-5)
        assert found.negatives[0][0].own_score == pytest.approx(float((images[0] @ texts[:2].T).min()), abs=1e-5)
        assert scores[3][0] == pytest.approx(float((images[3] @ texts[:3].T).max()), abs=1e-5)
    else:
        assert found.negatives[1][0].own_score == pytest.approx(1, abs=1e-5)
        assert found.negatives[0][0].score == pytest.approx(float((texts[:2] @ texts[2:].T).max()), abs=1e-5)
    skipping = mine_negatives(model, processor, source, MiningOptions(1, by, max_share=1e6, skip_first=1))
    assert [of_image[0].text for of_image in skipping.negatives] == [row[1].text for row in found.negatives]
    own, limit = found.negatives[1][0].own_score, (scores[1][0] + scores[1][1]) / 2  # between the best and the next
    if (share := 1 + (limit - own) / abs(own)) > 0:
        fewer = mine_negatives(model, processor, source, MiningOptions(9, by, max_share=share))
        assert [negative.text for negative in fewer.negatives[1]] == [row.text for row in found.negatives[1][1:]]
    assert by == "image" or share > 0


def _image_feature(model: Any, processor: Any, number: int) -> Tensor:
    from io import BytesIO

    from PIL import Image as PillowImage

    pixels = processor.image_processor(PillowImage.open(BytesIO(png(number))), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return normalize(model.eval().encode_image(pixels), dim=-1)[0]


def _text_features(model: Any, processor: Any, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return normalize(model.eval().encode_text(processor.tokenizer(texts, return_tensors="pt").input_ids), dim=-1)


def test_data_of_one_image_are_refused(tmp_path: Path, repositories: dict[str, Path]):
    Dataset.from_dict({"image": [png(0)] * 3, "caption": ["one", "two", "three"]}).save_to_disk(tmp_path / "data")
    (source,) = load_pairs(str(tmp_path / "data")).sources
    message = "has 1 different images that can be used and 3 different captions, but at least 2 of each are needed"
    with pytest.raises(ValueError, match=message):
        mine_negatives(*model_of(repositories), source, MiningOptions(by="text"))


def test_too_many_images_that_cannot_be_opened_are_refused(tmp_path: Path, repositories: dict[str, Path]):
    rows = {"image": [png(0), b"broken", png(1)], "caption": ["one", "two", "three"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    (source,) = load_pairs(str(tmp_path / "data")).sources
    message = "1 of 3 images cannot be opened, more than 1%, so too many rows would have no negative captions. Replace"
    with pytest.raises(ValueError, match=message):
        mine_negatives(*model_of(repositories), source, MiningOptions())


# --- the table -------------------------------------------------------------------------------------------------------


def mined_of(count: int) -> Mined:
    """Row i has i % 3 negatives."""
    negatives = [[Negative(f"not {row} {place}", 0.5, 0.6) for place in range(row % 3)] for row in range(count)]
    return Mined(list(range(count)), [[f"caption number {row}"] for row in range(count)], negatives, count)


def written(source_path: str, output: Path, **columns: Any) -> tuple[list[str], PairTable]:
    """What of the result lies elsewhere, and the result as the trainer opens it."""
    (source,) = load_pairs(source_path, **columns).sources
    table = open_whole(source, "train", "negative_caption")
    folders = write_mined(str(output), table, source, mined_of(len(table)))
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []
    (read,) = load_pairs(str(output), negative_caption_column=["negative_caption"], image_folders=folders).sources
    rows = [read.row(read.table[place], "") for place in range(len(table))]
    assert [row.negatives for row in rows] == [[f"not {row} {place}" for place in range(row % 3)] for row in range(6)]
    assert [row.reason for row in rows] == [None] * 6
    return folders, read


def content_of(read: PairTable, place: int) -> bytes:
    from hf_clip.data.images import image_content

    return image_content(read.row(read.table[place], "").image, read.places)


@pytest.mark.parametrize("kind", ["paths", "folder"])
def test_files_are_named_and_not_copied(tmp_path: Path, kind: str):
    names = write_pictures(tmp_path / "photos" / "inner")
    captions = [f"caption number {number}" for number in range(6)]
    if kind == "paths":
        rows = {"image_path": [f"inner/{name}" for name in names], "caption": captions, "extra": range(6)}
        place = str(write_table(tmp_path / "photos" / "table.csv", rows))
    else:
        place = str(tmp_path / "photos" / "inner")
        write_table(tmp_path / "photos" / "inner" / "metadata.csv", {"file_name": names, "caption": captions})
    folders, read = written(place, tmp_path / "elsewhere" / "mined.parquet")
    assert folders == [str(tmp_path / "photos" / "inner")]
    assert (tmp_path / "elsewhere" / "mined.parquet").stat().st_size < 6000
    assert [content_of(read, row) for row in range(6)] == [png(row) for row in range(6)]
    folders, read = written(place, tmp_path / "photos" / "mined.parquet")
    assert folders == []
    stored = read.row(read.table[2], "").image
    assert (stored if kind == "paths" else stored["path"]) == f"inner/{names[2]}"
    assert content_of(read, 2) == png(2)


def test_bytes_labels_and_other_columns_are_kept(tmp_path: Path):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "tags": List(Value("string"))})
    images = [{"bytes": png(number), "path": None} for number in range(6)]
    rows = {"image": images, "label": [0, 1] * 3, "tags": [["a"]] * 6}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    folders, read = written(str(tmp_path / "data"), tmp_path / "mined.parquet", caption_column="a {label}")
    assert folders == []
    assert content_of(read, 3) == png(3)
    again = load_dataset("parquet", data_files=str(tmp_path / "mined.parquet"), split="train")
    assert again.features == features | {"negative_caption": List(Value("string"))}
    assert again[0]["image"].size == (60, 48)


def test_what_is_in_the_way_is_refused_and_nothing_is_half_written(
    tmp_path: Path, source: PairTable, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(
        ValueError, match=r"^--output is out.csv, but the result is a table in a parquet file: name one"
    ):
        check_table("out.csv")
    (tmp_path / "there.parquet").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"there.parquet exists; remove it, or name another file for --output.$"):
        check_table(str(tmp_path / "there.parquet"))
    with pytest.raises(
        ValueError, match=re.escape("has a column 'caption' already; name another for the new one with")
    ):
        open_whole(source, "train", "caption")
    table = open_whole(source, "train", "negative_caption")
    broken = mined_of(2)  # of fewer rows
    with pytest.raises(IndexError):
        write_mined(str(tmp_path / "out" / "mined.parquet"), table, source, broken)
    assert list((tmp_path / "out").iterdir()) == []
