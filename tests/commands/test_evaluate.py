"""`hf-clip evaluate`: a grid of models and data sets, what is written, and what a failure leaves."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from PIL import Image
from transformers import AutoModel

from hf_clip import HfClipModel, HfClipProcessor, encode_images
from hf_clip.commands import program
from hf_clip.evaluation import grid
from hf_clip.evaluation.feature_cache import weights_hash
from hf_clip.zero_shot.embedding_head import EmbeddingHead

from ..evaluation.data_sets import TEMPLATES, captioned, stored_rows, write_class_folders
from ..neighbours.stock import stock_model


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders, captions, pairs of captions, templates. Tests must not write there."""
    folder, rows = tmp_path_factory.mktemp("data"), stored_rows(digits, 30)
    write_class_folders(folder / "shapes", rows)
    table = captioned(rows)
    table.save_to_disk(folder / "captions")
    table.add_column("negative_caption", [row["caption"] for row in rows[1:] + rows[:1]]).save_to_disk(
        folder / "choices"
    )
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    return folder


def run(*words: object) -> int:
    return program.main(["evaluate", *map(str, words)])


def test_models_times_data_sets(
    digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(digits / "vit", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    words = ["zero-shot", "--templates", data / "templates.txt", "--output", tmp_path / "results", "--no-plots"]
    both = [*words, "--model", tmp_path / "mine", digits / "resnet", "--dataset", data / "shapes", data / "absent"]
    assert run(*both) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["model", "dataset", "metric", "count", "value"]
    assert [line.split()[1:3] for line in out.splitlines()[1:3]] == [[str(data / "shapes"), "acc1"]] * 2
    failures = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(failures) == 2
    assert f"error: {tmp_path / 'mine'} on {data / 'absent'}: There is no data set" in failures[0]
    records = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {record["pretrained"] for record in records} == {str(tmp_path / "mine"), str(digits / "resnet")}
    assert all(record["split"] == "train" and record["precision"] == "float32" for record in records)
    assert len(list((tmp_path / "results" / "cells").glob("*.json"))) == 2
    # Finished cells are skipped, whatever a model would say now; a card takes them all the same.
    monkeypatch.setattr(grid, "load_model", lambda *given: pytest.fail("loaded again"))
    for _ in range(2):  # what is written into the card does not make another model
        assert run(*words, "--model", tmp_path / "mine", "--dataset", data / "shapes", "--update-card") == 0
        assert "measured before" in capsys.readouterr().err
    assert "zero-shot-image-classification" in (tmp_path / "mine" / "README.md").read_text()
    assert len(json.loads((tmp_path / "results" / "results.json").read_text())) == 2


def test_each_cell_has_its_pictures(digits: Path, data: Path, tmp_path: Path):
    words = ["zero-shot", "--model", digits / "vit", "--dataset", data / "shapes", "--mistakes", 4]
    assert run(*words, "--output", tmp_path) == 0
    (folder,) = (path for path in (tmp_path / "cells").iterdir() if path.is_dir())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["confusion.png", "mistakes.png", "per_class.csv", "reliability.png"]
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64) or []) > 20


