"""What a run needs, made from its configuration: model and processor, optimizer, loaders."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin, get_scheduler

from ..checkpoints.folders import IMAGE_PROCESSOR_FILES, in_one_line, read_object
from ..checkpoints.read import check_model
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from ..model.variants import VARIANTS
from .averaging import copy_weights
from .config import TrainingConfig
from .data.augment import Augmentation
from .data.bad_rows import BadRows
from .data.collator import PairCollator
from .data.loader import PairLoader, build_loader
from .data.pairs import Pairs, PairStream, hold_out, load_pairs, read_validation
from .data.sources import Source, names_a_source, parse_sources
from .data.survey import LOOKED_AT, OPENED, describe_captions, look_at
from .lora import add_lora_
from .optim import create_optimizer, warmup_steps
from .scratch import build_from_scratch, read_config
from .surgery import set_image_size_, set_text_length_, switch_to_sigmoid_
from .trainable import freeze_batch_norm_, lock_, synchronize_batch_norm_

MOST_CAPTIONED_ROWS = 1_000_000


@dataclass
class Data:
    """Pairs to train on, those to evaluate on, and the names of their classes where the captions are made of labels.

    class_prompts: each class's caption, in the order of the labels
    captions:      of rows to train on that were looked at
    """

    train: Pairs | PairStream
    validation: Pairs | PairStream | None
    class_prompts: list[str] | None
    captions: list[str]


def _find_labels(pairs: Pairs | PairStream) -> list[str] | None:
    """Where all captions are a template over one and the same label, carry the labels along; returns all captions."""
    readers = [source.captions for source in pairs.sources]
    first = readers[0]
    if any(len(r.columns) != 1 or r.names != first.names or r.column != first.column or not r.names for r in readers):
        return None
    ((column, names),) = first.names.items()
    for source in pairs.sources:
        source.label_column = column
    return [first.column.format(**{column: name}) for name in names]


def check_start(config: TrainingConfig) -> None:
    """Refuse a missing or damaged model or variant before the data are prepared. Raises as `check_model`."""
    if config.variant is not None:
        read_config(config.variant)
        return
    assert config.model is not None
    if config.model.startswith((".", "/", "~")) and not Path(config.model).is_dir():
        raise FileNotFoundError(f"There is no model folder {config.model}; check the path.")
    check_model(config.model)


def build_data(config: TrainingConfig, num_processes: int = 1) -> Data:
    """Open the data and look at some rows; `config` takes batches no larger than there are pairs.

    Raises FileNotFoundError and ValueError that say which source, split or column is wrong.
    """
    chosen: dict[str, Any] = {
        "image_column": config.image_column,
        "caption_column": config.caption_column,
        "captions": config.captions,
        "streaming": config.streaming,
        "image_folders": config.image_folders,
    }
    train = load_pairs(config.dataset, split=config.split, **chosen)
    if config.captions == "all" and isinstance(train, Pairs) and not train.has_several_captions:
        raise ValueError("--captions all would have no effect: a row of this data has one caption.")
    validation = None
    if config.validation is not None:
        amount = read_validation(config.validation)
        if isinstance(amount, str) and names_a_source(amount):
            validation = _open_validation(amount, config, chosen)
        elif isinstance(amount, str):
            validation = load_pairs(config.dataset, split=amount, **(chosen | {"captions": "all"}))
        else:
            train, validation = hold_out(train, amount, config.seed)
    prompts = None if validation is None else _find_labels(validation)
    _check_metric(config.metric_for_best_model, prompts)
    look = look_at(train, max(LOOKED_AT, config.per_device_train_batch_size * num_processes))
    if validation is not None:
        look_at(validation, OPENED)
    if look.is_whole:
        config.limit_batch_size(look.draws, num_processes, train.name)
    return Data(train, validation, prompts, look.captions)


def _open_validation(path: str, config: TrainingConfig, chosen: dict[str, Any]) -> Pairs | PairStream:
    """Pairs to evaluate on from a source of their own. chosen: as `load_pairs` takes it"""
    if path in [source.path for source in parse_sources(config.dataset)]:
        raise ValueError(
            f"--validation {path} is a source that is trained on: name another, or one of its splits, or hold rows out "
            f"with a number (500) or a part (0.05) of them."
        )
    return load_pairs(Source(path), split=None, **(chosen | {"captions": "all"}))


def _check_metric(metric: str | None, class_prompts: list[str] | None) -> None:
    """Refuse to keep what is best at something that this data cannot measure."""
    if metric is None or not metric.startswith("zero_shot"):
        return
    if class_prompts is None:
        raise ValueError(
            f"--metric_for_best_model {metric} cannot be measured: zero-shot accuracy needs captions made of "
            f'labels by a template, such as --caption_column "a photo of a {{label}}.".'
        )
    k = int(metric.rpartition("top")[2])
    if len(class_prompts) <= k:
        raise ValueError(
            f"--metric_for_best_model {metric} cannot be measured: there are {len(class_prompts)} classes, of which "
            f"{k} are always right or nearly so; take recall@1"
            f"{' or zero_shot_top1' if len(class_prompts) > 1 < k else ''}."
        )


def describe_start(config: TrainingConfig, data: Data, processor: ProcessorMixin) -> list[str]:
    """Lines to be said when a run begins: what was chosen where nothing was given, and what is odd about the data."""
    is_masked = config.mask_duplicates == "on"
    return config.notes + describe_captions(data.captions, PairCollator(processor), is_masked=is_masked)


def build_model(config: TrainingConfig, data: Data) -> tuple[HfClipModel, HfClipProcessor]:
    """The model as training begins with it, before locks and adapters, and its processor."""
    if config.variant is not None:
        return _build_untrained(config, data)
    assert config.model is not None
    with in_one_line(config.model):
        model = HfClipModel.from_pretrained(config.model, dtype=torch.float32)
        processor = HfClipProcessor.from_pretrained(config.model)
    if config.image_size is not None:
        set_image_size_(model, processor, config.image_size)
    if config.max_text_length is not None:
        set_text_length_(model, processor, config.max_text_length)
    _set_loss_(model, config)
    return model, processor


def _build_untrained(config: TrainingConfig, data: Data) -> tuple[HfClipModel, HfClipProcessor]:
    source = str(config.variant)
    has_tokenizer = (Path(source) / "tokenizer.json").is_file()
    if source in VARIANTS or has_tokenizer:
        tokenizer = source if has_tokenizer else None
        model, processor = build_from_scratch(source, tokenizer=tokenizer, seed=config.seed)
        if given := [name for name in IMAGE_PROCESSOR_FILES if (Path(source) / name).is_file()]:
            read_object(Path(source) / given[0])
            processor.image_processor = HfClipImageProcessor.from_pretrained(source)
    else:
        model, processor = build_from_scratch(source, captions=_captions(data.train), seed=config.seed)
    _set_loss_(model, config)
    return model, processor


def _captions(pairs: Pairs | PairStream) -> Iterator[str]:
    """The texts that a vocabulary is learned from."""
    for draw in islice(pairs.draws(0, shuffle=False), MOST_CAPTIONED_ROWS):
        yield from pairs.read(draw).captions


def _set_loss_(model: HfClipModel, config: TrainingConfig) -> None:
    if config.loss == "sigmoid":
        switch_to_sigmoid_(model)
    elif config.loss == "softmax" and model.config.contrastive_loss == "sigmoid":
        raise ValueError(
            f"{config.model or config.variant} was trained with the sigmoid loss, whose bias the softmax has no use "
            f"for; leave out --loss."
        )
    if config.label_smoothing_factor and model.config.contrastive_loss == "sigmoid":
        raise ValueError("--label_smoothing_factor would have no effect: this model has the sigmoid loss.")


def prepare_training_(
    model: HfClipModel, config: TrainingConfig, device_type: str, num_processes: int
) -> dict[str, Tensor] | None:
    """Lock, freeze and adapt the model; returns its weights from before if they are needed for an average."""
    pretrained = copy_weights(model) if config.alphas else None
    lock_(model, config.lock)
    if config.variant is None:
        freeze_batch_norm_(model)
    if config.lora_rank is not None:
        add_lora_(model, config.lora_rank)
    if config.sync_batchnorm:
        if num_processes == 1:
            raise ValueError("--sync_batchnorm would have no effect: there is one process.")
        synchronize_batch_norm_(model, device_type)
    if config.gradient_checkpointing:
        # The second is what older versions of transformers call it.
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return pretrained


def build_optimizer(model: PreTrainedModel, config: TrainingConfig) -> torch.optim.Optimizer:
    assert config.learning_rate is not None
    return create_optimizer(
        model,
        config.optim,
        rates=config.learning_rate,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> Any:
    warmup = warmup_steps(config.warmup_steps, total_steps)
    if warmup > total_steps:
        raise ValueError(f"warmup_steps is {warmup}, but the run has {total_steps} steps; take at most as many.")
    try:
        return get_scheduler(config.lr_scheduler_type, optimizer, warmup, total_steps)
    except (ValueError, TypeError) as error:
        raise ValueError(f"The scheduler {config.lr_scheduler_type!r} cannot be made: {error}") from error


def build_loaders(
    data: Data,
    processor: ProcessorMixin,
    config: TrainingConfig,
    *,
    num_processes: int,
    process_index: int,
    pin_memory: bool,
    bad_rows: BadRows,
    bad_validation_rows: BadRows,
) -> tuple[PairLoader, PairLoader | None]:
    """The training batches, and those of the validation data, for one process."""
    shared: dict[str, Any] = {
        "num_workers": config.dataloader_num_workers,
        "num_processes": num_processes,
        "process_index": process_index,
        "pin_memory": pin_memory,
        "seed": config.seed,
    }
    collator = PairCollator(processor, Augmentation.parse(config.augmentation), seed=config.seed)
    train = build_loader(data.train, collator, config.per_device_train_batch_size, bad_rows=bad_rows, **shared)
    if data.validation is None:
        return train, None
    plain = PairCollator(processor, seed=config.seed)
    size = min(config.per_device_train_batch_size, 256)
    return train, build_loader(data.validation, plain, size, training=False, bad_rows=bad_validation_rows, **shared)


def count_steps(loader: PairLoader, config: TrainingConfig, accumulation: int) -> int:
    """Optimizer steps of the whole run. Raises ValueError where they cannot be known, or end before a checkpoint."""
    if config.max_steps is not None:
        steps = config.max_steps
    else:
        assert config.num_train_epochs is not None
        try:
            batches = len(loader)
        except TypeError:
            raise ValueError(
                "How long an epoch of a stream is isn't known before it was read: say how long to train with "
                "--max_steps."
            ) from None
        steps = max(1, int(config.num_train_epochs * batches) // accumulation)
    for name, every in (("save_steps", config.save_steps), ("eval_steps", config.eval_steps)):
        if every is not None and every >= steps:
            raise ValueError(f"--{name} {every} would have no effect: the run has {steps} steps in all.")
    return steps
