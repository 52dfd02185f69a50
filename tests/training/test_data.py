"""Pairs of pictures and captions: from a `datasets` folder to tensors."""

import gc
import warnings
from io import BytesIO
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoProcessor

from hf_clip.training.config import TrainingConfig
from hf_clip.training.data import PairCollator, build_loader, load_pairs, open_picture, repeat


def picture_bytes(picture: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format=str(options.pop("format", "png")), **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path, photographs: dict[str, Image.Image]) -> Path:
    features = Features({"image": ImageFeature(), "caption": Value("string"), "number": Value("int32")})
    names = list(photographs)
    rows = {
        "image": [{"bytes": picture_bytes(photographs[name].resize((60, 40))), "path": None} for name in names],
        "caption": [f"a photo of {name}" for name in names],
        "number": list(range(len(names))),
    }
    DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def config(folder: Path, **fields: object) -> TrainingConfig:
    return TrainingConfig(**({"model": "m", "dataset": str(folder), "output_dir": "o", "batch_size": 2} | fields))


def test_pictures_stay_undecoded_until_they_are_opened_here(folder: Path):
    pairs = load_pairs(config(folder))
    assert set(pairs.column_names) == {"image", "caption"}
    assert isinstance(pairs[0]["image"]["bytes"], bytes)


def test_saved_single_dataset_is_taken_too(folder: Path, tmp_path: Path):
    from datasets import load_from_disk

    load_from_disk(folder)["train"].save_to_disk(tmp_path / "single")
    assert len(load_pairs(config(tmp_path / "single"))) == 6


def test_batches_have_the_models_shapes(folder: Path, repositories: dict[str, Path]):
    settings = config(folder, batch_size=3, num_workers=0)
    processor = AutoProcessor.from_pretrained(repositories["vit"])
    loader = build_loader(load_pairs(settings), processor, settings)
    batches = list(loader)
    assert len(batches) == 2
    for batch in batches:
        assert batch["pixel_values"].shape == (3, 3, 48, 48)
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert len(batch["input_ids"]) == 3


def test_order_depends_on_the_seed_alone(folder: Path, repositories: dict[str, Path]):
    processor = AutoProcessor.from_pretrained(repositories["vit"])

    def order(seed: int, disturbance: int) -> list[list[int]]:
        torch.manual_seed(disturbance)
        settings = config(folder, num_workers=0, seed=seed)
        loader = build_loader(load_pairs(settings), processor, settings)
        return [row for batch in loader for row in batch["input_ids"].tolist()]

    assert order(1, 0) == order(1, 99)
    assert any(order(1, 0) != order(seed, 0) for seed in range(2, 6))


def test_a_pair_stays_a_pair(folder: Path, repositories: dict[str, Path]):
    settings = config(folder)
    processor = AutoProcessor.from_pretrained(repositories["vit"])
    pairs = load_pairs(settings)
    batch = PairCollator(processor, settings)([pairs[1], pairs[4]])
    for row, index in enumerate((1, 4)):
        picture = Image.open(BytesIO(pairs[index]["image"]["bytes"]))
        alone = processor(text=pairs[index]["caption"], images=picture, return_tensors="pt")
        assert torch.equal(batch["pixel_values"][row], alone["pixel_values"][0])
        assert batch["input_ids"][row].tolist()[: alone["input_ids"].shape[1]] == alone["input_ids"][0].tolist()


def test_captions_that_are_too_long_are_cut(folder: Path, repositories: dict[str, Path]):
    settings = config(folder)
    row = load_pairs(settings)[0] | {"caption": "word " * 200}
    batch = PairCollator(AutoProcessor.from_pretrained(repositories["vit"]), settings)([row])
    assert batch["input_ids"].shape == (1, 20)
    assert batch["input_ids"][0, -1] == 999


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (40, 20), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    stored = {"bytes": picture_bytes(picture, format="jpeg", exif=exif), "path": None}
    assert open_picture(stored, "row 0").size == (20, 40)


def test_picture_that_cannot_be_opened_names_its_row(folder: Path, repositories: dict[str, Path]):
    settings = config(folder)
    row = {"image": {"bytes": b"no picture", "path": None}, "caption": "a broken one"}
    collator = PairCollator(AutoProcessor.from_pretrained(repositories["vit"]), settings)
    error = collator([row])
    assert isinstance(error, ValueError)
    assert "The picture of the pair captioned 'a broken one' cannot be opened" in str(error)
    with pytest.raises(ValueError, match="'a broken one' cannot be opened"):
        next(repeat([error], 1))
    assert "The picture of the pair captioned 'a' is missing" in str(collator([{"image": None, "caption": "a"}]))


@pytest.mark.parametrize("workers", [0, 1])
def test_error_from_a_worker_is_one_line(folder: Path, repositories: dict[str, Path], workers: int):
    settings = config(folder, num_workers=workers)
    pairs = load_pairs(settings).select_columns(["image", "caption"])
    broken = pairs.map(lambda row: {"image": {"bytes": b"no picture", "path": None}, "caption": row["caption"]})
    loader = build_loader(broken, AutoProcessor.from_pretrained(repositories["vit"]), settings)
    with pytest.raises(ValueError, match="cannot be opened") as caught:
        list(repeat(loader, 2))
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"caption": [["a", "b"], ["c"]]}, "The column 'caption' holds .*, but one text for each row is needed"),
        ({"caption": [1, 2]}, "The column 'caption' holds .*int64.*, but one text for each row is needed"),
        ({"caption": ["a", None]}, "1 rows of .* have no caption, the first of them row 1"),
        ({"image": [1, 2]}, "The column 'image' holds .*int64.*, but pictures are needed"),
    ],
)
def test_columns_of_another_kind_are_refused(tmp_path: Path, column: dict, message: str):
    rows = {"image": ["a.png", "b.png"], "caption": ["a", "b"]} | column
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load_pairs(config(tmp_path / "data"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves the table open
def test_folder_of_pictures_with_a_table_of_captions(tmp_path: Path, photographs: dict[str, Image.Image]):
    for name in ("astronaut", "coffee"):
        photographs[name].save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\nastronaut.png,an astronaut\ncoffee.png,a cup\n")
    with warnings.catch_warnings():
        # `datasets` leaves the table open for the garbage collector, which would warn in the middle of another test.
        warnings.simplefilter("ignore", ResourceWarning)
        pairs = load_pairs(config(tmp_path))
        gc.collect()
    assert pairs["caption"][:] == ["an astronaut", "a cup"]
    assert open_picture(pairs[1]["image"], "row 1").size == photographs["coffee"].size


def test_loader_is_repeated_as_often_as_steps_need():
    assert list(repeat([1, 2, 3], 7)) == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dataset": "/no/such/folder"}, FileNotFoundError, "There is no data set '/no/such/folder'"),
        ({"split": "validation"}, ValueError, "no split 'validation'; its splits are train"),
        (
            {"caption_column": "text"},
            ValueError,
            "no column 'text'; its columns are image, caption, number.*--caption_column",
        ),
        ({"image_column": "picture"}, ValueError, "no column 'picture'.*--image_column"),
        ({"batch_size": 7}, ValueError, "has 6 rows, fewer than one batch of 7. Pass --batch_size 6 or less"),
    ],
)
def test_wrong_data_set_says_what_is_there(folder: Path, fields: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        load_pairs(config(folder, **fields))
