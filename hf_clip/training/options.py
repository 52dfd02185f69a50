"""The options of a training run: name, type, default and what `--help` says of each.

Where Hugging Face's `TrainingArguments` has an option for the same thing, its name is taken.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

METRICS = (
    "recall@1",
    "recall@5",
    "recall@10",
    "image_to_text_recall@1",
    "text_to_image_recall@1",
    "zero_shot_top1",
    "zero_shot_top5",
)
"""What `--metric_for_best_model` may name; `recall@k` is the mean of both directions."""

GUARD = "guard_"
"""In front of the figures of the guard set."""

GUARD_METRICS = (
    *("guard_acc1", "guard_mean_average_precision", "guard_acc5", "guard_mean_per_class_recall", "guard_roc_auc"),
)
"""What it may name too, with `--guard_dataset`. The first that there is is what the guard set is reported by."""

DEFAULT_RATES = {
    "from scratch": "5e-4",
    "LoRA": "3e-4",
    "the projections alone": "1e-3",
    "fine-tuning": "1e-5",
}
"""The peak learning rate where none is given. Random weights and small added parts need a higher rate than weights
that are already trained: at such a rate these would forget what they know."""


DEFAULT = " (default: %(default)s)"
"""Behind the help of an option that has a default and does not say it itself."""

TRACKERS = ("tensorboard", "wandb", "trackio")


def _option(default: Any, help: str, **more: Any) -> Any:
    is_default_said = default in (None, "", []) or "default:" in help.lower()
    metadata = {"help": help if is_default_said else help + DEFAULT, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model: str | None = _option(None, "Folder or repository to start from: hf_clip's, stock CLIP's or open_clip's")
    variant: str | None = _option(
        None,
        "Train from scratch instead: one of OpenAI's nine names (with their vocabulary), a config.json (a vocabulary "
        "is learned from the captions), or a folder with one, a tokenizer and perhaps an image processor",
    )
    loss: str | None = _option(None, "softmax (CLIP) or sigmoid (SigLIP); default: what the model was trained with")
    matryoshka_dims: list[str] = _option(
        [],
        "Compute the loss at these widths, the full one among them, so that the first numbers of a feature are a "
        "feature too: 512,256,128,64; default: what the model was trained with",
    )
    matryoshka_weights: list[str] = _option([], "Weights of these losses, in the same order: 1,1,0.5,0.5; default: 1")
    image_size: int | None = _option(None, "Go over to images of this size (FixRes); the position table is resized")
    max_text_length: int | None = _option(None, "Go over to texts of this many tokens (Long-CLIP)")


@dataclass
class TrainedOptions:
    _argument_group_name = "what is trained"

    lock: str | None = _option(
        None,
        "Towers to keep: image, text, image:2 (all but its last 2 blocks), image,text (all but projections)",
    )
    cache_frozen_features: bool = _option(
        False,
        "Compute what towers that are locked whole give once, before training, store it in output_dir, and train "
        "without these towers in memory",
    )
    cached_views: int = _option(
        1, "With --cache_frozen_features: augmented views of each image, of which epochs take one after the other"
    )
    lora_rank: int | None = _option(None, "Train factors of this rank beside frozen matrices; needs peft")
    lora_alpha: float | None = _option(
        None, "The factors' product is multiplied by this over the rank; default: the rank, so by 1"
    )
    lora_dropout: float = _option(0.0, "Part of a factor's input that is left out in training")
    lora_target_modules: list[str] = _option(
        [], "Matrices with factors, by the ends of their names: q_proj v_proj; default: all that are not locked"
    )
    l2_to_pretrained: float | None = _option(
        None, "Add so many times the squared distance of what is trained from its pretrained weights to the loss"
    )
    teacher: str | None = _option(
        None, "Model whose affinities of each batch are learned beside the pairs, such as the pretrained model itself"
    )
    teacher_weight: float = _option(1.0, "The distance from the teacher is multiplied by this and added to the loss")
    teacher_temperature: float | None = _option(
        None, "Of the teacher's softmax over a batch, such as 0.01; default: its own"
    )
    sync_batchnorm: bool = _option(False, "Take BatchNorm's statistics over all GPUs; with --variant")
    patch_dropout: float | None = _option(
        None, "Part of each image's patches that a ViT leaves out while it trains (FLIP), such as 0.5"
    )
    gradient_checkpointing: bool = _option(False, "Compute activations twice and hold few of them")


@dataclass
class DataOptions:
    _argument_group_name = "data"

    dataset: list[str] = _option(
        [],
        "Pairs: a repository, a folder with metadata.csv or classes, CSV, JSON, parquet, tars; several as a=3 b=1",
    )
    replay: str | None = _option(
        None, "Old pairs that are mixed in, and their part of all pairs, so that they are not forgotten: old/pairs=0.3"
    )
    replay_caption_column: str | None = _option(
        None, "Column or template of the old pairs' texts; default: the only possible one"
    )
    split: str = _option("train", "Split to train on")
    image_column: str | None = _option(None, "Column with images, paths or URLs; default: the only possible one")
    caption_column: str | None = _option(
        None, 'Column with texts, or a template such as "a photo of a {label}."; default: the only possible one'
    )
    negative_caption_column: list[str] = _option(
        [],
        "Columns or templates with wrong captions, each a text or a list of texts, which all images are contrasted "
        "with too (NegCLIP); a row may have none",
    )
    image_folders: list[str] = _option(
        [], "Folders outside of the data sets' own whose images rows may name; only for rows that you trust"
    )
    captions: str = _option("one", "Of a row's several captions: one drawn in each epoch, or all as rows")
    mask_duplicates: str = _option(
        "on", "Equal images or captions of a batch are no negatives of each other; off: they are", nargs="?", const="on"
    )
    streaming: bool = _option(False, "Read as it comes, instead of preparing tables on disk")
    validation: list[str] = _option(
        [],
        "Pairs to evaluate on: a split of the data, a number of its rows (500) or a part of them (0.05) to hold out, "
        "or another source: a file, a folder or a repository; several as coco=coco/val flickr=flickr/val",
    )
    guard_dataset: str | None = _option(
        None,
        "Labelled images that show what the model forgets: whatever hf-clip evaluate zero-shot takes, measured at the "
        "start, at each evaluation and at the end",
    )
    guard_labels: str | None = _option(
        None, "File with the names of their classes, one a line or JSON; default: those that come with the images"
    )
    guard_label_column: str | None = _option(None, "Column of their labels; default: the only possible one")
    augmentation: str = _option("crop=0.9", '"crop=0.9,flip=0.5,jitter=0.2" (smallest area, chance, strength) or none')
    max_bad_fraction: float = _option(0.01, "End the run when more rows than this part cannot be used")
    augment_on: str = _option(
        "worker", "Who crops, scales and normalises images: worker, or device, for a GPU that waits for its workers"
    )
    dataloader_num_workers: int | None = _option(
        None,
        "Processes that open and prepare images, for each process of the run. Default: as many as there are cores for, "
        "at most 16; without a GPU one",
    )


@dataclass
class OptimizationOptions:
    _argument_group_name = "optimization"

    per_device_train_batch_size: int = _option(
        256, "Pairs of each process in a step, at most as many as there are; all are negatives"
    )
    micro_batch_size: str | None = _option(
        None,
        "Pairs in memory at once: a step embeds its batch in such parts, twice, and contrasts all of it. A number, or "
        "auto for the largest that fits; default: the whole batch",
    )
    num_train_epochs: float | None = _option(None, "Passes over the data")
    max_steps: int | None = _option(None, "Or optimizer steps")
    learning_rate: str | None = _option(
        None,
        'Peak rate; by parts as "1e-5,temperature=1e-3" (image, text, projections). Default: '
        + ", ".join(f"{rate} for {mode}" for mode, rate in DEFAULT_RATES.items()),
    )
    optim: str = _option(
        "AdamW",
        'A torch.optim or 8-bit bitsandbytes class: "SGD momentum=0.9". AdamW has the paper\'s options',
    )
    weight_decay: float = _option(0.2, "Decay of matrices; not of gains, biases, positions, temperature")
    layer_decay: float = _option(1.0, "Multiply the rate by this with each level down a tower")
    lr_scheduler_type: str = _option("cosine", "cosine, linear, constant, constant_with_warmup, ... of transformers")
    warmup_steps: int | None = _option(None, "Steps until the peak rate; default: 5 %% of all, at most 2000")
    max_grad_norm: float | None = _option(None, "Clip gradients to this norm")
    label_smoothing_factor: float = _option(0.0, "Part of the target spread over a batch; softmax only")
    loss_ring: bool = _option(
        False, "Pass texts' features around the processes, so that none holds those of all; the loss is the same"
    )
    seed: int = _option(0, "Of order, captions, augmentation and, from scratch, weights")


@dataclass
class OutputOptions:
    _argument_group_name = "output"

    output_dir: str = _option("", "Folder for the model, its card, metrics.jsonl and checkpoints")
    overwrite_output_dir: bool = _option(False, "Replace what an earlier run left in output_dir")
    logging_steps: int = _option(25, "Steps between two lines of metrics.jsonl")
    save_steps: int | None = _option(None, "Write a checkpoint every so many steps")
    eval_steps: int | None = _option(
        None, "Evaluate every so many steps; default: with each checkpoint. With --validation"
    )
    save_total_limit: int = _option(2, "Checkpoints to keep")
    keep_going_without_checkpoints: bool = _option(False, "Train on where the disk has no room for a checkpoint")
    resume_from_checkpoint: str | None = _option(None, "Go on from a checkpoint: latest, or its folder")
    metric_for_best_model: str | None = _option(
        None,
        f"Save the weights that were best at one of {', '.join((*METRICS, *GUARD_METRICS))}, or at a mean such as "
        f'"mean(recall@1, guard_acc1)"',
    )
    early_stopping_patience: int | None = _option(
        None, "Stop after so many evaluations without a new best; with --metric_for_best_model"
    )
    ema_decay: float | None = _option(
        None, "Evaluate and save a moving average of the weights, over about 1/(1 - decay) steps: 0.999"
    )
    average_with_pretrained: str | None = _option(
        None,
        "WiSE-FT: α of (1-α) pretrained + α fine-tuned: 0.5, or a range 0:1:0.1 of which the best is "
        "kept, on the guard set too where there is one",
    )
    output_format: str = _option("hf_clip", "hf_clip, or transformers for servers that take no code (ViTs)")
    push_to_hub: bool = _option(False, "Publish the result on the Hub at the end")
    hub_model_id: str | None = _option(
        None, "Repository to publish in, as owner/name; default: your account's, named as output_dir"
    )
    hub_strategy: str = _option("end", "end, or every_save: publish at every checkpoint too")
    report_to: list[str] = _option([], f"Trackers besides metrics.jsonl: {', '.join(TRACKERS)}")


GROUPS: tuple[type, ...] = (ModelOptions, TrainedOptions, DataOptions, OptimizationOptions, OutputOptions)
OPTIONS = [field.name for group in GROUPS for field in dataclasses.fields(group)]
