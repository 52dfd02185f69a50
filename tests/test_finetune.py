"""finetune.py as a user runs it, and the demo built on it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, load_from_disk
from PIL import Image
from transformers import AutoModel, AutoProcessor

import demo.__main__ as demo
from demo.digits import (
    COLOURS,
    COMBINATIONS,
    DIGITS,
    Combination,
    load_split_digits,
    make_dataset,
    untrained_combinations,
)
from hf_clip.commands import finetune
from hf_clip.training import run_steps
from hf_clip.training.run_state import STATE
from hf_clip.training.summary import wait_in_words

from .finetuning import ROOT, as_in_a_new_process, largest_difference, launch, options, records, train, weights, words
from .two_processes import TwoProcesses
from .warm_python import run_warm

FIGURES = {
    "step",
    "loss",
    "accuracy",
    "learning_rate",
    "logit_scale",
    "images_per_second",
    "data_wait",
    "peak_memory_gb",
}
FIGURES |= {"truncated_captions"}


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "loss"),
    [
        *(("vit", "softmax"), ("vit", "sigmoid"), ("resnet", "softmax")),
        pytest.param("resnet", "sigmoid", marks=pytest.mark.slow),
    ],
)
def test_digits_are_learned(digits: Path, tmp_path: Path, tower: str, loss: str):
    chosen = {
        "learning_rate": "3e-3",
        "max_steps": 80,
        "logging_steps": 8,
        "warmup_steps": 3,
        "per_device_train_batch_size": 48,
    }
    chosen |= {"model": None, "variant": str(digits / tower), "validation": "100", "augmentation": "none"}
    out = train(digits, tmp_path / "out", tower, loss=loss, **chosen)
    lines = records(out)
    assert [line["step"] for line in lines] == list(range(8, 81, 8))
    assert lines[0].keys() == FIGURES | ({"logit_bias"} if loss == "sigmoid" else set())
    # The sigmoid loss begins with learning its bias.
    assert lines[-1]["loss"] < (0.6 * lines[0]["loss"] if loss == "softmax" else lines[2]["loss"] - 0.2)
    assert lines[-1]["accuracy"] > lines[0]["accuracy"] + 0.05
    assert max(line["learning_rate"] for line in lines) == pytest.approx(3e-3, rel=0.05)
    assert lines[-1]["learning_rate"] < 1e-4  # the cosine comes to its end
    (start, figures) = records(out, "recall@1")
    assert (start["step"], figures["step"]) == (0, 80)
    assert figures["recall@10"] > 0.3  # by chance a tenth


@pytest.mark.parametrize("chosen", [{"lora_rank": 4}, {"lock": "image"}, {"lock": "image:0,text"}])
def test_what_is_frozen_stays_bit_equal_and_the_rest_learns(digits: Path, tmp_path: Path, chosen: dict):
    rate = "1e-2" if "lora_rank" in chosen else "3e-3"
    out = train(digits, tmp_path / "out", max_steps=30, logging_steps=3, learning_rate=rate, **chosen)
    lines = records(out)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    before, after = weights(digits / "vit"), weights(out)
    assert before.keys() == after.keys()  # adapters are merged
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if "lora_rank" in chosen:
        assert {name.rpartition(".")[2] for name in changed if "model" in name} == {"weight"}
        assert not any("norm" in name or "embedding" in name for name in changed)
        assert any(name.startswith("vision_model") for name in changed)
    else:
        assert not any(name.startswith("vision_model.") and "post_layernorm" not in name for name in changed)
        assert any(name.startswith("text_model.") for name in changed) == (chosen["lock"] == "image")
        assert ("text_projection.weight" in changed) == (chosen["lock"] == "image")


def test_same_seed_gives_the_same_weights(digits: Path, tmp_path: Path):
    first, second, other = (weights(train(digits, tmp_path / str(i), seed=s)) for i, s in enumerate((3, 3, 4)))
    assert largest_difference(first, second) == 0
    assert largest_difference(first, other) > 1e-4


def test_logit_scale_is_clamped(digits: Path, tmp_path: Path):
    model = AutoModel.from_pretrained(digits / "vit")
    model.logit_scale.data.fill_(6.0)
    model.save_pretrained(tmp_path / "hot")
    AutoProcessor.from_pretrained(digits / "vit").save_pretrained(tmp_path / "hot")
    out = train(digits, tmp_path / "out", model=str(tmp_path / "hot"))
    assert AutoModel.from_pretrained(out).logit_scale.exp() <= 100.001


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_with_the_whole_batch(
    digits: Path, tmp_path: Path, tower: str, two_processes: TwoProcesses
):
    """BatchNorm is frozen in fine-tuning, so this holds for ResNets too."""
    chosen = {"max_steps": 12, "logging_steps": 4, "validation": "held_out_images", "warmup_steps": 2}
    chosen |= {"learning_rate": "5e-4", "label_smoothing_factor": 0.1, "mask_duplicates": True, "max_grad_norm": 1.0}
    two_processes.run(words(options(digits, tmp_path / "two", tower, per_device_train_batch_size=24, **chosen)))
    alone = train(digits, tmp_path / "one", tower, per_device_train_batch_size=48, **chosen)
    two, one = weights(tmp_path / "two"), weights(alone)
    # A key's bias adds the same to all of a query's scores: its gradient is zero but for rounding, of which Adam makes
    # whole steps.
    for name in [name for name in one if name.endswith("k_proj.bias")]:
        assert (two.pop(name) - one.pop(name)).abs().max() < 12 * 5e-4
    assert largest_difference(two, one) < 1e-5
    assert (one["text_projection.weight"] - weights(digits / tower)["text_projection.weight"]).abs().max() > 1e-3
    for name in ("loss", "accuracy", "learning_rate", "logit_scale"):
        found = [[line[name] for line in records(folder)] for folder in (tmp_path / "two", alone)]
        assert found[0] == pytest.approx(found[1], abs=1e-4), name
    found = [records(folder, "recall@1") for folder in (tmp_path / "two", alone)]
    for first, second in zip(*found, strict=True):
        assert first == pytest.approx(second, abs=0.005)  # of 718 images, one or two may change places
    assert json.loads((tmp_path / "two" / "training_config.json").read_text())["launch"]["processes"] == 2


@pytest.mark.slow
def test_too_many_bad_rows_end_both_processes(digits: Path, tmp_path: Path):
    flags = options(
        digits,
        tmp_path / "out",
        dataset=str(digits / "several"),
        per_device_train_batch_size=16,
        max_bad_fraction=0.001,
    )
    done = launch(flags, processes=2)
    assert done.returncode != 0
    assert re.search(r"error: \d of \d+ rows cannot be used", done.stderr)
    assert "more than --max_bad_fraction 0.001 allows; the first is row " in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
    said_once(done.stderr)


def said_once(stderr: str) -> None:
    """One line says it, the launcher's report repeats it, and no process of ours shows a traceback."""
    assert len(re.findall(r"^error: ", stderr, re.MULTILINE)) == 1, stderr
    assert len(re.findall(r"traceback : error: ", stderr)) == 1, stderr
    assert 'finetune.py", line' not in stderr


