"""`hf-clip classify`: many images into a table, whatever becomes of one of them."""

import csv
import json
import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_clip import HfClipModel, HfClipProcessor, ZeroShotClassifier
from hf_clip.commands.program import main
from hf_clip.zero_shot.prompts import parse_labels, read_labels

LABELS = ["a cat", "a cup", "the moon"]
NAMES = ["astronaut.png", "broken.png", "inner/chelsea.JPG", "inner/deeper/coffee.webp"]
GOOD = [name for name in NAMES if name != "broken.png"]


@pytest.fixture(scope="module")
def folder(photographs: dict[str, Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images on three levels, a broken one, and what is none."""
    folder = tmp_path_factory.mktemp("images")
    for name in GOOD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photographs[Path(name).stem].resize((90, 60)).save(folder / name, format="PNG")
    (folder / "broken.png").write_bytes((folder / GOOD[0]).read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "astronaut.png").write_bytes((folder / GOOD[0]).read_bytes())
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path, repositories: dict[str, Path]) -> list[list[dict[str, Any]]]:
    model = HfClipModel.from_pretrained(repositories["vit"]).eval()
    processor = HfClipProcessor.from_pretrained(repositories["vit"])
    classifier = ZeroShotClassifier(model, processor, LABELS, progress=False)
    return classifier.classify([folder / name for name in GOOD], top_k=2)


def run(model: Path, *words: object, batch: int = 2) -> int:
    fixed = ["--labels", ",".join(LABELS), "--top_k", "2", "--device", "cpu", "--batch-size", str(batch)]
    return main(["classify", str(model), *map(str, words), *fixed])


def read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pyarrow.parquet.read_table(path).to_pylist()


def check(rows: list[dict[str, Any]], names: list[str], expected: list[list[dict[str, Any]]]) -> None:
    assert [row["image"] for row in rows] == names
    assert all(list(row) == ["image", "label", "score", "label_2", "score_2", "error"] for row in rows)
    good = [row for row in rows if row["error"] is None]
    assert [[row["label"], row["label_2"]] for row in good] == [[e["label"] for e in entry] for entry in expected]
    for row, entry in zip(good, expected, strict=True):
        assert float(row["score"]) == pytest.approx(entry[0]["score"], abs=1e-6)
        assert float(row["score_2"]) == pytest.approx(entry[1]["score"], abs=1e-6)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_folder_becomes_a_table_and_a_broken_file_a_row_with_its_error(
    kind: str,
    folder: Path,
    repositories: dict[str, Path],
    expected: list,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    table = tmp_path / "new" / f"scores.{kind}"
    assert run(repositories["vit"], folder, "--output", table) == 2
    rows = read_table(table)
    check(rows, [str(folder / name) for name in NAMES], expected)
    broken = rows[1]
    assert broken["label"] is broken["score"] is broken["label_2"] is None
    assert "cannot be opened" in broken["error"]
    assert "1 of 4 images could not be opened" in capsys.readouterr().err
    assert list(table.parent.iterdir()) == [table]


def test_results_are_printed_where_no_table_is_asked_for(
    folder: Path, repositories: dict[str, Path], expected: list, capsys: pytest.CaptureFixture
):
    files = [folder / name for name in GOOD]
    assert run(repositories["vit"], *files, batch=16) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, file, (best, second) in zip(lines, files, expected, strict=True):
        for part in (str(file), f"{best['label']} ", f"{best['score']:.4f}", f"{second['label']} "):
            assert part in line


def test_images_of_which_none_can_be_opened_are_an_error(
    folder: Path, repositories: dict[str, Path], capsys: pytest.CaptureFixture
):
    assert run(repositories["vit"], folder / "broken.png", folder / "no.png") == 1
    shown = capsys.readouterr()
    assert shown.out.count("  error: ") == 2
    assert shown.err == "error: none of 2 images could be opened\n"


def test_names_that_would_write_over_the_screen_are_one_line(
    folder: Path, repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    odd = tmp_path / "a\nb\x1b[31m.png"
    odd.write_bytes((folder / GOOD[0]).read_bytes())
    assert run(repositories["vit"], odd) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "a�b�[31m.png  " in line


def test_data_set_that_breaks_on_the_way_is_one_line_and_no_table(
    folder: Path, repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for number in range(9):
            archive.add(folder / GOOD[0], f"{number}.png")
    shard, table = tmp_path / "shard.tar.gz", tmp_path / "scores.csv"
    shard.write_bytes(packed.getvalue()[: len(packed.getvalue()) * 3 // 4])
    assert run(repositories["vit"], shard, "--output", table) == 1
    assert re.search(r"^error: The data set '.*shard.tar.gz' cannot be read: .*$", capsys.readouterr().err, re.M)
    assert list(tmp_path.iterdir()) == [shard]


def test_rows_may_name_images_elsewhere_where_that_is_allowed(
    folder: Path, repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    rows = tmp_path / "rows.csv"
    rows.write_text(f"image\n{folder / GOOD[0]}\n")
    assert run(repositories["vit"], rows) == 1
    assert "--image_folders" in capsys.readouterr().out
    assert run(repositories["vit"], rows, "--image_folders", folder) == 0


def test_data_set_is_classified_by_number(
    folder: Path, repositories: dict[str, Path], expected: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    stored = [{"bytes": (folder / name).read_bytes(), "path": None} for name in NAMES]
    rows = {"number": list(range(4)), "photo": stored}
    features = Features({"number": Dataset.from_dict({"n": [1]}).features["n"], "photo": ImageFeature()})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    assert run(repositories["vit"], tmp_path / "rows.parquet", "--output", tmp_path / "scores.jsonl") == 2
    check(read_table(tmp_path / "scores.jsonl"), ["0", "1", "2", "3"], expected)


def test_checkpoint_file_is_a_model_too(
    archives: dict[str, Path], vocabulary: Path, folder: Path, expected: list, tmp_path: Path
):
    assert run(archives["vit"], *[folder / name for name in GOOD], "--output", tmp_path / "scores.csv") == 0
    check(read_table(tmp_path / "scores.csv"), [str(folder / name) for name in GOOD], expected)


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("labels.txt", "a cat, lying\n\nthe moon\n", ["a cat, lying", "the moon"]),
        ("labels.json", '{"cat": ["a cat", "a kitten"], "moon": "the moon"}', ["cat", "moon"]),
    ],
)
def test_labels_come_from_a_file(name: str, content: str, labels: list[str], tmp_path: Path):
    (tmp_path / name).write_text(content)
    assert list(read_labels(parse_labels(str(tmp_path / name)))) == labels


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{images}", "--output", "scores.txt"], "scores.txt ends in none of .csv, .jsonl, .parquet"),
        (["{images}", "--output", "/proc/x.csv"], "cannot be written: "),
        (["{images}", "--output", "{images}"], "is a folder; name a file in it"),
        (["{empty}"], "has no images: no file in it"),
        (["{images}", "--output", ""], "output is given as an empty text"),
        (["{images}", "--output", "{file}/scores.csv"], "notes.txt is no folder"),
        (["{images}", "--device", "cuda:77"], "device='cuda:77' asks for"),
        (["{images}", "--device", "gpu"], "device='gpu' is no device; write cpu, cuda"),
        (["~no-such-user/rows.csv"], "There is no folder or file '~no-such-user/rows.csv'"),
        (["{images}", ""], "images is given as an empty text"),
        (["{images}", "--templates", "a photo"], "The template 'a photo' has no placeholder {}"),
        (["nowhere/"], "There is no folder or file 'nowhere/', and no data set of that name ("),
        (["{images}", "nothing/such"], "nothing/such is a data set, of which one can be read at a time"),
        (["{images}", "--labels", "a,a"], "The label 'a' appears twice"),
        (["{images}", "--labels", "none.txt"], "There is no file none.txt"),
        (["{images}", "--labels", "my/labels"], "There is no file my/labels of labels"),
        (["{images}", "--labels", "{images}"], "of labels; check the path"),
        (["{images}", "--labels", "a,b", "--head", "x"], "give --labels or --head, and not both"),
        (["{images}", "--head", "{file}"], "notes.txt is no readable safetensors file"),
        (["{images}", "--head", "a b"], "'a b' is no name of a head"),
        (["{images}", "--head", "x", "--templates", "{{}}"], "--templates are for labels, and a head has no use"),
    ],
)
def test_refusals_come_before_the_model_is_loaded(
    words: list[str], line: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    places = {"images": folder, "empty": tmp_path, "file": folder / "notes.txt"}
    given = [word.format(**places) for word in words]
    given += [] if {"--labels", "--head"} & {*given} else ["--labels", "a,b"]
    assert main(["classify", str(tmp_path / "no-model"), *given]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert line in shown


def test_folder_without_a_model_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "notes.txt").write_text("no model")
    assert main(["classify", str(tmp_path), str(folder), "--labels", "a,b"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is a folder without a model: it has neither config")


def test_table_of_before_stays_where_a_run_fails(
    folder: Path, repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = tmp_path / "scores.csv"
    table.write_text("of before")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_clip.zero_shot.pixel_classifier.encode_pixels", stop)
    assert run(repositories["vit"], folder, "--output", table) == 130
    assert table.read_text() == "of before"
    assert list(tmp_path.iterdir()) == [table]
