"""`hf-clip tag`: several labels of an image, or none, into tables and sidecars, from files and from an index."""

import csv
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image

from hf_clip import ZeroShotClassifier
from hf_clip.commands.program import main
from hf_clip.search import image_tags
from hf_clip.search.image_tags import BACKGROUND, ImageTagger
from hf_clip.search.xmp_sidecar import read_keywords
from hf_clip.zero_shot.features import encode_images

LABELS = ["one", "two", "three", "four", "red", "green"]


def names_in(photos: Path) -> list[str]:
    return [str(photos / name) for name in ("a.png", "b.jpg", "c.webp", "inner/d.jpg", "inner/e.png", "inner/f.jpg")]


@pytest.fixture
def features(photos: Path, small_model: tuple[Any, Any, str]) -> torch.Tensor:
    model, processor, _ = small_model
    return encode_images(model, processor, names_in(photos))


@pytest.fixture
def cosines(features: torch.Tensor, small_model: tuple[Any, Any, str]) -> torch.Tensor:
    model, processor, _ = small_model
    labels = ZeroShotClassifier(model, processor, [*LABELS, *BACKGROUND], scores="cosine", progress=False)
    return labels.matrix.cosines(features)


@pytest.fixture
def threshold(cosines: torch.Tensor) -> float:
    """Some image has no tag, others have several. It lies in the widest gap: an index rounds its embeddings."""
    own = cosines[:, : len(LABELS)]
    ordered = own.flatten().sort().values.tolist()
    middles = sorted(itertools.pairwise(ordered), key=lambda pair: pair[0] - pair[1])
    for low, high in middles:
        counts = (own >= (low + high) / 2).sum(dim=1)
        if counts.min() == 0 and (counts > 1).sum() > 1:
            return (low + high) / 2
    raise AssertionError("no such threshold")


@pytest.fixture
def expected(cosines: torch.Tensor, threshold: float) -> list[list[str]]:
    rows = cosines[:, : len(LABELS)]
    return [[LABELS[i] for i in row.argsort(descending=True).tolist() if row[i] >= threshold] for row in rows]


def run(*words: object) -> int:
    return main(["tag", *map(str, words), "--labels", ",".join(LABELS)])


def read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_folder_becomes_a_table(
    kind: str,
    photos: Path,
    small_model: Any,
    cosines: Any,
    threshold: float,
    expected: list,
    tmp_path: Path,
    capsys: Any,
):
    table = tmp_path / f"tags.{kind}"
    words = ["--model", small_model[2], "--scores", "cosine", "--threshold", threshold, "--output", table]
    assert run(photos, *words) == 2
    rows = {row["image"]: row for row in read_table(table)}
    assert all(list(row) == ["image", "tags", "scores", "error"] for row in rows.values())
    broken = rows.pop(str(photos / "broken.png"))
    assert not broken["tags"]
    assert "cannot be opened" in broken["error"]
    assert [(rows[name]["tags"] or "").split("; ") for name in names_in(photos)] == [tags or [""] for tags in expected]
    several = max(range(len(expected)), key=lambda place: len(expected[place]))
    shown = [float(score) for score in rows[names_in(photos)[several]]["scores"].split("; ")]
    right = [float(cosines[several, LABELS.index(tag)]) for tag in expected[several]]
    assert shown == pytest.approx(right, abs=1e-4)
    shown_lines = capsys.readouterr()
    assert "1 of 7 images could not be tagged" in shown_lines.err
    assert shown_lines.out == f"{table}: the tags of 6 images\n"


