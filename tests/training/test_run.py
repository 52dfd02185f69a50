"""What a run does besides its steps, counting, averaging and choosing, and what it begins with."""

import json
import logging
import math
from pathlib import Path

import datasets
import pytest
import torch
from datasets import load_from_disk
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, pipeline

from hf_clip.checkpoints.wise_ft import interpolate_weights
from hf_clip.training import run_steps
from hf_clip.training.evaluating import Evaluations

from ..finetuning import largest_difference, records, train, weights

LABELS = ["a red seven", "a blue nine"]


def classify(folder: Path, size: int) -> list[dict]:
    image = Image.new("RGB", (size, size), (220, 30, 30))
    return pipeline("zero-shot-image-classification", model=str(folder))(image, candidate_labels=LABELS)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_step(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    chosen = {
        "max_steps": None,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 64,
        "logging_steps": 1,
        "save_steps": 2,
    }
    out = train(digits, tmp_path / "out", **chosen)
    assert [line["step"] for line in records(out)] == [1, 2, 3, 4, 5]  # 640 rows are 10 batches of 64
    state = json.loads((out / "checkpoints" / "step-00000002" / "run.json").read_text())
    assert (state["step"], state["epoch"], state["batch"]) == (2, 0, 4)
    said = (
        "A step adds up the gradients of 2 separate batches: a pair is contrasted with the 64 of its own batch alone."
    )
    assert said in capsys.readouterr().out
    whole = weights(out)
    # The last step again, by micro-batches.
    resumed = train(digits, out, **chosen, resume_from_checkpoint="latest", micro_batch_size=30)
    assert [line["step"] for line in records(resumed)] == [1, 2, 3, 4, 5]
    assert largest_difference(weights(out), whole) < 1e-4


def test_gradients_are_clipped(digits: Path, tmp_path: Path):
    """Plain SGD's step is as long as the gradient."""
    chosen = {"optim": "SGD", "learning_rate": "1", "weight_decay": 0.0, "max_steps": 1, "warmup_steps": 0}
    out = train(digits, tmp_path / "out", max_grad_norm=0.01, lr_scheduler_type="constant", **chosen)
    before, after = weights(digits / "vit"), weights(out)
    moved = math.sqrt(sum((after[name] - before[name]).double().square().sum().item() for name in before))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_gives_the_same_weights(
    digits: Path, tmp_path: Path, tower: str, precision: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    chosen = {"max_steps": 3, "per_device_train_batch_size": 16, "learning_rate": "1e-3"}
    plain = train(digits, tmp_path / "plain", tower, **chosen)
    again = train(digits, tmp_path / "again", tower, gradient_checkpointing=True, **chosen)
    # Checkpointing hooks a ViT's patches, which then go by another product; Adam makes much of such rounding.
    assert largest_difference(weights(plain), weights(again)) < 1e-4
    assert largest_difference(weights(plain), weights(digits / tower)) > 1e-3
    assert all(t.dtype in (torch.float32, torch.int64) for t in weights(plain).values())


# --- averages and choices --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_half_way_to_the_pretrained_weights(digits: Path, tmp_path: Path):
    """With adapters, which are merged, and by themselves make the same model of the pretrained one."""
    pretrained, chosen = weights(digits / "vit"), {"max_steps": 3, "lora_rank": 2, "learning_rate": "1e-2"}
    chosen |= {"lora_alpha": 6, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "mlp.fc2"]}
    whole = weights(train(digits, tmp_path / "whole", **chosen))
    half = weights(train(digits, tmp_path / "half", **chosen, average_with_pretrained="0.5"))
    assert largest_difference(half, interpolate_weights(pretrained, whole, 0.5)) < 1e-6
    assert largest_difference(half, whole) > 1e-3
    changed = {name for name in whole if not torch.equal(whole[name], pretrained[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed - {"logit_scale"}} == {"q_proj", "fc2"}
    for name, expected in (("whole", whole), ("half", half)):
        adapter = tmp_path / name / "adapter"
        assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert settings["lora_alpha"] == (6 if name == "whole" else 3)
        assert settings["base_model_name_or_path"] == "vit"  # without the path, since it is published
        loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(digits / "vit"), adapter)
        assert largest_difference(loaded.merge_and_unload().state_dict(), expected) < 1e-6
    train(digits, tmp_path / "half", max_steps=1, overwrite_output_dir=True)
    assert not (tmp_path / "half" / "adapter").exists()  # it would be another model's


FROM_TRAINED = {"per_device_train_batch_size": 48, "augmentation": "none", "validation": "100"}
RUIN = {"learning_rate": "0.1", "warmup_steps": 0, "max_steps": 4}


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned something, which a high rate ruins in four steps."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return train(digits, out, learning_rate="3e-3", warmup_steps=3, max_steps=40, **FROM_TRAINED)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_best_of_a_range_of_averages(
    digits: Path,
    tmp_path: Path,
    trained: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """In mixed precision too, where accelerate replaces the model's forward."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    chosen = FROM_TRAINED | RUIN | {"model": str(trained), "average_with_pretrained": "0:1:0.5"}
    out = train(digits, tmp_path / "out", **chosen)
    tried = records(out, "alpha")
    assert [record["alpha"] for record in tried] == [0, 0.5, 1]
    (start, end) = (record for record in records(out, "recall@1") if "alpha" not in record)
    slack = 0 if precision == "no" else 0.1  # the averages are evaluated in float32
    assert tried[0]["recall@10"] == pytest.approx(start["recall@10"], abs=slack or 1e-6)
    assert tried[2]["recall@10"] == pytest.approx(end["recall@10"], abs=slack or 1e-6)
    assert tried[0]["recall@10"] > tried[2]["recall@10"] + 0.05
    best = max(tried, key=lambda record: record["recall@1"])
    printed = capsys.readouterr().out
    assert f"α = {best['alpha']:g}, the best of 3 at recall@1" in printed
    averaged = f"averaged with the pretrained weights at α = {best['alpha']:g} (saved)"
    assert f"{best['recall@1']:.3f} at step {end['step']}, {averaged}" in printed
    assert f"averaged with the pretrained weights, α | {best['alpha']} |" in (out / "README.md").read_text()


def test_moving_average_is_saved(digits: Path, tmp_path: Path):
    """After one step of a run of one, with decay min(0.9, 2 / 3)."""
    chosen = {"max_steps": 1, "warmup_steps": 0}
    plain = weights(train(digits, tmp_path / "plain", **chosen))
    average = weights(train(digits, tmp_path / "average", ema_decay=0.9, **chosen))
    expected = interpolate_weights(weights(digits / "vit"), plain, 1 / 3)
    assert largest_difference(average, expected) < 1e-6


def test_best_weights_are_kept_and_patience_ends_the_run(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The rate is so high after the warm-up that the beginning is best."""
    chosen = {"validation": "60", "save_steps": 2, "metric_for_best_model": "recall@10", "save_total_limit": 100}
    out = train(
        digits,
        tmp_path / "out",
        max_steps=40,
        early_stopping_patience=2,
        learning_rate="3e-2",
        lr_scheduler_type="constant",
        **chosen,
    )
    evaluated = records(out, "recall@10")
    steps = [record["step"] for record in evaluated]
    best = max(evaluated, key=lambda record: record["recall@10"])
    assert steps == list(range(0, best["step"] + 5, 2))  # two evaluations without a new best, each once
    assert steps[-1] < 40
    said = f"stopped early at step {steps[-1]}: 2 evaluations without a new best recall@10 since step {best['step']}\n"
    assert said in capsys.readouterr().out
    stored = weights(out / "checkpoints" / f"step-{best['step']:08}" if best["step"] else digits / "vit")
    assert largest_difference(weights(out), stored) == 0
    assert f"{100 * best['recall@10']:.1f}" in (out / "README.md").read_text()


def test_evaluations_may_come_more_often_than_checkpoints(digits: Path, tmp_path: Path):
    chosen = {"validation": "60", "save_steps": 4, "eval_steps": 2, "metric_for_best_model": "recall@10"}
    out = train(digits, tmp_path / "out", max_steps=7, **chosen)
    assert [record["step"] for record in records(out, "recall@10")] == [0, 2, 4, 6, 7]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["best", "step-00000004"]


def test_a_metric_that_was_not_measured_is_refused(digits: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match="--metric_for_best_model zero_shot_top1 cannot be measured: zero-shot accuracy needs"
    ):
        train(digits, tmp_path / "out", validation="60", save_steps=1, metric_for_best_model="zero_shot_top1")
    assert not (tmp_path / "out").exists()


def test_start_that_was_best_is_kept_and_the_run_says_so(
    digits: Path, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture
):
    """A trained model, and a rate that ruins it."""
    chosen = FROM_TRAINED | RUIN | {"model": str(trained), "save_steps": 2, "metric_for_best_model": "recall@10"}
    capsys.readouterr()
    out = train(digits, tmp_path / "out", **chosen)
    start, middle, end = records(out, "recall@10")
    assert start["recall@10"] > max(middle["recall@10"], end["recall@10"])
    assert largest_difference(weights(out), weights(trained)) == 0
    printed = capsys.readouterr().out
    assert f"at the start: recall@1 {start['recall@1']:.3f}, recall@5 {start['recall@5']:.3f}, " in printed
    assert f"step 2: recall@1 {middle['recall@1']:.3f}, " in printed
    said = (
        f"recall@10 {start['recall@10']:.3f} at the start (kept), {end['recall@10']:.3f} at step 4 (the last): no eva"
    )
    assert said in printed
    assert "Training on 540 pairs, validation on 100 pairs. " in printed
    assert "4 steps of 48 pairs, 0.356 epochs." in printed
    assert " s of training" in printed

    del chosen["metric_for_best_model"]
    ruined = train(digits, tmp_path / "ruined", **chosen)
    said = f"{end['recall@1']:.3f} at step 4 (saved): the model was better before training; --metric_for_best_model re"
    assert said in capsys.readouterr().out
    row = f"| recall@1 | {100 * start['recall@1']:.1f} | {100 * end['recall@1']:.1f} |"
    assert row in (ruined / "README.md").read_text()


def test_figures_of_the_start_are_those_of_the_model(digits: Path, tmp_path: Path):
    """The first run ends with the model that the second starts from."""
    chosen = {"max_steps": 2, "validation": "100"}
    first = train(digits, tmp_path / "first", **chosen)
    second = train(digits, tmp_path / "second", **chosen, model=str(first))
    (_, end), (start, _) = records(first, "recall@1"), records(second, "recall@1")
    assert (start.pop("step"), end.pop("step")) == (0, 2)
    assert start == pytest.approx(end, abs=1e-6)


# --- rows that cannot be used ---------------------------------------------------------------------------------------


def test_too_many_bad_rows_at_the_end_lose_nothing(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Two of 128 rows, in a run of one epoch."""
    chosen = {"dataset": str(digits / "several"), "per_device_train_batch_size": 32, "max_steps": 4}
    message = r"rows cannot be used, more than --max_bad_fraction 0.01 allows; the first is row \d+ of .*"
    message += (
        r"go on from .*checkpoints/step-00000004 with --resume_from_checkpoint latest and a higher --max_bad_fraction"
    )
    with pytest.raises(ValueError, match=message):
        train(digits, tmp_path / "out", **chosen)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    out = train(digits, tmp_path / "out", resume_from_checkpoint="latest", max_bad_fraction=0.1, **chosen)
    whole = train(digits, tmp_path / "whole", max_bad_fraction=0.1, **chosen)
    assert largest_difference(weights(out), weights(whole)) == 0


def test_bad_rows_of_the_validation_data_are_logged_once_and_count(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pairs = load_from_disk(str(digits / "pairs"))
    held = pairs["held_out_images"].select(range(60)).cast_column("image", datasets.Image(decode=False))
    rows = held.to_list()
    rows[7]["image"] = {"bytes": b"no image", "path": None}
    rows[11]["caption"] = " "
    held = datasets.Dataset.from_list(rows, features=pairs["train"].features)
    datasets.DatasetDict(train=pairs["train"], held=held).save_to_disk(tmp_path / "data")
    chosen = {"dataset": str(tmp_path / "data"), "validation": "held", "max_steps": 2, "save_steps": 1}
    with caplog.at_level(logging.WARNING):
        train(digits, tmp_path / "out", max_bad_fraction=0.05, **chosen)
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_clip.training.data.bad_rows"]
    assert [line.split(" of ")[0] for line in lines] == ["skipped: row 7", "skipped: row 11"]
    assert "its image cannot be opened" in lines[0]
    assert "its caption is empty" in lines[1]
    message = r"2 of 60 rows cannot be used.*the first is row 7 of .*Repair the data, or pass a higher --max_bad_frac"
    with pytest.raises(ValueError, match=message):
        train(digits, tmp_path / "strict", **chosen)
    assert not (tmp_path / "strict").exists()


def test_refused_rows_leave_nothing_that_blocks_the_corrected_call(digits: Path, tmp_path: Path):
    rows = load_from_disk(str(digits / "pairs"))["train"].cast_column("image", datasets.Image(decode=False)).to_list()
    broken = [row | {"image": {"bytes": b"no image", "path": None}} for row in rows[:64]]
    features = load_from_disk(str(digits / "pairs"))["train"].features
    datasets.DatasetDict(train=datasets.Dataset.from_list(broken, features=features)).save_to_disk(tmp_path / "broken")
    with pytest.raises(ValueError, match="row"):
        train(digits, tmp_path / "out", dataset=str(tmp_path / "broken"), max_bad_fraction=1.0)
    assert not (tmp_path / "out").exists()
    assert (train(digits, tmp_path / "out", max_steps=1) / "model.safetensors").is_file()


def test_data_that_goes_away_lose_no_step(
    digits: Path, tmp_path: Path, prepared_here: None, monkeypatch: pytest.MonkeyPatch
):
    """Images in a folder, which is gone after the third step of a run without checkpoints."""
    pairs = load_from_disk(str(digits / "pairs"))["train"].select(range(200))
    for place in ("kept", "gone"):
        (tmp_path / place).mkdir()
        for number, row in enumerate(pairs):
            row["image"].save(tmp_path / place / f"{number}.png")
        lines = [f'{number}.png,"{caption}"' for number, caption in enumerate(pairs["caption"][:])]
        (tmp_path / place / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]) + "\n")
    chosen = {"max_steps": 6, "per_device_train_batch_size": 32, "max_bad_fraction": 1.0}
    whole = train(digits, tmp_path / "whole", dataset=str(tmp_path / "kept"), **chosen)

    def step_done(run: run_steps.Run, rates: dict[str, float]) -> None:
        original(run, rates)
        if run.state.step == 3:
            (tmp_path / "gone").rename(tmp_path / "elsewhere")

    original = run_steps.Run._step_done
    chosen |= {"dataset": str(tmp_path / "gone")}
    with monkeypatch.context() as patch:
        patch.setattr(run_steps.Run, "_step_done", step_done)
        message = r"The 3 steps so far are in .*step-00000003; --resume_from_checkpoint latest goes on from there"
        with pytest.raises(ValueError, match=message) as error:
            train(digits, tmp_path / "out", **chosen)
    assert len(str(error.value).splitlines()) == 1
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    out = train(digits, tmp_path / "out", resume_from_checkpoint="latest", **chosen)
    assert largest_difference(weights(out), weights(whole)) == 0


def test_validation_data_that_go_away_lose_no_step(
    digits: Path, tmp_path: Path, prepared_here: None, monkeypatch: pytest.MonkeyPatch
):
    """Gone when the third step is evaluated, before its checkpoint is written."""
    (tmp_path / "data").mkdir()
    pairs = load_from_disk(str(digits / "pairs"))["train"].select(range(120))
    for number, row in enumerate(pairs):
        row["image"].save(tmp_path / "data" / f"{number}.png")
    lines = [f'{number}.png,"{caption}"' for number, caption in enumerate(pairs["caption"][:])]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]) + "\n")
    chosen = {"dataset": str(tmp_path / "data"), "validation": "20", "max_steps": 6, "save_steps": 3}
    chosen |= {"per_device_train_batch_size": 32, "max_bad_fraction": 1.0, "ema_decay": 0.9}
    original = Evaluations.run

    def run(evaluations: Evaluations) -> None:
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        original(evaluations)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluations, "run", run)
        message = r"0 usable pairs.*The 3 steps so far are in .*step-00000003; --resume_from_checkpoint latest goes on"
        with pytest.raises(ValueError, match=message):
            train(digits, tmp_path / "out", **chosen)
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    out = train(digits, tmp_path / "out", resume_from_checkpoint="latest", **chosen)
    assert [record["step"] for record in records(out, "recall@1")] == [0, 3, 6]
    whole = train(digits, tmp_path / "whole", **chosen)
    assert largest_difference(weights(out), weights(whole)) == 0


# --- what a run begins with ------------------------------------------------------------------------------------------


def test_other_sizes(digits: Path, tmp_path: Path, tower: str):
    size = {"vit": 24, "resnet": 64}[tower]
    out = train(
        digits,
        tmp_path / "out",
        tower,
        image_size=size,
        max_text_length=32,
        max_steps=2,
        per_device_train_batch_size=16,
    )
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.vision_config.image_size == size
    assert model.config.text_config.max_position_embeddings == processor.tokenizer.model_max_length == 32
    assert processor(images=Image.new("RGB", (99, 50)), return_tensors="pt").pixel_values.shape[-2:] == (size, size)
    assert len(classify(out, size)) == 2


def test_from_scratch_with_a_vocabulary_of_the_captions(digits: Path, tmp_path: Path, tower: str):
    chosen = {
        "model": None,
        "variant": str(digits / f"{tower}.json"),
        "max_steps": 2,
        "per_device_train_batch_size": 16,
    }
    out = train(digits, tmp_path / "out", tower, loss="sigmoid", **chosen)
    processor = AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.tokenize("purple paper") == ["purple</w>", "paper</w>"]
    assert AutoModel.from_pretrained(out).config.contrastive_loss == "sigmoid"
    assert len(classify(out, 32)) == 2
    assert "trained from scratch" in (out / "README.md").read_text()


def test_from_scratch_with_a_small_vocabulary_and_no_special_ids(digits: Path, tmp_path: Path):
    values = json.loads((digits / "vit.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del values["text_config"][name]
    (tmp_path / "custom.json").write_text(json.dumps(values))
    chosen = {
        "model": None,
        "variant": str(tmp_path / "custom.json"),
        "max_steps": 2,
        "per_device_train_batch_size": 16,
    }
    out = train(digits, tmp_path / "out", **chosen)
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert max(text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")) < text["vocab_size"] <= 600
    assert len(classify(out, 16)) == 2


@pytest.mark.slow
def test_rn50_from_scratch_at_full_size(digits: Path, tmp_path: Path):
    chosen = {"model": None, "variant": "RN50", "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    out = train(digits, tmp_path / "out", **chosen)
    assert [record["step"] for record in records(out)] == [1, 2]
    assert all(math.isfinite(record["loss"]) for record in records(out))
    assert sum(tensor.numel() for tensor in weights(out).values()) > 102_000_000
    assert len(classify(out, 224)) == 2


def test_stock_clip_is_a_model_to_begin_with(digits: Path, tmp_path: Path):
    ours = AutoModel.from_pretrained(digits / "vit")
    stock = CLIPModel(CLIPConfig(**ours.config.to_dict()))
    stock.load_state_dict(ours.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    AutoProcessor.from_pretrained(digits / "vit").save_pretrained(tmp_path / "stock")
    chosen = {"max_steps": 2, "per_device_train_batch_size": 16}
    first = train(digits, tmp_path / "first", **chosen)
    second = train(digits, tmp_path / "second", model=str(tmp_path / "stock"), **chosen)
    assert largest_difference(weights(first), weights(second)) == 0


def test_model_of_the_sigmoid_loss_keeps_it(digits: Path, tmp_path: Path):
    first = train(digits, tmp_path / "first", loss="sigmoid", max_steps=1)
    assert "logit_bias" in weights(train(digits, tmp_path / "second", model=str(first), max_steps=1))
    with pytest.raises(ValueError, match="was trained with the sigmoid loss, whose bias the softmax has no use for"):
        train(digits, tmp_path / "third", model=str(first), loss="softmax")
    with pytest.raises(
        ValueError, match="--label_smoothing_factor would have no effect: this model has the sigmoid loss"
    ):
        train(digits, tmp_path / "third", model=str(first), label_smoothing_factor=0.1)