def test_changed_model_is_measured_again(digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(digits / "vit", tmp_path / "mine")
    words = ["zero-shot", "--model", tmp_path / "mine", "--dataset", data / "shapes", "--no-plots"]
    words += ["--output", tmp_path / "results"]
    assert run(*words) == 0
    assert run(*words) == 0
    assert "measured before" in capsys.readouterr().err
    shutil.copyfile(digits / "vit" / "model.safetensors", tmp_path / "mine" / "model.safetensors")
    assert run(*words) == 0
    assert "measured before" not in capsys.readouterr().err
    assert run(*words, "--dtype", "bfloat16") == 0
    records = json.loads((tmp_path / "results" / "results.json").read_text())
    assert sorted(record["precision"] for record in records) == ["bfloat16", "float32"]


def test_optimized_model_has_the_same_figures_and_features(
    digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The features are kept by the weights that the model had before."""
    words = ["zero-shot", "--model", digits / "vit", "--dataset", data / "shapes", "--no-plots"]
    words += ["--output", tmp_path / "results"]
    assert run(*words) == 0
    assert run(*words, "--optimize", "--feature-cache", tmp_path / "cache") == 0
    assert f"{digits / 'vit'}: optimized: " in capsys.readouterr().err
    first, second = json.loads((tmp_path / "results" / "results.json").read_text())
    assert first["metrics"] == pytest.approx(second["metrics"], abs=1e-5)
    model, _ = grid.load_model(str(digits / "vit"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert json.loads((folder / "cache.json").read_text())["weights"] == weights_hash(model)


def test_stock_model_stays_as_it_is(digits: Path):
    model = stock_model(grid.load_model(str(digits / "vit"))[0])
    assert grid._optimized(model) == "not optimized, since CLIPModel has no optimize_for_inference"


def test_images_that_cannot_be_opened_are_counted(
    digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hf_clip.evaluation.unreadable_images.MOST_UNREADABLE", 0.1)
    rows = load_from_disk(data / "captions")
    broken = [{"image": {"bytes": b"none", "path": None}, "caption": "nothing"}] * 2
    broken[1] = {"image": {"bytes": b"no image", "path": None}, "caption": "nothing"}
    concatenate_datasets([rows, Dataset.from_list(broken, features=rows.features)]).save_to_disk(tmp_path / "some")
    assert run("retrieval", "--model", digits / "vit", "--dataset", tmp_path / "some", "--output", tmp_path / "r") == 0
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'some'}: 2 images could not be opened and are left out\n" in err
    assert "mean_recall@1" in out


def test_retrieval_and_composition(digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["--model", digits / "vit", "--output", tmp_path]
    assert run("retrieval", "--dataset", data / "captions", *common) == 0
    assert "mean_recall@1" in capsys.readouterr().out
    assert run("compose", "--dataset", data / "choices", *common) == 0
    assert "text_score" in capsys.readouterr().out
    tasks = [record["task"] for record in json.loads((tmp_path / "results.json").read_text())]
    assert tasks == ["image_caption_selection", "zeroshot_retrieval"]
    for name, content in {"list": "[]", "other": '{"a": 1}', "cut": '{"dataset": "d", '}.items():
        (tmp_path / "cells" / f"{name}.json").write_text(content)
    assert run("compose", "--dataset", data / "choices", *common) == 0
    out, err = capsys.readouterr()
    assert "text_score" in out
    assert err.count("left out of the results: ") == 3
    assert f"{tmp_path / 'cells' / 'cut.json'} holds no record of a measurement; remove it." in err
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert "image_retrieval_recall@10" in (tmp_path / "results.md").read_text()


def test_list_names_the_papers_data_sets(capsys: pytest.CaptureFixture[str]):
    assert run("list", "--architecture", "RN50") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["name", "metric"]
    assert lines[2].split() == ["CIFAR10", "acc1", "75.6", "88.7", "clip-benchmark/wds_vtab-cifar10"]
    assert len(lines) == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["zero-shot", "--dataset", "x"], "error: Missing option '--model'. See hf-clip evaluate zero-shot --help."),
        (["zero-shot", "--model", "m", "--dataset", "UCF101"], "the Hub has no copy that is read as it is: name your"),
        (["list", "--architecture", "RN7"], "error: 'RN7' is no model of the paper's; those are RN50, RN101,"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(digits / "vit") if word == "m" else word for word in words]
    output = [] if words[0] == "list" else ["--output", str(tmp_path)]
    assert run(*words, *output) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["zero-shot", "linear-probe", "retrieval", "compose", "head", "interpolate"])
def test_device_is_looked_at_first(task: str, capsys: pytest.CaptureFixture[str]):
    words = ["m", "n"] if task == "interpolate" else ["--model", "m", *(["--name", "x"] if task == "head" else [])]
    assert run(task, *words, "--dataset", "d", "--device", "foo") == 1
    assert "error: Invalid value for '--device': device='foo' is no device; write cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "meta"], "'--device': device='meta' holds no values, so nothing can be measured; write cpu,"),
        (["--threads", "-5"], "error: Invalid value for '--threads': "),
        (["--batch-size", "0"], "error: Invalid value for '--batch-size': "),
        (["--output", __file__], "test_evaluate.py is a file, but a folder to write to is needed: name another."),
        (["--output", "/proc/x"], "error: /proc/x cannot be written: /proc "),
        (["--feature-cache", __file__], "'--feature-cache': {file} is a file, but a folder to write to is needed"),
        (["--metric", "acc9"], "error: --metric is 'acc9', but there is no such metric: name one of acc1, acc5,"),
        (["--update-card"], "README.md is not there, so results have no place: --update-card takes a local"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_is_loaded(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert run("zero-shot", "--model", "m", "--dataset", "d", *words) == 1
    shown = capsys.readouterr().err
    assert message.format(file=__file__) in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_home_in_a_path_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("zero-shot", "--model", "~no-such-user/m", "--dataset", "~no-such-user/d", "--output=~/results") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_each_value_stands_behind_the_name_of_its_option():
    given = ["evaluate", "zero-shot", "--model", "a", "b", "--split", "test", "--dataset", "c", "--dataset", "d", "e"]
    spread = "evaluate zero-shot --model a --model b --split test --dataset c --dataset d --dataset e"
    assert program.name_each(given) == spread.split()
    other: list[Any] = ["convert", "--model", "a", "b"]
    assert program.name_each(other) == other


def test_checkpoint_file_is_to_be_converted_first(tmp_path: Path):
    (tmp_path / "clip.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is a checkpoint file, but .* Convert it once, by `hf-clip convert"):
        grid.load_model(str(tmp_path / "clip.pt"))


def test_name_of_no_model_is_one_line():
    message = (
        r"^There is no folder 'clip-vit-b33', and no model of that name could be loaded from the Hub \(.*Check the"
    )
    with pytest.raises(FileNotFoundError, match=message):
        grid.load_model("clip-vit-b33")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "There is no folder FOLDER; check the path."),
        ({}, "FOLDER is a folder without a model: it has neither config.json nor open_clip_config.json. Name a"),
        ({"notes.json": "{}"}, "FOLDER is a folder without a model: it has neither config.json nor open_clip_config"),
        ({"config.json": "{}"}, "FOLDER is no model's folder: its config.json has no model_type. Name the folder"),
        ({"open_clip_config.json": "{}"}, "FOLDER has the layout of open_clip. Convert it once, by `hf-clip convert"),
    ],
)
def test_folder_without_a_model_is_one_line(
    files: dict[str, str] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    assert run("zero-shot", "--model", folder, "--dataset", "shapes", "--output", tmp_path / "results") == 1
    shown = capsys.readouterr().err
    assert f"error: {folder} on shapes: {message.replace('FOLDER', str(folder))}" in shown
    assert shown.count("\n") == 1


def test_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`python -m` and `accelerate launch -m` run it."""
    monkeypatch.delitem(sys.modules, "hf_clip.commands.evaluate.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["evaluate", "list", "--architecture", "RN7"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("hf_clip.commands.evaluate", run_name="__main__")
    assert "error: 'RN7' is no model of the paper's" in capsys.readouterr().err


def scores_of(digits: Path, folder: Path) -> Path:
    """A CSV of images with a score, which is their digit."""
    rows = stored_rows(digits, 40)
    folder.mkdir()
    for place, row in enumerate(rows):
        (folder / f"{place}.png").write_bytes(row["bytes"])
    lines = [f"{place}.png,{row['label']}" for place, row in enumerate(rows)]
    (folder / "scores.csv").write_text("\n".join(["image,digit", *lines]))
    return folder / "scores.csv"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves a CSV file open
def test_head_is_trained_and_used(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, table = tmp_path / "mine", scores_of(digits, tmp_path / "images")
    shutil.copytree(digits / "vit", model)
    words = ["head", "--model", model, "--dataset", table, "--score-column", "digit", "--output", tmp_path / "results"]
    file = model / "heads" / "digit.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"another head")
    assert run(*words, "--name", "digit") == 1
    assert f"{file} exists; name another head, or pass --overwrite to replace it" in capsys.readouterr().err
    assert file.read_bytes() == b"another head"
    assert run(*words, "--name", "digit", "--overwrite") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[2:4] == ["spearman", "8"]
    assert f"head: {file}" in err
    (record,) = json.loads((tmp_path / "results" / "results.json").read_text())
    assert (record["task"], record["split"], record["count"]) == ("image_scoring", "train", 8)
    images = [tmp_path / "images" / f"{place}.png" for place in (3, 1)]
    classify = ["classify", str(model), *map(str, images), "--output", str(tmp_path / "scores.csv")]
    assert program.main([*classify, "--head", "digit"]) == 0
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "image,label,score,error"
    head = EmbeddingHead.load(file)
    loaded, processor = HfClipModel.from_pretrained(model).eval(), HfClipProcessor.from_pretrained(model)
    expected = head.score(encode_images(loaded, processor, images))[:, 0].tolist()
    assert [line.split(",")[1] for line in lines[1:]] == ["digit", "digit"]
    assert [float(line.split(",")[2]) for line in lines[1:]] == pytest.approx(expected, abs=1e-4)
    capsys.readouterr()
    assert program.main(["classify", str(digits / "resnet"), str(images[0]), "--head", str(file)]) == 1
    assert f"error: The head {file} was trained on the embeddings of mine, and this" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "../x", "--dataset", "d"], "error: '../x' is no name of a head: letters, digits"),
        (["--name", "x", "--dataset", "d", "--seed", "-1"], "error: The seed is -1, but a whole number from 0"),
        (["--name", "x", "--dataset", "d", "e"], "error: 2 data sets are given, but a head is trained on one"),
        (["--name", "x", "--dataset", "{data}", "--score-column", "beauty"], "has no column 'beauty'; its columns are"),
    ],
)
def test_heads_that_are_refused(
    words: list[str], message: str, digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [word.format(data=data / "captions") for word in words]
    assert run("head", "--model", digits / "vit", *words, "--output", tmp_path) == 1
    assert message in capsys.readouterr().err
    assert not (digits / "vit" / "heads").exists()


def test_models_between_two(digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "tuned"
    shutil.copytree(digits / "vit", other)
    model = AutoModel.from_pretrained(other)
    model.visual_projection.weight.data *= -1
    model.save_pretrained(other)
    words = ["interpolate", digits / "vit", other, "--dataset", data / "shapes", data / "absent", "--alphas", "0,0.2,1"]
    words += ["--templates", data / "templates.txt", "--output", tmp_path / "results"]
    assert run(*words, "--save-best", tmp_path / "best") == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["alpha", "0", "0.2", "1"]
    assert err.count("error: ") == 1
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    records = {row["pretrained"].rpartition(" ")[2]: row for row in found}
    assert list(records) == ["0.00", "0.20", "1.00"]
    shown = [f"{100 * records[alpha]['metrics']['acc1']:.1f}" for alpha in records]
    assert [line.split()[1] for line in lines[1:4]] == shown
    best = float(lines[5].rpartition(" ")[2])
    saved = AutoModel.from_pretrained(tmp_path / "best").visual_projection.weight
    torch.testing.assert_close(saved, -model.visual_projection.weight * (1 - 2 * best))
    with Image.open(tmp_path / "results" / "interpolation--vit--tuned.png") as picture:
        assert picture.width > 500
    assert run(*words, "--save-best", tmp_path / "best") == 1
    assert "best exists and is not empty; name a new folder for --save-best" in capsys.readouterr().err
    assert run(*words) == 2
    assert capsys.readouterr().err.count("measured before") == 3


def test_alphas_and_models_that_do_not_fit(
    digits: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["interpolate", digits / "vit", digits / "resnet", "--dataset", data / "shapes"]
    assert run(*words, "--alphas", "0:1") == 1
    assert "error: '0:1' is no α to average with: write '0.5'" in capsys.readouterr().err
    for option, place in (("--output", tmp_path / "best"), ("--feature-cache", tmp_path / "best" / "features")):
        assert run(*words, "--save-best", tmp_path / "best", option, place) == 1
        message = f"error: --save-best is {tmp_path / 'best'} and {option} is {place}, but the model needs a folder"
        assert message in capsys.readouterr().err
        assert not (tmp_path / "best").exists()
    assert run(*words) == 1
    assert capsys.readouterr().err.startswith("error: The models cannot be averaged, since their architectures differ:")