def test_sidecars_are_merged_and_images_are_not_changed(
    photos: Path, small_model: Any, threshold: float, expected: list, tmp_path: Path, capsys: Any
):
    names = names_in(photos)
    several = max(range(len(expected)), key=lambda place: len(expected[place]))
    image_tags.add_keywords(f"{names[several]}.xmp", ["holiday"])
    other = next(i for i, tags in enumerate(expected) if tags and i != several)
    Path(f"{names[other]}.xmp").write_bytes(b"junk")
    before = {name: hashlib.sha256(Path(name).read_bytes()).digest() for name in names}
    words = [*names, "--model", small_model[2], "--scores", "cosine", "--threshold", threshold, "--write-xmp"]
    for _ in range(2):
        assert run(*words, "--output", tmp_path / "tags.csv") == 2
        assert read_keywords(f"{names[several]}.xmp") == ["holiday", *expected[several]]
    assert Path(f"{names[other]}.xmp").read_bytes() == b"junk"
    row = read_table(tmp_path / "tags.csv")[other]
    assert row[
        "error"
    ] == f"the sidecar {Path(names[other]).name}.xmp stays as it is: it is damaged (syntax error: " + (
        "line 1, column 0)"
    )
    assert row["tags"] == "; ".join(expected[other])
    assert before == {name: hashlib.sha256(Path(name).read_bytes()).digest() for name in names}
    made = {str(path) for path in photos.rglob("*.xmp")}
    assert made == {f"{name}.xmp" for name, tags in zip(names, expected, strict=True) if tags}
    assert "1 of 6 images could not be tagged" in capsys.readouterr().err


def test_folder_that_takes_no_sidecars(
    photos: Path, small_model: Any, threshold: float, expected: list, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_tags, "add_keywords", refuse)
    words = ["--model", small_model[2], "--scores", "cosine", "--threshold", threshold, "--write-xmp"]
    assert run(*names_in(photos), *words) == 2
    shown = capsys.readouterr().out
    assert ".xmp cannot be written (Permission denied)" in shown
    without = names_in(photos)[expected.index([])]  # and so nothing to write
    assert re.search(rf"^{re.escape(without)} +-$", shown, re.M)


def test_index_is_tagged_without_opening_a_file(
    photos: Path, small_model: Any, new_index: Any, threshold: float, expected: list, tmp_path: Path, capsys: Any
):
    new_index().add(photos)
    names = names_in(photos)
    gone = next(name for name, tags in zip(names, expected, strict=True) if tags)
    Path(gone).unlink()
    words = ["--index", tmp_path / "index", "--model", small_model[2], "--scores", "cosine", "--threshold", threshold]
    assert run(*words, "--output", tmp_path / "tags.jsonl") == 0
    rows = {row["image"]: row["tags"] for row in read_table(tmp_path / "tags.jsonl")}
    assert rows == {name: "; ".join(tags) for name, tags in zip(names, expected, strict=True)}
    capsys.readouterr()
    assert run(*words, "--filter", "path LIKE '%inner%'", "--top-k", 1) == 0
    assert capsys.readouterr().out.count("inner") == 3
    assert run(*words, "--write-xmp") == 2
    assert f"{gone}  error: there is no such file, beside which a sidecar" in capsys.readouterr().out


def test_tag_is_nearer_than_all_of_the_background(features: Any, cosines: Any, small_model: Any):
    model, processor, _ = small_model
    labels, background = [*LABELS[:2], *LABELS[4:]], LABELS[2:4]
    tagger = ImageTagger(model, processor, labels, background=background)
    own, others = cosines[:, [0, 1, 4, 5]], cosines[:, 2:4].amax(dim=1, keepdim=True)
    assert 0 < (own > others).sum() < own.numel()
    for row, tags in zip(own > others, tagger.tags_of(features), strict=True):
        assert {tag["label"] for tag in tags} == {labels[i] for i in row.nonzero().flatten().tolist()}
        assert [tag["score"] for tag in tags] == sorted((tag["score"] for tag in tags), reverse=True)
    pair = torch.stack([own[0, 0], others[0, 0]]) * float(model.logit_scale.detach().exp())
    assert float(tagger.scores_of(features)[0, 0]) == pytest.approx(float(pair.softmax(0)[0]), abs=1e-5)