@pytest.mark.slow
def test_several_processes_say_it_once(digits: Path, tmp_path: Path):
    flags = options(digits, tmp_path / "out", caption_column="text")
    done = launch(flags, processes=2)
    assert done.returncode != 0
    assert "has no column 'text'; its columns are image, caption, target" in done.stderr
    said_once(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_error_of_another_process_alone_is_said_by_it(digits: Path, tmp_path: Path):
    """The main process fails in the middle of an exchange, and says nothing."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from hf_clip.commands import finetune\n"
        "from hf_clip.training import run_steps\n"
        "check = run_steps.check_run\n"
        "def fail(*arguments):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('of the second')\n"
        "    return check(*arguments)\n"
        "run_steps.check_run = fail\n"
        "sys.exit(finetune.main())\n"
    )
    done = launch(options(digits, tmp_path / "out"), processes=2, program=program, PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "error: of the second" in done.stderr
    said_once(done.stderr)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_divergence_says_where_and_what_to_do_and_saves_no_model(digits: Path, tmp_path: Path):
    chosen = {"learning_rate": "1e18", "warmup_steps": 0}
    with pytest.raises(
        ValueError, match=r"The loss became nan at step \d+ \(logit scale .*\); no checkpoint was saved"
    ):
        train(digits, tmp_path / "out", **chosen)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl", "training_config.json"}
    message = r"no good checkpoint was saved \(.*step-00000001 has the weights that gave this\). Lower --learning_rate"
    with pytest.raises(ValueError, match=message):
        train(digits, tmp_path / "out", save_steps=1, save_total_limit=1, overwrite_output_dir=True, **chosen)
    chosen |= {"warmup_steps": 1}  # the first step's rate is zero
    with pytest.raises(ValueError, match=r"became nan at step 3 .*; the last good checkpoint is .*step-00000001\."):
        train(digits, tmp_path / "out", save_steps=1, overwrite_output_dir=True, **chosen)
    with pytest.raises(ValueError, match=r"became nan at step 3 .*; the last good checkpoint is .*step-00000001\."):
        train(digits, tmp_path / "out", save_steps=1, save_total_limit=1, overwrite_output_dir=True, **chosen)
    assert (tmp_path / "out" / "checkpoints" / "step-00000001" / "run.json").is_file()


@pytest.mark.parametrize(("rate", "validation"), [("1e18", "100"), ("1e38", None)])
def test_weights_that_the_last_step_broke_are_not_saved(
    digits: Path, tmp_path: Path, rate: str, validation: str | None
):
    chosen = {"learning_rate": rate, "warmup_steps": 0, "max_steps": 1, "validation": validation}
    with pytest.raises(
        ValueError, match=r"became nan (after|in) step 1 \(logit scale .*; no checkpoint was saved. Low"
    ):
        train(digits, tmp_path / "out", **chosen)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_file_in_the_place_of_stored_features_is_refused(digits: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "frozen_features").write_text("mine")
    chosen = {"cache_frozen_features": True, "lock": "image", "dataset": ["/no/data"]}  # before anything else
    with pytest.raises(FileExistsError, match="out/frozen_features is no folder, but features of what is not trained"):
        train(digits, tmp_path / "out", **chosen)
    assert (tmp_path / "out" / "frozen_features").read_text() == "mine"


def test_existing_output_is_refused_before_training(digits: Path, tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(digits, tmp_path, dataset=["/no/data"])  # before anything else is looked at
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_output_with_checkpoints_names_the_way_to_go_on(digits: Path, tmp_path: Path):
    for step in (4, 12):
        state = tmp_path / "checkpoints" / f"step-{step:08}" / STATE
        state.parent.mkdir(parents=True)
        state.touch()
    message = (
        "holds checkpoints of an earlier run, the last of step 12: go on with it by --resume_from_checkpoint latest,"
    )
    with pytest.raises(FileExistsError, match=message):
        train(digits, tmp_path, dataset=["/no/data"])
    assert state.exists()


def test_failed_run_leaves_an_earlier_ones_model_as_it_was(digits: Path, tmp_path: Path):
    out = train(digits, tmp_path / "out", max_steps=2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="The loss became nan"):
        train(digits, out, learning_rate="1e18", warmup_steps=0, overwrite_output_dir=True)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"metrics.jsonl", "training_config.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/no/model"}, "There is no model folder /no/model"),
        ({"model": "ViT-B/32"}, "Convert it once, by `hf-clip convert ViT-B/32 clip-vit-b32/`, and pass that folder"),
        ({"model": "nothing"}, "There is no folder 'nothing', and no model of that name could be loaded from the Hub"),
        ({"model": "DIGITS"}, "is a folder without a model: it has neither config.json nor open_clip_config.json"),
        ({"model": "DIGITS/damaged"}, "damaged/model.safetensors is truncated or damaged"),
        ({"model": None, "variant": "RN51", "dataset": "/no/data"}, "Unknown CLIP variant 'RN51'; the nine are RN50"),
        ({"model": None, "variant": "DIGITS/cut.json", "dataset": "/no/data"}, "cut.json is no JSON (Unterminated"),
        ({"dataset": "/no/data"}, "There is no data set '/no/data'"),
        (
            {"dataset": "DIGITS/pairs", "per_device_train_batch_size": "1"},
            "per_device_train_batch_size is 1, but a pair is learned against others",
        ),
        ({"caption_column": "text"}, "has no column 'text'"),
        ({"captions": "all"}, "--captions all would have no effect: a row of this data has one caption"),
        ({"save_steps": 6}, "--save_steps 6 would have no effect: the run has 6 steps in all"),
        ({"split": "nowhere"}, "has no split 'nowhere'"),
        ({"split": "trian"}, "has no split 'trian'; its splits are train, held_out_images, unseen_combinations. Did y"),
        ({"dataset": "HERE/table", "split": "trian"}, "has no split 'trian'; its splits are train. Did you mean"),
        ({"dataset": "HERE/table", "validation": "test"}, "has no split 'test'; its splits are train. To evaluate"),
        ({"validation": "train"}, "--validation train is the split that is trained on"),
        ({"dataset": "HERE/paths.csv", "image_column": "text", "caption_column": "file"}, "two columns may be swap"),
        (
            {"metric_for_best_model": "zero_shot_top1", "validation": "9", "save_steps": 2},
            "--metric_for_best_model zero_shot_top1 cann",
        ),
        ({"streaming": True, "max_steps": None, "num_train_epochs": 1}, "How long an epoch of a stream is isn't known"),
        ({"streaming": True, "validation": "0.1"}, "the length of a stream isn't known; hold out a number of its rows"),
        ({"report_to": "tensorbord"}, "report_to has 'tensorbord', but must be of tensorboard, wandb, trackio"),
        ({"report_to": "trackio"}, "--report_to trackio needs a package that is not installed: pip install trackio"),
        ({"push_to_hub": True, "hub_model_id": "tiny"}, "'tiny' is no name of a repository"),
        ({"push_to_hub": True}, "would publish out in your account, which could not be found out ("),
        ({"resume_from_checkpoint": "latest"}, "There is no checkpoint in"),
        ({"resume_from_checkpoint": "/no/checkpoint"}, "There is no whole checkpoint /no/checkpoint; those of"),
        ({"loss_ring": True}, "--loss_ring would have no effect: there is one process, which holds all texts anyway"),
        ({"sync_batchnorm": True, "model": None, "variant": "DIGITS/resnet"}, "would have no effect: there is one pro"),
        ({"model": "DIGITS/resnet", "output_format": "transformers"}, "its image tower is a ResNet, and transformers'"),
        ({"loss": "sigmoid", "output_format": "transformers"}, "it was trained with the sigmoid loss"),
        ({"warmup_steps": 9}, "warmup_steps is 9, but the run has 6 steps"),
        ({"lr_scheduler_type": "cosin"}, "The scheduler 'cosin' cannot be made"),
    ],
)
def test_faults_are_one_line(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    message: str,
):
    (tmp_path / "paths.csv").write_text("file,text\na.png,a cat\nb.png,a dog\n")
    if change.get("dataset", "").startswith("HERE/table"):
        Dataset.from_dict({"image": [b""], "caption": ["a"]}).save_to_disk(tmp_path / "table")
    flags = options(digits, tmp_path / "out", **change)
    command = [word.replace("HERE", str(tmp_path)).replace("DIGITS", str(digits)) for word in words(flags)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *command])
    monkeypatch.setattr(run_steps.Run, "batch_done", None)  # none of these gets as far as a step
    assert finetune.main() == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_what_was_chosen_and_what_is_odd_about_the_data_is_said_before_the_first_step(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """60 rows for a batch of 64, no learning rate, captions that are cut to one text and one that is hostile."""
    pairs = load_from_disk(str(digits / "pairs"))["train"].select(range(60))
    texts = [f"{'a photo of ' * 20} {index}" for index in range(30)] + [f"digit {index}" for index in range(30)]
    texts[59] = f"&#{'9' * 5000};"
    pairs.remove_columns("caption").add_column("caption", texts).save_to_disk(tmp_path / "data")
    chosen = {"learning_rate": None, "max_steps": 2, "lora_rank": 2, "max_bad_fraction": 0.1}
    out = train(digits, tmp_path / "out", dataset=str(tmp_path / "data"), **chosen)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("note: -", "warning: "))]
    assert said[:2] == [
        "note: --learning_rate is 3e-4, the default for LoRA.",
        "note: --per_device_train_batch_size is 60, since an epoch has 60 pairs.",
    ]
    assert re.match(r"warning: 30 of (59|60) captions .* cut at the model's 24 tokens, and 30 of those differ", said[2])
    written = json.loads((out / "training_config.json").read_text())
    assert (written["learning_rate"], written["per_device_train_batch_size"], written["mask_duplicates"]) == (
        "3e-4",
        60,
        "on",
    )
    assert records(out)[-1]["truncated_captions"] == pytest.approx(0.5, abs=0.02)


def test_two_processes_share_what_there_is(digits: Path, tmp_path: Path, two_processes: TwoProcesses):
    pairs = load_from_disk(str(digits / "pairs"))["train"].select(range(9))
    pairs.save_to_disk(tmp_path / "data")
    printed = two_processes.run(words(options(digits, tmp_path / "out", dataset=str(tmp_path / "data"), max_steps=2)))
    note = "note: --per_device_train_batch_size is 4 in each of 2 processes, since an epoch has 9 pairs."
    assert printed.count(note) == 1
    assert len(records(tmp_path / "out")) == 1


def test_stream_that_is_shorter_than_a_batch_is_taken_whole(digits: Path, tmp_path: Path):
    pairs = load_from_disk(str(digits / "pairs"))["train"].select(range(9))
    pairs.save_to_disk(tmp_path / "data")
    out = train(digits, tmp_path / "out", dataset=str(tmp_path / "data"), streaming=True, max_steps=2)
    assert json.loads((out / "training_config.json").read_text())["per_device_train_batch_size"] == 9


def test_vocabulary_is_learned_past_a_caption_that_cannot_be_read(digits: Path, tmp_path: Path):
    pairs = load_from_disk(str(digits / "pairs"))["train"].select(range(40))
    texts = [f"digit {index}" for index in range(39)] + [f"&#{'9' * 5000};"]
    pairs.remove_columns("caption").add_column("caption", texts).save_to_disk(tmp_path / "data")
    chosen = {
        "model": None,
        "variant": str(digits / "vit.json"),
        "max_bad_fraction": 0.1,
        "per_device_train_batch_size": 8,
    }
    out = train(digits, tmp_path / "out", dataset=str(tmp_path / "data"), max_steps=1, **chosen)
    assert AutoProcessor.from_pretrained(out).tokenizer("digit 3").input_ids


@pytest.mark.parametrize(
    ("launched", "threads_given", "is_said"),
    [(False, False, False), (True, False, True), (True, True, False)],
)
def test_one_thread_is_noted_where_the_launcher_chose_it(
    launched: bool, threads_given: bool, is_said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(run_steps.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    environment = {"OMP_NUM_THREADS": "1"} if threads_given else {}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={"PATH": os.environ["PATH"], **environment}) as parent:
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        run_steps.warn_of_few_threads()
        parent.communicate()
    assert ("gives a process one CPU thread" in capsys.readouterr().err) is is_said


def test_wait_for_data_is_told_of_runs_that_are_long_enough():
    assert wait_in_words(0.6, 1.2) == "1 s of training."
    assert wait_in_words(0.0, 0.0) == "0 s of training."
    advice = "; more --dataloader_num_workers may help, and on a GPU --augment_on device"
    assert wait_in_words(9, 60) == f"60 s of training, 9 s of which (15%) it waited for data{advice}."
    assert wait_in_words(3, 60) == "60 s of training, 3 s of which (5%) it waited for data."


WITHOUT_EXTRAS = """
import runpy, sys
sys.modules |= dict.fromkeys(("accelerate", "datasets", "peft"))  # as if they were not installed
from hf_clip.commands import finetune
for words in (["--help"], %r):
    sys.argv = ["finetune.py", *words]
    try:
        print("ended with", finetune.main())
    except SystemExit as end:
        print("ended with", end.code)
try:
    runpy.run_module("demo", run_name="__main__")
except SystemExit as end:
    print("ended with", end.code)
"""


def test_help_and_refusal_without_the_extras(tmp_path: Path):
    needed = words({"model": "m", "dataset": "d", "output_dir": str(tmp_path / "out"), "max_steps": 1})
    done = run_warm(WITHOUT_EXTRAS % needed, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--mask_duplicates" in done.stdout
    missing = "needs accelerate, datasets, which this Python does not have: pip install"
    assert re.findall("ended with .*", done.stdout) == [
        "ended with 0",
        "ended with 1",
        f'ended with error: The demo {missing} "hf-clip[demo]"',
    ]
    assert done.stderr.splitlines()[-1] == f'error: Training {missing} "hf-clip[train]"'
    assert not (tmp_path / "out").exists()


def test_columns_that_there_are_are_named(digits: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="has no column 'text'.*image.*caption.*target"):
        train(digits, tmp_path / "out", caption_column="text")


# --- launching -------------------------------------------------------------------------------------------------------


def test_accelerate_launch_runs_it_from_a_file(digits: Path, tmp_path: Path):
    """The command of the docs for several GPUs, in processes of its own, with workers that read the data."""
    values = options(
        digits,
        tmp_path / "out",
        max_steps=None,
        dataloader_num_workers=1,
        per_device_train_batch_size=32,
        logging_steps=2,
    )
    (tmp_path / "run.json").write_text(json.dumps(values | {"max_steps": 100}))
    configuration = ROOT / "accelerate_configs" / "ddp.yaml"
    done = launch({"max_steps": 3}, "--config_file", str(configuration), file=tmp_path / "run.json", processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "training_config.json").read_text())["launch"]["processes"] == 2
    assert f"Saved to {tmp_path / 'out'}" in done.stdout
    assert [line["step"] for line in records(tmp_path / "out")] == [2, 3]


@pytest.mark.slow
def test_compiled_model_trains_resumes_and_is_saved_as_any_other(digits: Path, tmp_path: Path):
    chosen = {"max_steps": 3, "per_device_train_batch_size": 24, "learning_rate": "1e-4", "validation": "50"}
    chosen |= {"save_steps": 2, "metric_for_best_model": "recall@10", "augmentation": "none", "ema_decay": 0.9}
    flags = options(digits, tmp_path / "compiled", **chosen)
    for more in ({}, {"resume_from_checkpoint": "latest"}):
        done = launch(flags | more, "--dynamo_backend", "inductor", timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        assert [line["step"] for line in records(tmp_path / "compiled", "recall@1")] == [2, 3]
    plain = weights(train(digits, tmp_path / "plain", **chosen))
    compiled = weights(tmp_path / "compiled")
    for name in [name for name in plain if name.endswith("k_proj.bias")]:
        del plain[name], compiled[name]
    assert largest_difference(compiled, plain) < 1e-5


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


def launch_here(command: list[str], check: bool) -> None:
    """Do in this process what the command of `accelerate launch` would have done in another one."""
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    launched = launch_command_parser().parse_args(command[3:])
    assert Path(launched.training_script) == ROOT / "finetune.py"
    with as_in_a_new_process():
        assert finetune.main(launched.training_script_args) == 0


@pytest.mark.parametrize("tower", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_demo_runs_from_data_to_picture(tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """The whole way with a short training, whose scores must already be far above chance."""
    short = {"max_steps": 50, "per_device_train_batch_size": 64}
    monkeypatch.setitem(demo.TRAINING, tower, demo.TRAINING[tower] | short)
    monkeypatch.setitem(demo.TRAIN_SIZE, tower, 2000)
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=launch_here))
    scores = demo.run(tower, tmp_path, seed=0)
    assert scores.keys() == {"held_out_images", "unseen_combinations"}
    assert scores["held_out_images"] > 10 / 560
    with Image.open(tmp_path / f"demo-{tower}.png") as image:
        assert image.size[0] > 1000
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
