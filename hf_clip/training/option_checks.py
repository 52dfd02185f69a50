"""What options may be, alone and beside each other: whatever cannot be meant, or has no effect, is one error."""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .chosen_metric import parse_metric
from .data.augment import Augmentation
from .option_names import moved_repository
from .options import GUARD, TRACKERS

if TYPE_CHECKING:
    from .config import TrainingConfig

AUTO = "auto"
"""Of `--micro_batch_size`: the largest that fits into memory."""

WITHOUT_WARMUP = ("constant",)

NEED_A_METRIC = ("reduce_lr_on_plateau", "greedy")

BELOW_ONE = math.nextafter(1, 0)
RANGES = (
    ("max_bad_fraction", 0, 1, "from 0 to 1"),
    ("label_smoothing_factor", 0, BELOW_ONE, "at least 0 and below 1"),
    ("lora_dropout", 0, BELOW_ONE, "at least 0 and below 1"),
    ("patch_dropout", math.ulp(0), BELOW_ONE, "between 0 and 1, such as 0.5"),
    ("ema_decay", math.ulp(0), BELOW_ONE, "between 0 and 1, such as 0.9999"),
    ("layer_decay", math.ulp(0), 1, "above 0 and at most 1"),
    ("seed", 0, 2**31 - 1, f"from 0 to {2**31 - 1}"),
)
COUNTS = (
    *("per_device_train_batch_size", "num_train_epochs", "max_steps", "logging_steps", "save_steps", "eval_steps"),
    *(
        "cached_views",
        "save_total_limit",
        "early_stopping_patience",
        "image_size",
        "max_text_length",
        "lora_rank",
        "max_grad_norm",
    ),
    "lora_alpha",
    "l2_to_pretrained",
    *("teacher_weight", "teacher_temperature"),
)
"""Options that are above zero where they are given."""

CHOICES = {
    "loss": (None, "softmax", "sigmoid"),
    "captions": ("one", "all"),
    "augment_on": ("worker", "device"),
    "mask_duplicates": ("on", "off"),
    "output_format": ("hf_clip", "transformers"),
    "hub_strategy": ("end", "every_save"),
}

WithoutEffect = tuple[Any, str, str]
"""Whether an option has no effect, its name, and why it would have none."""


def check_needed(config: "TrainingConfig") -> None:
    """Refuse a run without a model, data, place or length."""
    if (not config.model) == (not config.variant):
        given = "both" if config.model else "neither"
        raise ValueError(f"Name a model to start from with --model or --variant; {given} were given.")
    if not config.dataset or not all(config.dataset):
        raise ValueError("There is nothing to train on: name it with --dataset.")
    if not config.output_dir:
        raise ValueError("There is no place for the result: name a folder with --output_dir.")
    if config.split in (one.source for one in config.validation_sets):
        raise ValueError(
            f"--validation {config.split} is the split that is trained on, so that nothing would be measured: "
            f"name another split, or hold rows out with a number (500) or a part (0.05) of them."
        )
    if (config.num_train_epochs is None) == (config.max_steps is None):
        given = "neither" if config.num_train_epochs is None else "both"
        raise ValueError(f"Say how long to train with --num_train_epochs or --max_steps; {given} were given.")