def test_saved_classifier_brings_its_thresholds(
    photos: Path, features: Any, small_model: Any, tmp_path: Path, recwarn: Any, capsys: Any
):
    model, processor, folder = small_model
    classifier = ZeroShotClassifier(model, processor, LABELS[:2], scores="sigmoid", progress=False)
    classifier.save(tmp_path / "bare.safetensors")
    names = names_in(photos)
    classifier.calibrate(names, [["one"], [], ["one", "two"], [], ["two"], []], progress=False)
    classifier.save(tmp_path / "digits.safetensors")
    tags = ImageTagger.load(tmp_path / "digits.safetensors", model, processor).tags_of(features)
    right = classifier.classify(names, thresholds=True)
    assert [[tag["label"] for tag in found] for found in tags] == [[tag["label"] for tag in found] for found in right]
    assert main(["tag", names[0], "--model", folder, "--classifier", str(tmp_path / "bare.safetensors")]) == 1
    assert "has no thresholds: give one with --threshold" in capsys.readouterr().err


def test_classifier_of_another_model_is_refused(digits: Path, small_model: Any, tmp_path: Path, recwarn: Any):
    from hf_clip import HfClipModel

    model, processor, _ = small_model
    other = HfClipModel.from_pretrained(digits / "vit")
    torch.nn.init.normal_(other.visual_projection.weight)
    ZeroShotClassifier(other, processor, ["a"], scores="cosine", progress=False).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="was made by another model than this one"):
        ImageTagger.load(tmp_path / "a.safetensors", model, processor, threshold=0.1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{photos}", "--model", "m"], "give --labels or --classifier"),
        (["{photos}", "--labels", "a"], "A model is needed to encode images: give --model, or --index"),
        (["--labels", "a", "--model", "m"], "give one or --index"),
        (["{photos}", "--index", "i", "--labels", "a"], "give one or --index"),
        (["--index", "{photos}/none", "--labels", "a"], "There is no index"),
        (["{photos}", "--model", "m", "--labels", "none.txt"], "There is no file none.txt of labels"),
        (["{photos}", "--model", "m", "--labels", "a,a"], "The label 'a' appears twice"),
        (["{photos}", "--model", "m", "--labels", "a", "--filter", "x"], "--filter is a condition on the columns"),
        (["{photos}", "--model", "m", "--labels", "a", "--output", "tags.xlsx"], "ends in none of .csv, .jsonl"),
        (["{photos}", "--model", "m", "--classifier", "c", "--scores", "cosine"], "A saved classifier has its scores"),
        (["rows.csv", "--model", "m", "--labels", "a", "--write-xmp"], "which a data set has none of"),
        (["{photos}", "--model", "m", "--labels", "a;b"], "Label 0, 'a;b', cannot be a tag: it holds a semi"),
        (["{photos}", "--model", "m", "--labels", "a", "--scores", "cosine"], "need a threshold, since each mo"),
        (["{photos}", "--model", "{model}", "--labels", "a", "--scores", "sigmoid"], "was trained with a softmax"),
        (["{photos}", "--model", "{model}", "--classifier", "none"], "There is no classifier none"),
    ],
)
def test_refusals(words: list[str], line: str, photos: Path, small_model: Any, tmp_path: Path, capsys: Any):
    assert main(["tag", *(word.format(photos=photos, model=small_model[2]) for word in words)]) == 1
    shown = capsys.readouterr().err
    assert f"error: {shown.rpartition('error: ')[2]}".count("\n") == 1
    assert line in shown


def test_images_of_which_none_can_be_opened(photos: Path, small_model: Any, capsys: Any):
    Image.new("RGB", (9, 9)).save(photos / "x.png")
    assert run(photos / "broken.png", photos / "no.png", "--model", small_model[2]) == 1
    assert "error: none of 2 images could be tagged\n" in capsys.readouterr().err
