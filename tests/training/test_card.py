"""The card of a trained model: complete, true, without paths of the machine, and with snippets that run."""

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_clip import HfClipConfig
from hf_clip.hub.stage import PICTURE, publish
from hf_clip.training.card import ALWAYS, SAID_OTHERWISE, RunFacts, is_repository, row_name, shown, trained_card
from hf_clip.training.config import TrainingConfig

from ..finetuning import train
from ..test_model_cards import python_blocks, run_without_hf_clip


def test_names_on_the_card_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "pairs").mkdir(parents=True)
    assert is_repository("openai/clip-vit-base-patch32")
    assert not any(map(is_repository, [None, "my/pairs", "./a", "/a/b", "~/a", "a", "a/b/c"]))
    assert not any(map(is_repository, ["shards/*.tar", "user/name:config", "data/pairs.csv", "a b/c"]))
    assert (shown("openai/clip"), shown("my/pairs"), shown("/home/me/pairs")) == ("openai/clip", "pairs", "pairs")
    assert (shown("user/name:config"), shown("shards/*.tar")) == ("user/name:config", "*.tar")


LAUNCHED = {
    "processes": 4,
    "wrapper": "DDP",
    "mixed_precision": "bf16",
    "gradient_accumulation_steps": 8,
    "compiler": "inductor",
}


def card_rows(facts: RunFacts, **options: object) -> dict[str, str]:
    """The table of how a model was trained, as its card has it."""
    config = TrainingConfig(dataset=["org/pairs"], output_dir="out", max_steps=1000, **options)
    text = trained_card(HfClipConfig.from_variant("RN50"), config, {}, facts)
    table = text.partition("## How it was trained")[2].partition("## How to use it")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return dict(cells[1:])


def test_card_says_what_the_launcher_decided():
    facts = RunFacts(step=800, total_steps=1000, global_batch=1024, launched=LAUNCHED, alpha=0.5)
    rows = card_rows(facts, model="org/clip")
    assert rows["steps"] == "800 of 1000"
    assert rows["pairs contrasted with each other"] == "1024"  # and not 8,192, which no loss ever saw together
    assert rows["batches added up to a step"] == "8, each contrasted by itself"
    assert (rows["processes"], rows["wrapper"], rows["precision"]) == ("4", "DDP", "bfloat16 (mixed)")
    assert (rows["compiler"], rows["warm-up steps"], rows["averaged with the pretrained weights, α"]) == (
        *("inductor", "50"),
        "0.5",
    )


def test_card_says_what_a_run_chose_by_itself():
    facts = RunFacts(step=50, total_steps=50, global_batch=60, launched=LAUNCHED, part_cut=0.125)
    rows = card_rows(facts, model="org/clip", lora_rank=4)
    assert (rows["learning rate"], rows["equal images and captions masked"]) == ("3e-4", "on")
    assert (rows["warm-up steps"], rows["captions cut at the model's length"]) == ("2", "12 %")
    assert "its decay after step n" not in rows
    rows = card_rows(facts, model="org/clip", ema_decay=0.9, lr_scheduler_type="constant", mask_duplicates="off")
    assert (rows["learning rate"], rows["equal images and captions masked"]) == ("1e-5", "off")
    assert "warm-up steps" not in rows  # a constant rate has none
    assert (rows[row_name("ema_decay")], rows["its decay after step n"]) == ("0.9", "at most (1 + n) / (6 + n)")


OTHER_VALUES = {
    "loss": "sigmoid",
    "image_size": 64,
    "max_text_length": 99,
    "lock": "image:1",
    "cached_views": 4,
    "teacher": "org/teacher",
    "teacher_weight": 2.0,
    "teacher_temperature": 0.05,
    "patch_dropout": 0.5,
    "augment_on": "device",
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "fc1"],
    "l2_to_pretrained": 0.25,
    "matryoshka_dims": ["64", "8"],
    "matryoshka_weights": ["1", "0.5"],
    "replay": "org/old=0.25",
    "replay_caption_column": "old",
    "split": "other",
    "image_column": "photo",
    "caption_column": "alt",
    "negative_caption_column": ["wrong", "wrong too"],
    "captions": "all",
    "mask_duplicates": "off",
    "validation": "test",
    "guard_dataset": "org/photos",
    "guard_labels": "names.txt",
    "guard_label_column": "fine",
    "augmentation": "none",
    "learning_rate": "3e-4",
    "optim": "SGD momentum=0.9",
    "weight_decay": 0.01,
    "layer_decay": 0.75,
    "lr_scheduler_type": "linear",
    "warmup_steps": 7,
    "max_grad_norm": 1.5,
    "label_smoothing_factor": 0.1,
    "seed": 17,
    "metric_for_best_model": "recall@5",
    "ema_decay": 0.99,
}
NEEDED_WITH = {
    "teacher_weight": {"teacher": "org/teacher"},
    "teacher_temperature": {"teacher": "org/teacher"},
    "cache_frozen_features": {"lock": "image"},
    "cached_views": {"lock": "image", "cache_frozen_features": True},
    "matryoshka_weights": {"matryoshka_dims": "64,8"},
    "lora_alpha": {"lora_rank": 4},
    "lora_dropout": {"lora_rank": 4},
    "lora_target_modules": {"lora_rank": 4},
    "label_smoothing_factor": {"loss": "softmax"},
    "metric_for_best_model": {"validation": "test", "save_steps": 5},
    "replay_caption_column": {"replay": "org/old=0.25"},
    "guard_dataset": {"validation": "test"},
    "guard_labels": {"validation": "test", "guard_dataset": "org/photos"},
    "guard_label_column": {"validation": "test", "guard_dataset": "org/photos"},
}
SWITCHES = {"streaming": True, "cache_frozen_features": True}


