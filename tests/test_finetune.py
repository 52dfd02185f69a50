"""finetune.py as a user runs it, and the demo built on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import demo.__main__ as demo
import finetune
from demo.digits import (
    COLOURS,
    COMBINATIONS,
    DIGITS,
    Combination,
    load_split_digits,
    make_dataset,
    untrained_combinations,
)
from demo.model import write_fresh_model
from hf_clip.training.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 digits at the ViT's size, and a fresh model beside them."""
    folder = tmp_path_factory.mktemp("digits")
    pairs = make_dataset(16, 640)
    pairs.save_to_disk(folder / "data")
    write_fresh_model(folder / "fresh", "vit", pairs["train"]["caption"][:], seed=0)
    return folder


def settings(digits: Path, output: Path, **fields: object) -> TrainingConfig:
    chosen = {"learning_rate": 2e-3, "batch_size": 64, "max_steps": 30, "warmup_steps": 5, "logging_steps": 5}
    chosen |= {"model": str(digits / "fresh"), "dataset": str(digits / "data"), "output_dir": str(output)}
    return TrainingConfig(**(chosen | {"num_workers": 0} | fields))


def test_training_lowers_the_loss_and_saves_a_folder_that_loads(digits: Path, tmp_path: Path):
    finetune.train(settings(digits, tmp_path / "out"))
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 10, 15, 20, 25, 30]
    assert set(records[0]) == {"step", "loss", "learning_rate", "logit_scale", "images_per_second"}
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    assert records[-1]["learning_rate"] < 1e-4  # the cosine comes to its end
    assert max(record["learning_rate"] for record in records) == pytest.approx(2e-3, rel=0.1)
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer("a red seven").input_ids[0] == model.config.text_config.bos_token_id
    before, after = (load_file(folder / "model.safetensors") for folder in (digits / "fresh", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["text_projection.weight"], after["text_projection.weight"])


def test_same_seed_gives_the_same_weights(digits: Path, tmp_path: Path):
    for name in ("first", "second"):
        finetune.train(settings(digits, tmp_path / name, max_steps=6, seed=3))
    finetune.train(settings(digits, tmp_path / "other", max_steps=6, seed=4))
    first, second, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second", "other"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["visual_projection.weight"], other["visual_projection.weight"])


def test_logit_scale_is_clamped(digits: Path, tmp_path: Path):
    model = AutoModel.from_pretrained(digits / "fresh")
    model.logit_scale.data.fill_(6.0)
    model.save_pretrained(tmp_path / "hot")
    AutoProcessor.from_pretrained(digits / "fresh").save_pretrained(tmp_path / "hot")
    finetune.train(settings(digits, tmp_path / "out", model=str(tmp_path / "hot"), max_steps=5))
    assert AutoModel.from_pretrained(tmp_path / "out").logit_scale.exp() <= 100.001


def test_divergence_stops_with_advice_and_saves_no_model(digits: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"The loss became nan at step \d+ .*Lower --learning_rate"):
        finetune.train(settings(digits, tmp_path / "out", learning_rate=1e18, warmup_steps=0))
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_before_training(digits: Path, tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty"):
        finetune.train(settings(digits, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_failed_run_leaves_an_earlier_one_as_it_was(digits: Path, tmp_path: Path):
    finetune.train(settings(digits, tmp_path / "out", max_steps=5))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "metrics.jsonl" in before
    with pytest.raises(ValueError, match="The loss became nan"):
        finetune.train(settings(digits, tmp_path / "out", learning_rate=1e18, warmup_steps=0, overwrite=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "/no/model"}, "There is no model folder /no/model"),
        ({"--dataset": "/no/data"}, "There is no data set '/no/data'"),
        ({"--batch_size": "1"}, "batch_size is 1"),
    ],
)
def test_command_line_errors_are_one_line(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    message: str,
):
    flags = {"--model": digits / "fresh", "--dataset": digits / "data", "--output_dir": tmp_path / "out"} | change
    monkeypatch.setattr(sys, "argv", ["finetune.py", *(str(word) for pair in flags.items() for word in pair)])
    assert finetune.main() == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_accelerate_launch_runs_it(digits: Path, tmp_path: Path):
    """The command of the README, in processes of its own, with a worker that reads the data."""
    flags = {"model": digits / "fresh", "dataset": digits / "data", "output_dir": tmp_path / "out", "max_steps": 3}
    flags |= {"batch_size": 32, "warmup_steps": 1}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "finetune.py")]
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- the demo --------------------------------------------------------------------------------------------------------


def test_captions_are_english():
    assert Combination(7, "red", "green").caption() == "a photo of a red seven on green paper"
    assert Combination(0, "orange", "black").caption() == "a photo of an orange zero on black paper"
    assert len({combination.caption() for combination in COMBINATIONS}) == 560


@pytest.mark.parametrize("seed", range(3))
def test_untrained_combinations_leave_every_digit_and_colour_in_training(seed: int):
    untrained = untrained_combinations(seed)
    trained = [combination for combination in COMBINATIONS if combination not in untrained]
    pairs = {(combination.digit, combination.ink) for combination in trained}
    assert 80 - len(pairs) == 16  # a fifth of the digit–ink pairs appears on no paper
    assert len(untrained) == 16 * 7 + 44
    assert {combination.digit for combination in trained} == set(range(len(DIGITS)))
    assert {c.ink for c in trained} == {c.paper for c in trained} == set(COLOURS)


def test_splits_share_neither_images_nor_combinations():
    (train, _), (test, _) = load_split_digits(0)
    assert len(train) + len(test) == 1797
    pairs = make_dataset(16, 2000)
    untrained = untrained_combinations(0)
    seen = {COMBINATIONS[target] for target in pairs["train"]["target"]}
    assert not seen & untrained
    assert {COMBINATIONS[target] for target in pairs["unseen_combinations"]["target"]} <= untrained
    assert not {COMBINATIONS[target] for target in pairs["held_out_images"]["target"]} & untrained
    for split in pairs.values():
        for caption, target in zip(split["caption"][:20], split["target"][:20], strict=True):
            combination = COMBINATIONS[target]
            assert DIGITS[combination.digit] in caption
            assert combination.ink in caption
            assert f"{combination.paper} paper" in caption
    colours = {tuple(colour) for colour in COLOURS.values()}
    assert pairs["train"][0]["image"].getpixel((0, 0)) in colours  # a corner shows the paper


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_demo_runs_from_data_to_picture(tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """The whole way with a short training, whose scores must already be far above chance."""
    monkeypatch.setitem(demo.TRAINING, tower, demo.TRAINING[tower] | {"max_steps": 60})
    monkeypatch.setitem(demo.TRAIN_SIZE, tower, 4000)
    scores = demo.run(tower, tmp_path, seed=0)
    assert scores.keys() == {"held_out_images", "unseen_combinations"}
    assert scores["held_out_images"] > 10 / 560
    with Image.open(tmp_path / f"demo-{tower}.png") as picture:
        assert picture.size[0] > 1000
    assert json.loads((tmp_path / f"demo-{tower}.json").read_text()) == scores
    out = capfd.readouterr().out
    assert "held out images" in out
    assert str(tmp_path / f"demo-{tower}.png") in out


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_demo_reaches_what_the_readme_says(tower: str, tmp_path: Path):
    scores = demo.run(tower, tmp_path, seed=0)
    assert scores["held_out_images"] >= 0.9
    assert scores["unseen_combinations"] >= 0.6
