"""Linear probes of a model on images, from end to end."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from transformers import AutoModel, AutoProcessor

from demo.digits import DIGITS
from hf_clip.commands import program
from hf_clip.evaluation.embedder import Embedder, NotFiniteFeaturesError
from hf_clip.evaluation.linear_probe import LinearProbeResult, evaluate_linear_probe, probe_features
from hf_clip.evaluation.probe_encoding import encode_splits
from hf_clip.evaluation.reports import card_results, record_of, table_rows

from ..neighbours.stock import stock_model
from .data_sets import TEMPLATES, stored_rows, write_class_folders, write_shards

Clip = tuple[Any, Any]


@pytest.fixture(scope="module")
def images(digits: Path) -> list[dict[str, Any]]:
    return stored_rows(digits, 720)[::4][:160]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: list[dict[str, Any]]) -> Path:
    """Class folders below train/ and test/. Tests must not write there."""
    place = tmp_path_factory.mktemp("probe") / "digits"
    write_class_folders(place / "train", images[:100])
    write_class_folders(place / "test", images[100:])
    return place


@pytest.fixture(scope="module")
def measured(small_clip: Clip, folder: Path) -> LinearProbeResult:
    return evaluate_linear_probe(*small_clip, folder, protocol="openai", batch_size=16)


def test_figures_are_those_of_features_taken_by_hand(small_clip: Clip, folder: Path, measured: LinearProbeResult):
    model, processor = small_clip
    features, labels = {}, {}
    for split in ("train", "test"):
        paths = sorted((folder / split).rglob("*.png"))
        pixels = processor(images=[str(path) for path in paths], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features[split] = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        labels[split] = [path.parent.name for path in paths]
    by_hand = LogisticRegression(C=0.316, max_iter=1000).fit(features["train"], labels["train"])
    assert measured.metrics["acc1"] == pytest.approx(by_hand.score(features["test"], labels["test"]))
    predicted = by_hand.predict(features["test"]).tolist()
    assert measured.confusion is not None
    assert measured.confusion.tolist() == confusion_matrix(labels["test"], predicted, labels=sorted(DIGITS)).tolist()
    assert len(set(predicted)) > 5
    assert (measured.count, measured.split, measured.precision) == (60, "test", "float32")
    assert measured.labels == sorted(DIGITS)
    assert measured.processor["size"] == {"shortest_edge": 16}
    assert sum(row.images for row in measured.per_class) == 60


def test_features_of_a_vit_lie_before_the_projection(small_clip: Clip, folder: Path):
    model, processor = small_clip
    found = encode_splits(model, processor, folder)
    paths = sorted((folder / "test").rglob("*.png"))
    pixels = processor(images=[str(path) for path in paths], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        projected = model.encode_image(pixels)
    assert found.test.pooled is not None
    torch.testing.assert_close(found.test.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.test.projected, projected, rtol=1e-4, atol=1e-5)
    stock = encode_splits(stock_model(model), processor, folder)
    assert stock.test.pooled is not None
    torch.testing.assert_close(stock.test.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stock.test.projected, projected, rtol=1e-4, atol=1e-5)


def test_resnets_probe_is_of_the_attention_pool(digits: Path, folder: Path):
    model, processor = AutoModel.from_pretrained(digits / "resnet"), AutoProcessor.from_pretrained(digits / "resnet")
    found = encode_splits(model.train(), processor, folder)
    assert model.training
    assert found.test.pooled is None
    assert found.test.projected.shape == (60, 32)
    assert "paper: output of the attention pool, L-BFGS" in probe_features(found).protocol


def test_layouts_give_the_same_figures(
    small_clip: Clip, folder: Path, images: list[dict[str, Any]], measured: LinearProbeResult, tmp_path: Path
):
    write_shards(tmp_path / "wds", images[:100], split="train", per_shard=60)
    write_shards(tmp_path / "other", images[100:], per_shard=60)
    (tmp_path / "other" / "test").rename(tmp_path / "wds" / "test")
    found = evaluate_linear_probe(*small_clip, tmp_path / "wds", protocol="openai")
    assert found.metrics == pytest.approx(measured.metrics, abs=1e-3)

    def table(rows: list[dict[str, Any]]) -> Dataset:
        stored = {"image": [{"bytes": row["bytes"], "path": None} for row in rows]}
        labels = [DIGITS[row["label"]] for row in rows]
        return Dataset.from_dict(stored | {"label": labels}).cast_column("image", Image())

    splits = DatasetDict(train=table(images[:100]), test=table(images[100:]))
    found = evaluate_linear_probe(*small_clip, splits, protocol="openai")
    assert found.metrics == pytest.approx(measured.metrics, abs=1e-3)
    assert found.split == "test"
    # A split that lacks a class: its other classes keep their places.
    splits["test"] = table([row for row in images[100:] if row["label"] != 4])
    found = evaluate_linear_probe(*small_clip, splits, protocol="openai")
    assert {row.name: row.recall for row in found.per_class} == {
        row.name: row.recall for row in measured.per_class if row.name != "four"
    }


def test_all_protocols_share_the_kept_features(
    small_clip: Clip, folder: Path, tmp_path: Path, measured: LinearProbeResult, monkeypatch: pytest.MonkeyPatch
):
    def measure(protocol: str) -> LinearProbeResult:
        return evaluate_linear_probe(*small_clip, folder, protocol=protocol, feature_cache=tmp_path, batch_size=16)

    encoded: list[int] = []
    real = Embedder.encode
    monkeypatch.setattr(Embedder, "encode", lambda self, pixels: encoded.append(len(pixels)) or real(self, pixels))
    assert measure("openai").metrics == measured.metrics
    assert sum(encoded) == 160
    paper = measure("paper")
    assert measure("openai").metrics == measured.metrics
    assert sum(encoded) == 160
    assert len(list(tmp_path.iterdir())) == 2
    assert (
        "by search on 20% of each class of train, held out with seed 0, then fitted to train and validation"
        in paper.protocol
    )


def test_validation_split_is_found(small_clip: Clip, images: list[dict[str, Any]], tmp_path: Path):
    for name, rows in (("train", images[:60]), ("val", images[60:100]), ("test", images[100:])):
        write_class_folders(tmp_path / name, rows)
    found = encode_splits(*small_clip, tmp_path)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 60, "validation": 40, "test": 60}
    found = encode_splits(*small_clip, tmp_path, split="val")
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 60, "test": 40}
    with pytest.raises(ValueError, match=r"the validation split is 'train', which is fitted or measured on already"):
        encode_splits(*small_clip, tmp_path, validation_split="train")


def test_data_that_no_probe_can_be_fitted_to(small_clip: Clip, images: list[dict[str, Any]], tmp_path: Path):
    write_class_folders(tmp_path / "train", [row for row in images[:60] if row["label"] != 3])
    with pytest.raises(ValueError, match=r"would be fitted and measured on one split, 'train'; its splits are train"):
        encode_splits(*small_clip, tmp_path)
    write_class_folders(tmp_path / "test", images[60:100])
    with pytest.raises(ValueError, match=r"its split 'test' has the class 'three', which train does not have; its"):
        encode_splits(*small_clip, tmp_path)
    with pytest.raises(ValueError, match=r"has no split 'extra'; its splits are .* Name the one that is meant"):
        encode_splits(*small_clip, tmp_path, train_split="extra")
    stored = [{"bytes": row["bytes"], "path": None} for row in images[:5]]
    table = Dataset.from_dict({"image": stored, "label": [1] * 5}).cast_column("image", Image())
    with pytest.raises(ValueError, match=r"all images of its split 'train' are of one class, 'one': a linear"):
        encode_splits(*small_clip, {"train": table, "test": table}, class_names=DIGITS)


def test_model_that_gives_nan(small_clip: Clip, folder: Path):
    model = copy.deepcopy(small_clip[0])
    model.vision_model.post_layernorm.weight.data[0] = torch.nan
    with pytest.raises(NotFiniteFeaturesError, match=r"The model's feature of eight/\d+\.png holds NaN"):
        encode_splits(model, small_clip[1], folder)


def test_record_has_clip_benchmarks_keys_and_the_published_figure(measured: LinearProbeResult):
    record = record_of(measured, task="linear-probe", model="mine", dataset="CIFAR10", architecture="ViT-B/32")
    assert record["task"] == "linear_probe"
    assert {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall"} <= set(record["metrics"])
    assert (record["metric"], record["protocol_name"]) == ("lp_acc1", "openai")
    assert record["published"] == 95.1
    header, [row] = table_rows([record])
    assert dict(zip(header, row, strict=True)) == {
        "model": "mine",
        "dataset": "CIFAR10",
        "metric": "lp_acc1, openai",
        "count": "60",
        "value": f"{100 * measured.value:.1f} %",
        "published": "95.1 %",
    }
    entry = card_results(record)[0]
    assert (entry.task_type, entry.task_name) == ("image-classification", "linear_probe (openai)")


def run(*words: object) -> int:
    return program.main(["evaluate", "linear-probe", *map(str, words)])


def test_command_and_its_file_of_features(
    digits: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--model", digits / "vit", "--dataset", folder, "--output", tmp_path / "results", "--no-plots"]
    words += ["--protocol", "openai", "--save-features", tmp_path / "f.safetensors"]
    words += ["--few-shot", "1,2", "--few-shot-draws", 2, "--lp-plus-plus", "--templates", TEMPLATES[0]]
    assert run(*words) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()[:6]]
    shown = ["lp_acc1, openai", "1-shot linear probe", "1-shot LP++", "2-shot linear probe", "2-shot LP++"]
    assert [[part for part in line if part][2].strip() for line in lines[1:]] == shown
    first = json.loads((tmp_path / "results" / "results.json").read_text())[0]
    assert first["pretrained"] == str(digits / "vit")
    assert [(row["head"], row["shots"], len(row["values"])) for row in first["few_shot"]] == [
        ("linear probe", 1, 2), ("LP++", 1, 2), ("linear probe", 2, 2), ("LP++", 2, 2)
    ]  # fmt: skip
    assert first["metrics"]["lp_acc1_2_shot"] == first["few_shot"][2]["mean"]
    assert first["metrics"]["lp_plus_plus_acc1_2_shot_std"] == first["few_shot"][3]["std"]
    assert run(*words) == 1
    assert "f.safetensors is there already: measure it by --features, or remove it." in capsys.readouterr().err
    alone = ["--features", tmp_path / "f.safetensors", "--protocol", "openai", "--output", tmp_path / "more"]
    assert run(*alone) == 0
    again = json.loads((tmp_path / "more" / "results.json").read_text())[0]
    assert {name: first["metrics"][name] for name in again["metrics"]} == again["metrics"]
    assert (again["dataset"], again["model"], again["precision"]) == (str(folder), "hf_clip", "float32")
    assert run(*alone) == 0
    assert "measured before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m"], "error: --dataset is missing: name models and data sets, or a file of features by --feat"),
        (
            ["--features", "f", "--model", "m"],
            "error: --features is what a model has made of a data set already",
        ),
        (
            ["--features", "f"],
            "error: There is no file of features 'f'; `hf-clip evaluate linear-probe --save",
        ),
        (
            ["--features", "f", "--split", "test"],
            "of a data set already: leave --split out, which has no effect on it.",
        ),
        (["--features", "f", "--batch-size", "8"], "leave --batch-size out, which has no effect on it."),
        (["--features", "f", "--seed", "-1"], "error: The seed is -1, but a whole number from 0 to 4,294,967,295 is"),
        (["--features", "f", "--few-shot", "²"], "error: --few-shot is '²', but numbers of images of each class are"),
        (["--features", "f", "--few-shot", "9" * 5000], "…, but numbers of images of each class are needed, such as"),
        (["--features", "f", "--few-shot", ","], "error: --few-shot is ',', but numbers of images of each class are"),
        (["--features", "~no-such-user/x"], "error: There is no file of features '~no-such-user/x'; `hf-clip evaluate"),
        (
            ["--model", "m", "--dataset", "d", "--save-features", "/proc/f"],
            "error: /proc cannot be written: /proc ",
        ),
        (
            ["--model", "m", "--dataset", "d", "--save-features", "~/f", "--output", __file__],
            "test_linear_probe.py is a file, but a folder to write to is needed: name another.",
        ),
        (
            ["--model", "m", "--dataset", "d", "--save-features", "~/f", "--metric", "acc9"],
            "error: --metric is 'acc9', but there is no such metric: name one of acc1, acc5,",
        ),
        (
            ["--model", "m", "--dataset", "d", "--save-features", "~/f", "--update-card"],
            "README.md is not there, so results have no place: --update-card takes a local repository with a card.",
        ),
        (
            ["--model", "m", "n", "--dataset", "d", "--save-features", "f"],
            "error: --save-features names one file, but there are 2 models and 1 data sets: name one of each.",
        ),
        (
            ["--model", "m", "--dataset", "d", "--few-shot", "1-16"],
            "error: --few-shot is '1-16', but numbers of images of each class are needed, such as 1,2,4,8,16.",
        ),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert run(*words) == 1
    assert message in capsys.readouterr().err
