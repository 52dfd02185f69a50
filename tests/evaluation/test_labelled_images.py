"""Data sets with labels in each layout: what is read, and one error for each thing that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from demo.digits import DIGITS
from hf_clip.evaluation import labelled_images
from hf_clip.evaluation.class_names import read_class_names
from hf_clip.evaluation.labelled_images import LabelledImages, open_labelled
from hf_clip.evaluation.scored_images import open_scored
from hf_clip.zero_shot.prompts import LabelError

from .data_sets import write_class_folders, write_shards

SORTED = sorted(DIGITS)


def labels_of(data: LabelledImages) -> list[str]:
    return [data.labels[row.labels[0]] for row in data.rows()]


def table(rows: list[dict[str, Any]], labels: list[Any], feature: Any) -> Dataset:
    features = Features({"image": Image(), "label": feature})
    images = [{"bytes": row["bytes"], "path": None} for row in rows]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_folder_of_class_folders(tmp_path: Path, rows: list[dict[str, Any]]):
    data = open_labelled(write_class_folders(tmp_path / "digits", rows))
    assert (data.labels, data.split, data.count) == (SORTED, "train", 60)
    assert sorted(labels_of(data)) == sorted(DIGITS[row["label"]] for row in rows)


@pytest.mark.parametrize(("asked", "found"), [(None, "test"), ("val", "validation"), ("validation", "validation")])
def test_folders_of_splits(tmp_path: Path, rows: list[dict[str, Any]], asked: str | None, found: str):
    for place, name in enumerate(["train", "val", "test"]):
        write_class_folders(tmp_path / name, rows[20 * place : 20 * place + 20])
    data = open_labelled(tmp_path, asked)
    assert (data.split, data.count) == (found, 20)
    with pytest.raises(ValueError, match=r"has no split 'tset'; its splits are test, train, validation\. Did you mean"):
        open_labelled(tmp_path, "tset")


@pytest.mark.parametrize("is_stream", [False, True])
def test_table_and_stream_with_class_labels(rows: list[dict[str, Any]], is_stream: bool):
    given = table(rows, [row["label"] for row in rows], ClassLabel(names=DIGITS))
    data = open_labelled(given.to_iterable_dataset() if is_stream else given)
    assert labels_of(data) == [DIGITS[row["label"]] for row in rows]
    assert data.count == (None if is_stream else 60)


def test_image_within_a_column(rows: list[dict[str, Any]]):
    stored = [{"file": {"bytes": row["bytes"], "path": None}, "licence": "none"} for row in rows]
    data = Dataset.from_dict({"photo": stored, "label": [DIGITS[row["label"]] for row in rows]})
    labelled = open_labelled(data, image_column="photo.file")
    assert [row.image["bytes"] for row in labelled.rows()] == [row["bytes"] for row in rows]
    scored = open_scored(data.add_column("score", list(range(60))), score_column="score", image_column="photo.file")
    assert [(row.image["bytes"], row.score) for row in scored.rows()] == [
        (row["bytes"], place) for place, row in enumerate(rows)
    ]


def test_saved_data_set_and_its_split(tmp_path: Path, rows: list[dict[str, Any]]):
    given = table(rows, [DIGITS[row["label"]] for row in rows], Value("string"))
    DatasetDict(train=given.select(range(5)), test=given).save_to_disk(tmp_path)
    data = open_labelled(str(tmp_path))
    assert (data.split, data.count, data.labels) == ("test", 60, sorted({DIGITS[row["label"]] for row in rows}))
    assert labels_of(data) == [DIGITS[row["label"]] for row in rows]


def test_file_of_paths_and_numbers(tmp_path: Path, rows: list[dict[str, Any]]):
    lines = ["image,label"]
    for place, row in enumerate(rows[:4]):
        (tmp_path / f"{place}.png").write_bytes(row["bytes"])
        lines.append(f"{place}.png,{row['label']}")
    (tmp_path / "test.csv").write_text("\n".join(lines))
    (tmp_path / "names.txt").write_text("\n".join(DIGITS))
    source = str(tmp_path / "test.csv")
    assert labels_of(open_labelled(source, class_names=tmp_path / "names.txt")) == [
        DIGITS[row["label"]] for row in rows[:4]
    ]
    with pytest.raises(ValueError, match=r"test\.csv does not name its classes: pass class names, a file with one"):
        open_labelled(source)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_texts_of_a_file_are_the_names_of_the_classes(tmp_path: Path, rows: list[dict[str, Any]], ending: str):
    names = [DIGITS[row["label"]] for row in rows[:8]]
    paths = [f"{place}.png" for place in range(8)]
    for path, row in zip(paths, rows, strict=False):
        (tmp_path / path).write_bytes(row["bytes"])
    data = Dataset.from_dict({"image": paths, "label": names})
    getattr(data, {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[ending])(tmp_path / f"test.{ending}")
    found = open_labelled(str(tmp_path / f"test.{ending}"))
    assert found.labels == sorted({*names})
    assert labels_of(found) == names
    assert [row.image for row in found.rows()] == paths
    with pytest.raises(ValueError, match=r"the data set does not name its classes: pass class names"):
        open_labelled(data.to_iterable_dataset())  # which may come from anywhere


def test_address_is_not_read_twice_for_the_names_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "test.csv").write_text("image,label\n0.png,cat\n1.png,dog\n")
    monkeypatch.setattr(labelled_images, "folder_of", lambda source: None)  # as for one on the web
    with pytest.raises(ValueError, match=r"test\.csv does not name its classes: pass class names"):
        open_labelled(str(tmp_path / "test.csv"))


def test_row_without_a_text_among_labels_is_named(tmp_path: Path):
    labelled = [{"image": f"{name}.png", "label": name} for name in ("cat", None, "dog")]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    data = open_labelled(str(tmp_path / "test.jsonl"))
    assert data.labels == ["cat", "dog"]
    with pytest.raises(
        LabelError, match=r"row 1 of .*test\.jsonl has the label None, but there are 2 classes"
    ) as caught:
        list(data.rows())
    assert caught.value.index == 1


def test_shards(tmp_path: Path, rows: list[dict[str, Any]]):
    data = open_labelled(write_shards(tmp_path / "wds", rows))
    assert data.labels == DIGITS
    assert data.templates == ["a photo of a red {} on white paper", "the digit {} in blue ink on yellow paper"]
    assert labels_of(data) == [DIGITS[row["label"]] for row in rows]


def test_several_labels_of_an_image(tmp_path: Path, rows: list[dict[str, Any]]):
    given = [{**row, "labels": sorted({row["label"], (row["label"] + 3) % 10})} for row in rows[:9]]
    shards = open_labelled(write_shards(tmp_path / "wds", given, kind="multilabel"))
    lists = open_labelled(table(given, [row["labels"] for row in given], List(ClassLabel(names=DIGITS))))
    for data in (shards, lists):
        assert data.is_multi_label
        assert [sorted(row.labels) for row in data.rows()] == [row["labels"] for row in given]


def test_names_may_be_several_for_a_class(tmp_path: Path):
    (tmp_path / "names.json").write_text(json.dumps({"zero": ["zero", "nought"], "one": ["one"]}))
    assert read_class_names(tmp_path / "names.json") == [["zero", "nought"], ["one"]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3, 10], r"row 1 of the data set has the label 10, but there are 10 classes: a number from 0 to 9 is needed"),
        ([-1, 2], r"row 0 of the data set has the label -1, .* often stands for a label that is kept secret"),
    ],
)
def test_label_outside_of_the_classes(rows: list[dict[str, Any]], labels: list[int], message: str):
    data = open_labelled(table(rows[:2], labels, Value("int64")), class_names=DIGITS)
    with pytest.raises(LabelError, match=message) as caught:
        list(data.rows())
    assert caught.value.index == next(place for place, label in enumerate(labels) if not 0 <= label < 10)


def test_number_of_names_differs(tmp_path: Path, rows: list[dict[str, Any]]):
    folder = write_class_folders(tmp_path / "digits", rows)
    with pytest.raises(ValueError, match=r"digits has 10 classes, 'eight' to 'zero', but 2 class names were given"):
        open_labelled(folder, class_names=["a", "b"])


def test_one_class_only(tmp_path: Path, rows: list[dict[str, Any]]):
    folder = write_class_folders(tmp_path / "one", [{**row, "label": 4} for row in rows[:3]])
    with pytest.raises(
        ValueError, match=r"There is only one class, 'four': every image would be right\. Name at least"
    ):
        open_labelled(folder)


def test_empty_split(tmp_path: Path, rows: list[dict[str, Any]]):
    write_class_folders(tmp_path / "train", rows[:3])
    (tmp_path / "test" / "zero").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no images in its split 'test'\."):
        open_labelled(tmp_path, "test")
    with pytest.raises(ValueError, match=r"the data set has no rows\."):
        open_labelled(table([], [], ClassLabel(names=DIGITS)))


def test_missing_columns_are_named_with_those_that_are_there(rows: list[dict[str, Any]]):
    given = table(rows[:2], [0, 1], ClassLabel(names=DIGITS)).rename_column("label", "digit_of_it")
    assert open_labelled(given).labels == DIGITS  # a column of classes, whatever its name
    plain = given.cast_column("digit_of_it", Value("int64"))
    with pytest.raises(ValueError, match=r"no column looks like the labels; its columns are image, digit_of_it\. Name"):
        open_labelled(plain, class_names=DIGITS)
    with pytest.raises(ValueError, match=r"has no column 'lable'; its columns are image, digit_of_it\. Name the right"):
        open_labelled(plain, class_names=DIGITS, label_column="lable")


def test_files_without_columns_take_none(tmp_path: Path, rows: list[dict[str, Any]]):
    for source in (write_class_folders(tmp_path / "digits", rows[:4]), write_shards(tmp_path / "wds", rows[:3])):
        with pytest.raises(ValueError, match=r"has no columns, but a file for each image: leave --label-column out\."):
            open_labelled(source, label_column="label")
    with pytest.raises(FileNotFoundError, match="~no-such-user/x"):
        open_labelled("~no-such-user/x")


def test_captions_are_no_labels(tmp_path: Path, rows: list[dict[str, Any]]):
    with pytest.raises(ValueError, match=r"wds has captions and no labels .*; evaluate retrieval on it\."):
        open_labelled(write_shards(tmp_path / "wds", rows[:3], kind="retrieval"))