def check_values(config: "TrainingConfig") -> None:
    """Refuse values that an option cannot have."""
    for option in fields(config):
        if getattr(config, option.name) == "" != option.default:
            raise ValueError(f"--{option.name} is given as an empty text; write what is meant, or leave it out.")
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, but it must be positive.")
    for name in ("dataloader_num_workers", "weight_decay", "warmup_steps"):
        if (value := getattr(config, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but must be 0 (none) or more.")
    micro = config.micro_batch_size
    if micro not in (None, AUTO) and not (micro.isdecimal() and int(micro) > 0):
        raise ValueError(
            f"micro_batch_size is {micro!r}, but must be a number of pairs, at least 1, or {AUTO} for the largest "
            f"that fits."
        )
    for name, low, high, words in RANGES:
        if (value := getattr(config, name)) is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}, but must be {words}.")
    if config.lr_scheduler_type in NEED_A_METRIC:
        raise ValueError(
            f"lr_scheduler_type is {config.lr_scheduler_type!r}, which follows a metric; take one over steps, such "
            f"as cosine."
        )
    for name, allowed in CHOICES.items():
        if (value := getattr(config, name)) not in allowed:
            listed = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise ValueError(f"{name} is {value!r}, but must be one of {listed}.")
    for name in config.negative_caption_column:
        if config.negative_caption_column.count(name) > 1:
            raise ValueError(f"negative_caption_column has {name!r} twice; name each column once.")
    if config.negative_caption_column and micro == AUTO:
        raise ValueError(
            "--micro_batch_size auto counts pairs, and not how many negative captions come with them: give a number of "
            "pairs with --negative_caption_column."
        )
    if config.negative_caption_column and "text" in config.cached_towers:
        raise ValueError(
            "--cache_frozen_features stores the text tower's features of captions, and not of negative ones: leave it "
            "out, or lock the image tower alone, with --negative_caption_column."
        )
    for name in config.report_to:
        if name not in TRACKERS:
            raise ValueError(f"report_to has {name!r}, but must be of {', '.join(TRACKERS)}.")
    if not isinstance(config.push_to_hub, bool):
        raise ValueError(moved_repository(config.push_to_hub))


def check_effects(config: "TrainingConfig") -> None:
    """Refuse what the other options leave without effect."""
    _check_cache(config)
    if config.teacher is not None and config.streaming:
        raise ValueError(
            "--teacher has its embeddings stored by the rows of a table, but rows that are streamed have no place to "
            "be found again: leave out --streaming, or the teacher."
        )
    for is_so, name, reason in (*_of_training(config), *_of_evaluation(config), *_of_writing(config)):
        if is_so:
            raise ValueError(f"--{name} would have no effect: {reason}.")


def _of_training(config: "TrainingConfig") -> list[WithoutEffect]:
    """Options of the model and of how it is trained."""
    scratch, alphas, are_towers_locked = config.variant is not None, config.alphas, config.are_towers_locked
    at_once = config.pairs_at_once
    return [
        (
            config.micro_batch_size is not None and at_once == config.per_device_train_batch_size,
            "micro_batch_size",
            f"a batch has {config.per_device_train_batch_size} pairs, which are in memory at once without it",
        ),
        (are_towers_locked and config.layer_decay != 1, "layer_decay", "both towers are locked"),
        (are_towers_locked and config.gradient_checkpointing, "gradient_checkpointing", "both towers are locked"),
        (config.sync_batchnorm and not scratch, "sync_batchnorm", "fine-tuning keeps BatchNorm as it is"),
        *(
            (getattr(config, name) and config.lora_rank is None, name, "there are no adapters without --lora_rank")
            for name in ("lora_alpha", "lora_dropout", "lora_target_modules")
        ),
        (scratch and config.lora_rank, "lora_rank", "adapters stand beside trained weights; use --model"),
        (scratch and config.l2_to_pretrained, "l2_to_pretrained", "there is nothing pretrained; use --model"),
        (
            config.lora_rank and config.l2_to_pretrained,
            "l2_to_pretrained",
            "beside adapters the pretrained weights stay as they are",
        ),
        (config.teacher_weight != 1 and not config.teacher, "teacher_weight", "there is no --teacher"),
        (config.teacher_temperature and not config.teacher, "teacher_temperature", "there is no --teacher"),
        (scratch and config.lock, "lock", "random weights are not worth keeping; use --model"),
        (scratch and alphas, "average_with_pretrained", "there is nothing pretrained; use --model"),
        (scratch and config.image_size, "image_size", "a model from scratch has its configuration's"),
        (scratch and config.max_text_length, "max_text_length", "a model from scratch has its configuration's"),
        (
            config.loss == "sigmoid" and config.label_smoothing_factor,
            "label_smoothing_factor",
            "the sigmoid loss has none",
        ),
        (
            config.matryoshka_weights and not config.matryoshka_dims,
            "matryoshka_weights",
            "there are no --matryoshka_dims",
        ),
    ]


def _of_evaluation(config: "TrainingConfig") -> list[WithoutEffect]:
    """Options of what is kept of the pretrained model, and of what is measured."""
    evaluated, metric = bool(config.validation), config.metric_for_best_model
    of_guard = [name for name in parse_metric(metric) if name.startswith(GUARD)] if metric else []
    return [
        (config.replay_caption_column and not config.replay, "replay_caption_column", "there is no --replay"),
        (config.guard_labels and not config.guard_dataset, "guard_labels", "there is no --guard_dataset"),
        (config.guard_label_column and not config.guard_dataset, "guard_label_column", "there is no --guard_dataset"),
        (config.guard_dataset and not evaluated, "guard_dataset", "nothing is evaluated without --validation"),
        (
            of_guard and not config.guard_dataset,
            "metric_for_best_model",
            f"{of_guard and of_guard[0]} is measured on --guard_dataset, which is not given",
        ),
        (config.eval_steps and not evaluated, "eval_steps", "nothing is evaluated without --validation"),
        (metric and not evaluated, "metric_for_best_model", "nothing is evaluated without --validation"),
        (
            metric and not config.steps_between_evaluations,
            "metric_for_best_model",
            "it needs --eval_steps or --save_steps",
        ),
        (
            config.early_stopping_patience and not metric,
            "early_stopping_patience",
            "there is no best without --metric_for_best_model",
        ),
        (len(config.alphas) > 1 and not evaluated, "average_with_pretrained", "a range is chosen from by --validation"),
    ]


def _of_writing(config: "TrainingConfig") -> list[WithoutEffect]:
    """Options of the Hub, of checkpoints, and of the schedule."""
    return [
        (config.hub_model_id and not config.push_to_hub, "hub_model_id", "there is no --push_to_hub"),
        (config.hub_strategy != "end" and not config.push_to_hub, "hub_strategy", "there is no --push_to_hub"),
        (
            config.hub_strategy == "every_save" and not config.save_steps,
            "hub_strategy",
            "there are no checkpoints without --save_steps",
        ),
        (
            config.warmup_steps and config.lr_scheduler_type in WITHOUT_WARMUP,
            "warmup_steps",
            f"{config.lr_scheduler_type} has none",
        ),
        (config.save_total_limit != 2 and not config.save_steps, "save_total_limit", "none are written"),
        (
            config.keep_going_without_checkpoints and not config.save_steps,
            "keep_going_without_checkpoints",
            "none are written without --save_steps",
        ),
        (
            config.resume_from_checkpoint and config.overwrite_output_dir,
            "overwrite_output_dir",
            "--resume_from_checkpoint goes on with what is there",
        ),
    ]


def _check_cache(config: "TrainingConfig") -> None:
    """Refuse to store features of towers that are trained, or would give others in each step."""
    views = config.cached_views
    if not config.cache_frozen_features:
        if views != 1:
            raise ValueError("--cached_views would have no effect: nothing is stored without --cache_frozen_features.")
        return
    towers = config.cached_towers
    if not towers:
        locked = f"--lock {config.lock} leaves blocks of its towers unlocked" if config.lock else "no tower is locked"
        raise ValueError(
            f"--cache_frozen_features stores what a tower gives that stays as it is, but {locked}: pass --lock image, "
            f"text or image,text."
        )
    if config.streaming:
        raise ValueError(
            "--cache_frozen_features stores features by the rows of a table, but rows that are streamed have no place "
            "to be found again: leave out --streaming, or the cache."
        )
    if "image" in towers and config.patch_dropout is not None:
        raise ValueError(
            "--patch_dropout leaves out other patches in each step, so that the locked image tower would have no one "
            "output to store: leave out --patch_dropout or --cache_frozen_features."
        )
    if views != 1 and "image" not in towers:
        raise ValueError("--cached_views would have no effect: the image tower is trained, so no views are stored.")
    if views != 1 and Augmentation.parse(config.augmentation) == Augmentation(crop=1.0):
        raise ValueError("--cached_views would have no effect: without an augmentation all views are one.")