def test_every_option_that_decides_the_result_stands_on_the_card():
    facts = RunFacts(step=1000, total_steps=1000, global_batch=256, launched=LAUNCHED)
    decisive = TrainingConfig(model="org/clip", dataset=["a"], output_dir="o", max_steps=1).identity().keys()
    unsaid = {"model", "variant", "dataset", "sync_batchnorm"}  # in the first sentence; of --variant alone
    assert decisive - unsaid == OTHER_VALUES.keys() | SWITCHES.keys()
    for name, value in (OTHER_VALUES | SWITCHES).items():
        rows = card_rows(facts, model="org/clip", **{name: value} | NEEDED_WITH.get(name, {}))
        if name not in SAID_OTHERWISE:
            said = ", ".join(value) if isinstance(value, list) else "yes" if value is True else str(value)
            assert rows[row_name(name)] == said, name
    rows = card_rows(facts, variant="RN50", sync_batchnorm=True, warmup_steps=7)
    assert (rows["sync batchnorm"], rows["warm-up steps"], rows["loss"]) == ("yes", "7", "softmax")
    assert {row_name(name) for name in ALWAYS} <= rows.keys()


def test_card_states_licences_of_the_model_and_of_the_data(digits: Path, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(digits / "vit", base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Base\n")
    out = train(digits, tmp_path / "out", model=str(base), max_steps=2, per_device_train_batch_size=16)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    assert "| licence of the base model | apache-2.0 |" in card.text
    assert "not stated where it was read from" in card.text  # of the data
    again = train(digits, tmp_path / "again", model=str(digits / "vit"), max_steps=2, per_device_train_batch_size=16)
    card = ModelCard.load(again / "README.md")
    assert card.data.license is None
    assert "| licence of the base model | not stated where it was loaded from |" in card.text


def test_snippets_of_the_card_run_on_the_folder_as_it_is(
    digits: Path, tmp_path: Path, photographs: dict[str, Image.Image], monkeypatch: pytest.MonkeyPatch
):
    """From the folder that it lies in, as the card says, with this package and without it."""
    out = train(digits, tmp_path / "my-digits", max_steps=2, per_device_train_batch_size=16)
    photographs["chelsea"].save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    card = (out / "README.md").read_text()
    assert "`my-digits` as it is seen from the folder that it lies in" in card
    assert "`pip install hf-clip`" in card
    blocks = python_blocks(card)
    remote = [block for block in blocks if "trust_remote_code" in block]
    assert len(remote) == 1
    run_without_hf_clip(remote, tmp_path)
    for block in blocks:
        if block not in remote:
            exec(compile(block, "card", "exec"), {})
    chosen = {"output_format": "transformers", "max_steps": 1, "per_device_train_batch_size": 16}
    card = (train(digits, tmp_path / "stock", **chosen) / "README.md").read_text()
    assert "`pip install hf-clip`" in card
    (block,) = python_blocks(card)
    exec(compile(block, "card", "exec"), {})


@pytest.mark.parametrize("layout", ["hf_clip", "transformers"])
def test_card_names_the_repository_where_the_folder_is_published(
    layout: str, repositories: dict[str, Path], tmp_path: Path
):
    out = tmp_path / "fine-tuned"
    shutil.copytree(repositories["vit"], out)
    options = TrainingConfig(model="m", dataset=["a/b"], output_dir=str(out), max_steps=9, validation="50")
    facts = RunFacts(9, 9, 16, LAUNCHED)
    text = trained_card(HfClipConfig.from_pretrained(out), options, {"recall@1": 0.5}, facts, "training-curve.png")
    (out / "README.md").write_text(f"{text}\nWords of my own on fine-tuned.\n")
    (out / "training-curve.png").write_bytes(b"a picture")
    found = publish(out, "me/ft", dry_run=True, layout=layout)
    assert "training-curve.png" in {upload.name for upload in found.uploads}
    assert "](training-curve.png)" in found.card
    assert found.card.count("fine-tuned from") == 1
    assert found.card.endswith("Words of my own on fine-tuned.\n")
    assert found.card.count("fine-tuned") == 2  # besides these no word of the folder
    assert "\n# ft\n" in found.card
    card = ModelCard(found.card)
    assert card.data.model_name == "ft"
    assert card.data.eval_results == ModelCard(text).data.eval_results
    snippets = "\n".join(python_blocks(found.card))
    assert set(re.findall(r'(?:model=|from_pretrained\()"([^"]*)"', snippets)) == {"me/ft"}
    assert ("code in this repository" in found.card) == ("trust_remote_code" in found.card) == (layout == "hf_clip")
    (out / "training-curve.png").unlink()
    again = publish(out, "me/ft", dry_run=True, layout=layout).card
    assert "training-curve.png" not in again
    assert again.replace("\n", "") == PICTURE.sub("", found.card).replace("\n", "")
