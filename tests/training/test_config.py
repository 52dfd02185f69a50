"""What a training run can be told, from a command line or a file, and what is refused before any work is done."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import HfArgumentParser

from hf_clip.training.command_line import _argument_parser, parse_config
from hf_clip.training.config import ADDED, MAY_CHANGE, TrainingConfig
from hf_clip.training.option_names import KNOWN_AS, OF_THE_LAUNCHER, RENAMED, hint
from hf_clip.training.options import DEFAULT_RATES, GROUPS, OPTIONS

BASE = {"model": "m", "dataset": ["d"], "output_dir": "o", "max_steps": 10}
NEEDED = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--max_steps", "10"]


def config(**fields: object) -> TrainingConfig:
    return TrainingConfig(**(BASE | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "Name a model to start from with --model or --variant; neither were given"),
        ({"variant": "RN50"}, "Name a model to start from with --model or --variant; both were given"),
        ({"dataset": []}, "There is nothing to train on: name it with --dataset"),
        ({"output_dir": ""}, "There is no place for the result: name a folder with --output_dir"),
        ({"max_steps": None}, "Say how long to train with --num_train_epochs or --max_steps; neither were given"),
        ({"num_train_epochs": 1.5}, "Say how long to train with --num_train_epochs or --max_steps; both were given"),
        ({"num_train_epochs": 0.0}, "Say how long to train with --num_train_epochs or --max_steps; both were given"),
        ({"model": ""}, "Name a model to start from with --model or --variant; neither were given"),
        ({"dataset": [""]}, "There is nothing to train on: name it with --dataset"),
        ({"validation": ["5", "old=train"]}, "--validation train is the split that is trained on, so that nothing wou"),
        ({"validation": "train"}, "--validation train is the split that is trained on, so that nothing would be meas"),
        ({"validation": "a", "split": "a"}, "--validation a is the split that is trained on.* or hold rows out with a"),
    ],
)
def test_what_is_missing_is_named(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, but it must be positive"),
        (
            {"micro_batch_size": 0},
            "micro_batch_size is '0', but must be a number of pairs, at least 1, or auto for the",
        ),
        ({"micro_batch_size": "2.5"}, "micro_batch_size is '2.5', but must be a number of pairs"),
        ({"cached_views": 0}, "cached_views is 0, but it must be positive"),
        ({"teacher": ""}, "--teacher is given as an empty text; write what is meant, or leave it out"),
        ({"teacher_weight": 0.0}, "teacher_weight is 0.0, but it must be positive"),
        ({"max_steps": 0}, "max_steps is 0, but it must be positive"),
        ({"max_steps": None, "num_train_epochs": -1.0}, "num_train_epochs is -1.0, but it must be positive"),
        ({"logging_steps": 0}, "logging_steps is 0, but it must be positive"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, but it must be positive"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan, but it must be positive"),
        ({"max_steps": None, "num_train_epochs": math.inf}, "num_train_epochs is inf, but it must be positive"),
        ({"weight_decay": math.nan}, "weight_decay is nan, but must be 0"),
        ({"seed": -1}, "seed is -1, but must be from 0 to 2147483647"),
        ({"patch_dropout": 1.0}, "patch_dropout is 1.0, but must be between 0 and 1, such as 0.5"),
        ({"augment_on": "gpu"}, "augment_on is 'gpu', but must be one of worker, device"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1, but must be 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1, but must be 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, but must be 0"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5, but must be from 0 to 1"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor is 1.0, but must be at least 0 and below 1"),
        ({"replay": "old"}, "--replay is 'old', but must be a data set and its part of all pairs, between 0 and 1"),
        ({"replay": "old=1"}, "--replay is 'old=1', but must be a data set and its part of all pairs, between 0"),
        (
            {"matryoshka_dims": "64,x"},
            "--matryoshka_dims has 'x', but widths are needed, such as 512,256,128,64: how many",
        ),
        ({"matryoshka_dims": [64, 0]}, "--matryoshka_dims has '0', but widths are needed"),
        ({"matryoshka_dims": "64,8,8"}, "--matryoshka_dims is 64,8,8, in which a width stands twice: name each once"),
        (
            {"matryoshka_dims": "64,8", "matryoshka_weights": "1"},
            "--matryoshka_weights has 1 numbers, but --matryoshka_dims has 2: name a weight for each width, in the sa",
        ),
        (
            {"matryoshka_dims": "64,8", "matryoshka_weights": "1,-1"},
            "--matryoshka_weights has '-1', but positive numbers are needed, such as 1,0.5",
        ),
        (
            {"validation": ["coco/val", "flickr/val"]},
            "--validation names two sets 'val', coco/val and flickr/val: give each a name of its own, as in --valid",
        ),
        ({"validation": ["a=x/y", "b=x/y"]}, "--validation names x/y twice: leave one out"),
        ({"validation": ["50", "60"]}, r"--validation holds out rows 2 times \(50, 60\), but once is enough"),
        ({"validation": ["a=500", "b=0.1"]}, r"--validation holds out rows 2 times \(500, 0.1\), but once is enough"),
        (
            {"validation": ["test", "guard=x/y"]},
            "--validation names a set 'guard', but figures of that name are others: call it something else, as in",
        ),
        ({"validation": ["test", "my_text_to_image=x/y"]}, "--validation names a set 'my_text_to_image', but figures"),
        (
            {"validation": ["a=x/y", "b=x/z"], "metric_for_best_model": "mean(recall@1, c_recall@1)"},
            "--metric_for_best_model c_recall@1 is measured on a validation set 'c', which is not given: there",
        ),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, but must be between 0 and 1, such as 0.9999"),
        ({"ema_decay": 0.0}, "ema_decay is 0.0, but must be between 0 and 1"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, but must be above 0 and at most 1"),
        ({"learning_rate": "-1e-4"}, "The learning rate '-1e-4' must be finite and not negative"),
        ({"learning_rate": "1e-5,temprature=1"}, "Did you mean 'temperature'"),
        ({"loss": "hinge"}, "loss is 'hinge', but must be one of softmax, sigmoid"),
        ({"mask_duplicates": "maybe"}, "mask_duplicates is 'maybe', but must be one of on, off"),
        ({"captions": "two"}, "captions is 'two', but must be one of one, all"),
        ({"output_format": "onnx"}, "output_format is 'onnx', but must be one of hf_clip, transformers"),
        ({"hub_strategy": "always"}, "hub_strategy is 'always', but must be one of end, every_save"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type is 'reduce_lr_on_plateau', which follows a metric; take one",
        ),
        (
            {"metric_for_best_model": "recall"},
            "metric_for_best_model is 'recall', but must be one of recall@1, recall@5",
        ),
        (
            {"metric_for_best_model": "acc1_dim64"},
            "metric_for_best_model is 'acc1_dim64', but must be one of recall@1, recall@5",
        ),
        (
            {"metric_for_best_model": "mean(recall@1, acc1)"},
            r"metric_for_best_model is 'mean\(recall@1, acc1\)', but .*, or a mean of them such as mean\(recall@1, gua",
        ),
        ({"optim": "AdmaW"}, "Did you mean AdamW"),
        ({"lock": "picture"}, "'picture' cannot be locked, but 'image', 'text' or both"),
        ({"augmentation": "blur=1"}, "blur"),
        ({"average_with_pretrained": "2"}, "α is 2, but must be between 0"),
    ],
)
def test_impossible_values_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**fields)


SCRATCH = {"model": None, "variant": "RN50"}
CACHED = {"cache_frozen_features": True, "lock": "image"}
BEST = {"metric_for_best_model": "recall@1", "validation": "5", "save_steps": 5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"negative_caption_column": ["a", "b", "a"]}, "negative_caption_column has 'a' twice; name each column once."),
        (
            {"negative_caption_column": "a", "cache_frozen_features": True, "lock": "text"},
            "--cache_frozen_features stores the text tower's features of captions, and not of negative ones: leave it",
        ),
        (
            {"negative_caption_column": "a", "micro_batch_size": "auto"},
            "--micro_batch_size auto counts pairs, and not how many negative captions come with them: give a number",
        ),
        ({"micro_batch_size": 256}, "--micro_batch_size would have no effect: a batch has 256 pairs, which are in mem"),
        ({"sync_batchnorm": True}, "--sync_batchnorm would have no effect: fine-tuning keeps BatchNorm as it is"),
        ({"lora_alpha": 8}, "--lora_alpha would have no effect: there are no adapters without --lora_rank"),
        ({"lora_dropout": 0.1}, "--lora_dropout would have no effect: there are no adapters without --lora_rank"),
        ({"lora_target_modules": "fc1"}, "--lora_target_modules would have no effect: there are no adapters without"),
        (SCRATCH | {"lora_rank": 4}, "--lora_rank would have no effect: adapters stand beside trained weights"),
        (SCRATCH | {"l2_to_pretrained": 0.1}, "--l2_to_pretrained would have no effect: there is nothing pretrained"),
        (
            {"lora_rank": 4, "l2_to_pretrained": 0.1},
            "--l2_to_pretrained would have no effect: beside adapters the pretrained weights stay",
        ),
        (SCRATCH | {"lock": "image"}, "--lock would have no effect: random weights are not worth keeping"),
        (SCRATCH | {"average_with_pretrained": "0.5"}, "--average_with_pretrained would have no effect: there is noth"),
        (SCRATCH | {"image_size": 32}, "--image_size would have no effect: a model from scratch has its config"),
        (SCRATCH | {"max_text_length": 32}, "--max_text_length would have no effect: a model from scratch has its"),
        ({"cached_views": 2}, "--cached_views would have no effect: nothing is stored without --cache_frozen_features"),
        (
            CACHED | {"lock": "text", "cached_views": 2},
            "--cached_views would have no effect: the image tower is trained, so no views are stored",
        ),
        (
            CACHED | {"cached_views": 2, "augmentation": "none"},
            "--cached_views would have no effect: without an augmentation all views are one",
        ),
        ({"teacher_weight": 2.0}, "--teacher_weight would have no effect: there is no --teacher"),
        ({"teacher_temperature": 0.1}, "--teacher_temperature would have no effect: there is no --teacher"),
        (
            {"teacher": "t", "streaming": True},
            "--teacher has its embeddings stored by the rows of a table, but rows th",
        ),
        (CACHED | {"lock": None}, "a tower gives that stays as it is, but no tower is locked: pass --lock image, text"),
        (CACHED | {"lock": "image:2"}, "but --lock image:2 leaves blocks of its towers unlocked: pass --lock image, t"),
        (CACHED | {"streaming": True}, "rows that are streamed have no place to be found again: leave out --streaming"),
        (
            CACHED | {"patch_dropout": 0.5},
            "--patch_dropout leaves out other patches in each step, so that the locked image tower would have no one",
        ),
        ({"lock": "image,text", "layer_decay": 0.7}, "--layer_decay would have no effect: both towers are locked"),
        ({"lock": "text,image", "gradient_checkpointing": True}, "--gradient_checkpointing would have no effect: both"),
        (
            {"loss": "sigmoid", "label_smoothing_factor": 0.1},
            "--label_smoothing_factor would have no effect: the sigmoid loss has",
        ),
        (
            BEST | {"validation": None},
            "--metric_for_best_model would have no effect: nothing is evaluated without --validation",
        ),
        (
            BEST | {"save_steps": None},
            "--metric_for_best_model would have no effect: it needs --eval_steps or --save_steps",
        ),
        (
            BEST | {"metric_for_best_model": None, "early_stopping_patience": 2},
            "--early_stopping_patience would have no effect: there is no best without",
        ),
        (
            BEST | {"metric_for_best_model": "mean(recall@1,guard_acc1)"},
            "--metric_for_best_model would have no effect: guard_acc1 is measured on --guard_dataset, which is not",
        ),
        ({"guard_dataset": "d"}, "--guard_dataset would have no effect: nothing is evaluated without --validation"),
        ({"matryoshka_weights": "1,0.5"}, "--matryoshka_weights would have no effect: there are no --matryoshka_dims"),
        ({"replay_caption_column": "c"}, "--replay_caption_column would have no effect: there is no --replay"),
        ({"guard_labels": "f"}, "--guard_labels would have no effect: there is no --guard_dataset"),
        ({"guard_label_column": "c"}, "--guard_label_column would have no effect: there is no --guard_dataset"),
        ({"average_with_pretrained": "0:1:0.5"}, "--average_with_pretrained would have no effect: a range is chosen"),
        ({"eval_steps": 5}, "--eval_steps would have no effect: nothing is evaluated without --validation"),
        ({"hub_model_id": "a/b"}, "--hub_model_id would have no effect: there is no --push_to_hub"),
        ({"hub_strategy": "every_save"}, "--hub_strategy would have no effect: there is no --push_to_hub"),
        ({"hub_strategy": "every_save", "push_to_hub": True}, "--hub_strategy would have no effect: there are no ch"),
        (
            {"warmup_steps": 5, "lr_scheduler_type": "constant"},
            "--warmup_steps would have no effect: constant has none",
        ),
        ({"save_total_limit": 3}, "--save_total_limit would have no effect: none are written"),
        (
            {"resume_from_checkpoint": "latest", "overwrite_output_dir": True},
            "--overwrite_output_dir would have no effect: --resume_from_checkpoint goes on with what is",
        ),
    ],
)
def test_options_without_effect_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**fields)
    # Each of them alone is what is wrong.
    TrainingConfig(
        **(BASE | BEST | {"early_stopping_patience": 2, "save_total_limit": 3, "average_with_pretrained": "0:1:0.5"})
    )


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "fine-tuning"),
        ({"lock": "image"}, "fine-tuning"),
        ({"lock": "image,text:2"}, "fine-tuning"),
        ({"lora_rank": 8}, "LoRA"),
        ({"lora_rank": 8, "lock": "image"}, "LoRA"),
        ({"lock": "image,text"}, "the projections alone"),
        (SCRATCH, "from scratch"),
    ],
)
def test_learning_rate_is_chosen_by_what_is_trained_and_said(fields: dict, mode: str):
    found = config(**fields)
    assert found.learning_rate == DEFAULT_RATES[mode]
    assert found.notes == [f"note: --learning_rate is {DEFAULT_RATES[mode]}, the default for {mode}."]
    given = config(**fields, learning_rate="2e-5")
    assert (given.learning_rate, given.notes) == ("2e-5", [])


def test_adapters_learn_faster_than_what_they_adapt():
    rates = {mode: float(rate) for mode, rate in DEFAULT_RATES.items()}
    assert rates["fine-tuning"] * 10 <= min(rates[mode] for mode in rates if mode != "fine-tuning")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(True, "on"), (False, "off"), ("True", "on"), ("on", "on"), ("off", "off")],
    ids=str,
)
def test_masking_is_on_or_off_as_yaml_says_it_too(given: object, expected: str):
    assert config().mask_duplicates == "on"
    assert config(mask_duplicates=given).mask_duplicates == expected


@pytest.mark.parametrize(
    ("rows", "processes", "expected", "note"),
    [
        (500, 1, 256, None),
        (256, 1, 256, None),
        (60, 1, 60, "note: --per_device_train_batch_size is 60, since an epoch has 60 pairs."),
        (61, 2, 30, "note: --per_device_train_batch_size is 30 in each of 2 processes, since an epoch has 61 pairs."),
        (2, 2, 1, "note: --per_device_train_batch_size is 1 in each of 2 processes, since an epoch has 2 pairs."),
    ],
)
def test_batches_are_no_larger_than_the_data(rows: int, processes: int, expected: int, note: str | None):
    found = config(learning_rate="1e-5")
    found.limit_batch_size(rows, processes, "d")
    assert (found.per_device_train_batch_size, found.notes) == (expected, [note] if note else [])


def test_micro_batch_is_smaller_than_the_batch():
    assert config().pairs_at_once == 256
    assert config(micro_batch_size=64).pairs_at_once == 64
    assert config(micro_batch_size="AUTO").pairs_at_once is None
    found = config(micro_batch_size="64", learning_rate="1e-5")
    found.limit_batch_size(100, 1, "d")
    assert found.pairs_at_once == 64
    found.limit_batch_size(50, 1, "d")
    assert (found.pairs_at_once, found.micro_batch_size) == (50, None)
    found = config(micro_batch_size="auto", learning_rate="1e-5")
    found.settle_micro_batch_size(128, "it fits")
    assert (found.pairs_at_once, found.notes) == (128, ["note: --micro_batch_size is 128, since it fits."])
    found.settle_micro_batch_size(256, "it fits")
    assert (found.pairs_at_once, found.micro_batch_size) == (256, None)


def test_validation_may_be_several_sets():
    given = ["500", "test", "coco=coco/val", "flickr/val.tar", "me/pairs:part", "year=rest", "~/data/my pairs/"]
    found = {one.name: one.source for one in config(validation=given).validation_sets}
    named = ["held_out", "test", "coco", "val", "pairs", "year", "my_pairs"]
    assert list(found.items()) == list(zip(named, [*given[:2], "coco/val", *given[3:5], "rest", given[6]], strict=True))
    sets = {"validation": ["coco=coco/val", "flickr=flickr/val"], "save_steps": 5}
    metric = config(**sets, metric_for_best_model="mean(coco_recall@1, flickr_recall@1_dim8)").metric_for_best_model
    assert metric == "mean(recall@1, flickr_recall@1_dim8)"
    assert config(validation=0.05).validation == ["0.05"]


def test_single_validation_set_is_written_as_older_versions_did():
    """So that their checkpoints go on."""
    assert config(validation=["500"]).identity()["validation"] == "500"
    assert config().to_dict()["validation"] is None
    several = config(validation=["a", "b"])
    assert several.identity()["validation"] == ["a", "b"]
    for found in (several, config(validation="500"), config()):
        assert TrainingConfig(**found.to_dict()) == found


@pytest.mark.parametrize("dims", ["16, 64,32", ["16", "64", "32"], [16, 64, 32], np.array([16, 64, 32]), "16,64,32,"])
def test_widths_are_read_in_any_form(dims: object):
    found = config(matryoshka_dims=dims, matryoshka_weights=[1, 0.5, 2])
    assert found.matryoshka_dims == ["16", "64", "32"]
    assert list(found.widths.items()) == [(64, 0.5), (32, 2.0), (16, 1.0)]
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert list(config(matryoshka_dims="8,64").widths.values()) == [1.0, 1.0]


def test_widths_are_settled_by_the_model():
    """Given ones are checked, those of the model are taken over, and the full one alone ends them."""
    found = config(learning_rate="1e-5")
    found.settle_widths(64, [64, 8])
    assert found.widths == {64: 1.0, 8: 1.0}
    assert found.notes == [
        "note: --matryoshka_dims is 64,8, at which the model was trained before; --matryoshka_dims 64 trains the full "
        "width alone."
    ]
    plain = config(learning_rate="1e-5", matryoshka_dims="64")
    with pytest.raises(ValueError, match="--matryoshka_dims 64 would have no effect: it is the full width, at which"):
        plain.settle_widths(64, None)
    plain.settle_widths(64, [64, 8])
    assert (plain.widths, plain.notes) == ({}, [])
    with pytest.raises(ValueError, match="--matryoshka_dims is 128,64, but this model's features have 64 numbers: nam"):
        config(matryoshka_dims="128,64").settle_widths(64, None)
    with pytest.raises(ValueError, match="--matryoshka_dims is 32,8, which leaves out the full width: .* Name 64 too"):
        config(matryoshka_dims="8,32").settle_widths(64, None)


@pytest.mark.parametrize(("rows", "processes", "least"), [(1, 1, 2), (3, 4, 4), (1, 2, 2)])
def test_data_without_a_pair_to_compare_with_are_refused(rows: int, processes: int, least: int):
    with pytest.raises(ValueError, match=f"d: an epoch has {rows} pairs.*: at least {least} are needed"):
        config().limit_batch_size(rows, processes, "d")


def test_numpy_pandas_and_paths_become_what_json_holds():
    import pandas

    chosen = {"model": Path("m"), "output_dir": Path("o"), "max_steps": np.int64(10), "weight_decay": np.float32(0.5)}
    expected = config(weight_decay=0.5, dataset=["a", "b"])
    for dataset in (np.array(["a", "b"]), pandas.Series(["a", "b"]), ("a", Path("b"))):
        found = config(dataset=dataset, **chosen)
        assert found == expected
        assert json.loads(json.dumps(found.to_dict())) == expected.to_dict()
    assert config(dataset="a").dataset == ["a"]
    assert config(report_to="wandb").report_to == ["wandb"]
    with pytest.raises(ValueError, match="There is nothing to train on"):
        config(dataset=np.array([]))


def test_a_resumed_run_may_differ_only_in_what_leaves_its_result_alone():
    assert set(MAY_CHANGE) < config().to_dict().keys()
    assert (
        config(logging_steps=3, dataloader_num_workers=7, per_device_train_batch_size=4, micro_batch_size=2).identity()
        == config().identity()
    )
    changed = [{"learning_rate": "1e-4"}, {"augmentation": "none"}, {"ema_decay": 0.9}, {"weight_decay": 0.0}]
    for fields in (*changed, {"augment_on": "device"}):
        assert config(**fields).identity() != config().identity()
    # Checkpoints of versions without the option have nothing there.
    for name, value in ADDED.items():
        assert config(**{name: value}).identity()[name] is None


# --- the command line ------------------------------------------------------------------------------------------------


def test_help_has_groups_and_every_option_says_what_it_does(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        parse_config(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for group in ("model", "what is trained", "data", "optimization", "output"):
        assert f"\n{group}:\n" in out
    for group in GROUPS:
        for name in group.__dataclass_fields__:
            assert f"--{name}" in out
    assert all(field.metadata["help"] for group in GROUPS for field in group.__dataclass_fields__.values())


def test_parser_without_the_package_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch):
    """Its file is loaded by itself, since the package takes most of a second."""
    helps = []
    for is_imported in (True, False):
        with monkeypatch.context() as patch:
            if not is_imported:
                patch.delitem(sys.modules, "transformers")
            parser = _argument_parser()
            assert (parser is HfArgumentParser) is is_imported
            assert is_imported or "transformers" not in sys.modules
        helps.append(parser(GROUPS, prog="p").format_help())
    assert helps[0] == helps[1]


def test_flags_are_read():
    found = parse_config(
        [*NEEDED, "--overwrite_output_dir", "--learning_rate", "1e-5,temperature=1e-3", "--report_to", "wandb"]
    )
    assert found == config(overwrite_output_dir=True, learning_rate="1e-5,temperature=1e-3", report_to=["wandb"])
    assert parse_config([*NEEDED, "--dataset", "a=3", "b=1"]).dataset == ["a=3", "b=1"]


@pytest.mark.parametrize("option", ["--max_steps", "--max-steps"])
def test_what_cannot_be_read_names_the_option_as_it_was_typed(option: str):
    with pytest.raises(ValueError, match=rf"^{option}: invalid int value: 'many'\. See hf-clip finetune --help\.$"):
        parse_config([*NEEDED[:-2], f"{option}=many"], "hf-clip finetune")
    with pytest.raises(ValueError, match=rf"^there is no option '{option}s'\. Did you mean '--max_steps'\? See fine"):
        parse_config([*NEEDED, f"{option}s", "4"])


def test_list_that_begins_with_a_minus_is_read_as_a_value():
    with pytest.raises(ValueError, match=r"^--matryoshka_dims has '-1', but widths are needed, such as 512,256"):
        parse_config([*NEEDED, "--matryoshka_dims", "-1,32"])
    with pytest.raises(ValueError, match=r"^--matryoshka_weights has '-0.5', but positive numbers are needed"):
        parse_config([*NEEDED, "--matryoshka_dims", "64,32", "--matryoshka-weights", "-0.5,1"])


@pytest.mark.parametrize("rate", ["-1e-5", "-1e-5,temperature=1e-3", "-1", "-.5"])
def test_rate_that_begins_with_a_minus_is_read_as_a_value(rate: str):
    with pytest.raises(ValueError, match=rf"^The learning rate '{rate.split(',')[0]}' must be finite and not negative"):
        parse_config([*NEEDED, "--learning_rate", rate])
    assert parse_config([*NEEDED, "--dataset", "a", "b", "--weight_decay", "0"]).dataset == ["a", "b"]


def test_file_of_options_comes_first():
    with pytest.raises(
        ValueError, match=r"^run.yaml is no option; a file of options comes first, before all options\."
    ):
        parse_config([*NEEDED, "run.yaml"])


def test_help_says_each_default_once(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Steps until the peak rate; default: 5 % of all, at most 2000 --max_grad_norm" in out
    assert "Folder for the model, its card, metrics.jsonl and checkpoints --overwrite" in out
    assert "Decay of matrices; not of gains, biases, positions, temperature (default: 0.2)" in out
    assert "(default: None)" not in out


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--lr", "--learning_rate"),
        ("-lr=1e-4", "--learning_rate"),
        ("--LR", "--learning_rate"),
        ("--bs", "--per_device_train_batch_size"),
        ("--train_batch_size", "--per_device_train_batch_size"),
        ("--wd", "--weight_decay"),
        ("--output", "--output_dir"),
        ("--num_train_epoch", "--num_train_epochs"),
        ("--num-epochs", "--num_train_epochs"),
        ("--save_freq", "--save_steps"),
        ("--eval_strategy", "--eval_steps"),
        ("--repo_id", "--hub_model_id"),
        ("--model_name_or_path", "--model"),
        ("--train_data", "--dataset"),
        ("--warmup", "--warmup_steps"),
        ("--lora_r", "--lora_rank"),
        ("--accum_freq", "--micro_batch_size"),
        ("--wieght_decay", "--weight_decay"),
    ],
)
def test_option_is_found_by_the_name_that_people_know(word: str, expected: str):
    with pytest.raises(ValueError, match=f"there is no option {word!r}. Did you mean {expected!r}"):
        parse_config([*NEEDED, word])


def test_names_that_people_know_lead_to_options_and_each_to_one():
    assert KNOWN_AS.keys() | set(RENAMED.values()) <= set(OPTIONS)
    names = [name for names in (*KNOWN_AS.values(), *OF_THE_LAUNCHER.values()) for name in names.split()]
    names += RENAMED
    assert len(names) == len(set(names))
    assert not set(names) & set(OPTIONS)
    assert hint("--fp16", OPTIONS) == " That is the launcher's: accelerate launch --mixed_precision bf16."
    assert hint("--xyzzy", OPTIONS) == ""


RESUMED = ["--resume-from-checkpoint", "True"]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_name_of_an_option_is_answered_with_the_new_one(
    tmp_path: Path, old: str, new: str, capsys: pytest.CaptureFixture
):
    said = f"It is called '--{new}', as in Hugging Face's TrainingArguments."
    with pytest.raises(ValueError, match=f"there is no option '--{old}'. {said}"):
        parse_config([*NEEDED, f"--{old}", "1"])
    (tmp_path / "run.yaml").write_text(f"{old}: 1\n")
    with pytest.raises(ValueError, match=f"run.yaml has an option '{old}' that there isn't. It is called '{new}'"):
        parse_config([str(tmp_path / "run.yaml")])


def test_repository_behind_the_switch_is_answered_with_its_option(tmp_path: Path):
    message = "--push_to_hub is a switch, but was given 'me/clip': name .* as in --push_to_hub --hub_model_id me/clip."
    (tmp_path / "run.yaml").write_text("push_to_hub: me/clip\n")
    for words in (["--push_to_hub", "me/clip"], ["--push-to-hub=me/clip"], [str(tmp_path / "run.yaml"), *NEEDED]):
        with pytest.raises(ValueError, match=message):
            parse_config(words if words[0][0] != "-" else [*NEEDED, *words])
    with pytest.raises(ValueError, match=message):
        config(push_to_hub="me/clip")


def test_dashes_and_underscores_are_both_read(tmp_path: Path):
    for word in ("--push_to_hub", "--push-to-hub"):
        found = parse_config([*NEEDED, word, "--hub-model-id", "me/clip", *RESUMED])
        assert (found.push_to_hub, found.hub_model_id, found.resume_from_checkpoint) == (True, "me/clip", "latest")
    (tmp_path / "run.yaml").write_text("push-to-hub: true\n")
    assert parse_config([str(tmp_path / "run.yaml"), *NEEDED]).push_to_hub is True


EVALUATED = ({}, {"save_steps": 4}, {"save_steps": 4, "eval_steps": 2}, {"eval_steps": 3})


def test_evaluations_come_with_checkpoints_unless_they_have_steps_of_their_own():
    found = [config(validation="5", **given).steps_between_evaluations for given in EVALUATED]
    assert found == [None, 4, 2, 3]


def test_switch_may_stand_alone():
    assert parse_config([*NEEDED, "--mask_duplicates"]).mask_duplicates == "on"
    assert parse_config([*NEEDED, "--mask_duplicates", "off"]).mask_duplicates == "off"


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_file_gives_options_and_flags_go_over_it(tmp_path: Path, kind: str):
    path = tmp_path / f"run.{kind}"
    if kind == "yaml":
        text = "model: m\ndataset: [d, e]\noutput_dir: o\nmax_steps: 10\nlearning_rate: 1e-4\nvalidation: 500\n"
        text += "overwrite_output_dir: true\nstreaming: false\nresume_from_checkpoint: null\nreport_to: []\n"
        text += "average_with_pretrained: 0.5\nmask_duplicates: off\n"
    else:
        values = {
            "learning_rate": 0.0001,
            "validation": 500,
            "overwrite_output_dir": True,
            "mask_duplicates": False,
            "average_with_pretrained": 0.5,
        }
        text = json.dumps(BASE | {"dataset": ["d", "e"], "resume_from_checkpoint": None} | values)
    path.write_text(text)
    found = parse_config([str(path), "--max_steps", "20"])
    assert float(found.learning_rate) == 1e-4
    assert (found.dataset, found.max_steps, found.validation) == (["d", "e"], 20, ["500"])
    assert found.overwrite_output_dir
    assert found.alphas == [0.5]
    assert found.mask_duplicates == "off"
    assert parse_config([str(path), "--dataset", "f"]).dataset == ["f"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "learning_rat: 1\n", "run.yaml has an option 'learning_rat' that there isn't. Did you mean 'lear"),
        ("run.json", '{"batchsize": 1}', "run.json has an option 'batchsize' that there isn't. Did you mean 'per_dev"),
        ("run.yaml", "lr: 1\n", "run.yaml has an option 'lr' that there isn't. Did you mean 'learning_rate'?"),
        ("run.yaml", "- model\n", "run.yaml holds a list, but options by name are needed"),
        ("run.json", "{model: 1}", "run.json cannot be read: Expecting property name"),
        ("run.yaml", "model: [\n", "run.yaml cannot be read: while parsing"),
        ("run.yaml", "", "run.yaml is empty; write options by name into it"),
        ("run.json", "", "run.json is empty; write options by name into it"),
        ("run.json", '{"model": "m', "run.json cannot be read: Unterminated string"),
        ("run.yaml", "model: {a: b}\n", "run.yaml: model is {'a': 'b'}, but a single value, or a list of such, is"),
        (
            "run.yaml",
            "per_device_train_batch_size: 32.5\n",
            "run.yaml: --per_device_train_batch_size: invalid int",
        ),
        ("run.yaml", "1: 2\n", "run.yaml has an option '1' that there isn't"),
    ],
)
def test_faults_of_a_file(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_config([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("num_train_epochs: 3", ["--max_steps", "7"], {"max_steps": 7, "num_train_epochs": None}),
        ("max_steps: 3", ["--num_train_epochs=7"], {"max_steps": None, "num_train_epochs": 7.0}),
        ("max_steps: 3\nmodel: n", ["--variant", "RN50"], {"model": None, "variant": "RN50"}),
        (
            "max_steps: 3\noverwrite_output_dir: true",
            ["--resume_from_checkpoint", "latest"],
            {"overwrite_output_dir": False, "resume_from_checkpoint": "latest"},
        ),
    ],
)
def test_flag_takes_the_place_of_its_alternative_in_the_file(
    tmp_path: Path, text: str, words: list[str], expected: dict
):
    model = "" if "model" in text else "model: m\n"
    (tmp_path / "run.yaml").write_text(f"{model}dataset: d\noutput_dir: o\n{text}\n")
    found = parse_config([str(tmp_path / "run.yaml"), *words])
    assert {name: getattr(found, name) for name in expected} == expected


def test_alternatives_in_the_same_place_are_refused(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("model: m\ndataset: d\noutput_dir: o\nnum_train_epochs: 3\nmax_steps: 7\n")
    for words in (
        [str(tmp_path / "run.yaml")],
        [str(tmp_path / "run.yaml"), "--max_steps", "5", "--num_train_epochs", "2"],
    ):
        with pytest.raises(
            ValueError, match="Say how long to train with --num_train_epochs or --max_steps; both were given"
        ):
            parse_config(words)


def test_flags_are_written_out():
    """`--epoch` would go unnoticed where a file has `max_steps`."""
    with pytest.raises(ValueError, match="there is no option '--epoch'. Did you mean '--num_train_epochs'"):
        parse_config([*NEEDED, "--epoch", "3"])


def test_file_that_is_missing_or_no_text(tmp_path: Path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x81")
    with pytest.raises(ValueError, match=r"run.yaml cannot be read: 'utf-8' codec can't decode"):
        parse_config([str(tmp_path / "run.yaml")])
    with pytest.raises(FileNotFoundError, match="There is no configuration file nowhere.yaml; check the path"):
        parse_config(["nowhere.yaml"])
