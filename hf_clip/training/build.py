"""What a run needs, made from its options: data, model and processor, optimizer, loaders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin, get_scheduler

from ..checkpoints.folders import IMAGE_PROCESSOR_FILES, in_one_line
from ..data.sources import Source, names_a_source, parse_sources
from ..evaluation.labelled_images import LabelledImages
from ..model.checked_files import read_object
from ..model.configuration_hf_clip import HfClipConfig
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from ..model.variants import VARIANTS
from . import sharding
from .averaging import MovingAverage, copy_weights
from .config import TrainingConfig
from .data.augment import Augmentation
from .data.bad_rows import BadRows
from .data.collator import PairCollator
from .data.load_pairs import hold_out, load_pairs, read_validation, with_replay
from .data.loader import PairLoader, build_loader
from .data.pairs import Pairs, PairStream
from .data.stored_collator import StoredCollator, StoredPairs, Stores
from .data.survey import (
    LOOKED_AT,
    OPENED,
    Look,
    check_negatives,
    describe_captions,
    describe_found_columns,
    describe_negatives,
    look_at,
)
from .evaluating import EvaluatedPairs, Validation
from .frozen_towers import FrozenTowers, StoredSet, store_towers_
from .guarding import Guard, open_guard
from .learner import Learner
from .lora import add_lora_of_run_
from .optim import create_optimizer, warmup_steps
from .patch_dropout import drop_patches_
from .penalty import PenaltyTowardsStart
from .plan import Plan
from .run_state import parse_state
from .scratch import build_from_scratch
from .summary import count_parameters
from .surgery import set_image_size_, set_text_length_, switch_to_sigmoid_
from .teacher import make_teacher
from .trainable import freeze_batch_norm_, lock_, synchronize_batch_norm_
from .validation_sets import ValidationPairs, prefix_of

MOST_CAPTIONED_ROWS = 1_000_000
LARGEST_EVALUATED_BATCH = 256

MOST_WORKERS = 16
"""Of one process, where the options do not say: more than most GPUs can follow. Each holds two batches."""


@dataclass
class Data:
    """Pairs to train on and those to evaluate on.

    guard:         images that show what the model forgets
    look:          at rows to train on
    """

    train: Pairs | PairStream
    validation_sets: list[ValidationPairs]
    look: Look
    guard: LabelledImages | None = None

    @property
    def validation(self) -> Pairs | PairStream | None:
        """The pairs of the first validation set."""
        return self.validation_sets[0].pairs if self.validation_sets else None

    @property
    def class_prompts(self) -> list[str] | None:
        """The class prompts of the first validation set."""
        return self.validation_sets[0].class_prompts if self.validation_sets else None


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


def open_data(config: TrainingConfig, num_processes: int = 1) -> Data:
    """Open the data and look at some rows. `config` gets batches that are no larger than the data.

    Args:
        config: the options.
        num_processes: of the run.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a source, split or column is wrong. The message says which.
    """
    chosen: dict[str, Any] = {
        "image_column": config.image_column,
        "caption_column": config.caption_column,
        "captions": config.captions,
        "streaming": config.streaming,
        "image_folders": config.image_folders,
    }
    negatives = config.negative_caption_column
    train = load_pairs(config.dataset, split=config.split, negative_caption_column=negatives, **chosen)
    if config.captions == "all" and isinstance(train, Pairs) and not train.has_several_captions:
        raise ValueError("--captions all would have no effect: a row of this data has one caption.")
    chosen["passed_over"] = negatives  # wrong captions are no captions of other data either
    evaluated: list[tuple[str, Pairs | PairStream]] = []
    for one in config.validation_sets:
        amount = read_validation(one.source)
        if isinstance(amount, str) and names_a_source(amount):
            validation = _open_validation(amount, config, chosen)
        elif isinstance(amount, str):
            validation = load_pairs(config.dataset, split=amount, **(chosen | {"captions": "all"}))
        else:
            train, validation = hold_out(train, amount, config.seed)
            for source in validation.sources:  # which is measured as without them
                source.negatives = ()
        evaluated.append((one.name, validation))
    if (old := config.replayed) is not None and old.weight is not None:  # behind what is held out
        named = {"image_column": None, "caption_column": config.replay_caption_column}
        train = with_replay(train, load_pairs(Source(old.path), split=config.split, **(chosen | named)), old.weight)
    sets = [ValidationPairs(name, pairs, _find_labels(pairs)) for name, pairs in evaluated]
    look = look_at(train, max(LOOKED_AT, config.per_device_train_batch_size * num_processes))
    check_negatives(look, negatives)
    for _, pairs in evaluated:
        look_at(pairs, OPENED)
    if look.is_whole:
        config.limit_batch_size(look.draws, num_processes, train.name)
    return Data(train, sets, look, open_guard(config))


def _open_validation(path: str, config: TrainingConfig, chosen: dict[str, Any]) -> Pairs | PairStream:
    """Pairs to evaluate on from a source of their own. chosen: as `load_pairs` takes it"""
    sources = [source for source in (*parse_sources(config.dataset), config.replayed) if source is not None]
    if any(_is_trained_on(path, source.path, config.split) for source in sources):
        raise ValueError(
            f"--validation {path} is a source that is trained on: name another, or one of its splits, or hold rows out "
            f"with a number (500) or a part (0.05) of them."
        )
    return load_pairs(Source(path), split=None, **(chosen | {"captions": "all"}))


def _is_trained_on(path: str, source: str, split: str) -> bool:
    """Whether a source is one that is trained on, or the folder or file of its split, however it is written."""
    place, trained = (os.path.realpath(os.path.expanduser(each)) for each in (path, source))
    return path == source or place == trained or os.path.splitext(place)[0] == os.path.join(trained, split)


def describe_start(config: TrainingConfig, data: Data, processor: ProcessorMixin) -> list[str]:
    """Lines to be said when a run begins: what was chosen where nothing was given, and what is odd about the data."""
    is_masked, collator = config.mask_duplicates == "on", PairCollator(processor)
    captions = describe_captions(data.look.captions, collator, is_masked=is_masked)
    notes = [*config.notes, *describe_found_columns(data.train)] if config.caption_column is None else config.notes
    return notes + captions + describe_negatives(data.look, collator, is_masked=is_masked)


def load_image_processor(config: TrainingConfig, model_config: HfClipConfig) -> HfClipImageProcessor:
    """The image processor that a model comes with, or one for its size where it comes with none."""
    if config.model is not None:
        return HfClipImageProcessor.from_pretrained(config.model)
    for name in IMAGE_PROCESSOR_FILES:
        if (file := Path(str(config.variant)) / name).is_file():
            read_object(file)
            return HfClipImageProcessor.from_pretrained(config.variant)
    return HfClipImageProcessor.for_image_size(model_config.vision_config.image_size)


def load_model(config: TrainingConfig, data: Data) -> tuple[HfClipModel, HfClipProcessor]:
    """The model that training begins with, and its processor. From scratch its weights are random.

    Args:
        config: the options.
        data: whose captions a vocabulary is learned from where none comes with the model.
    """
    if config.model is not None:
        with in_one_line(config.model):
            model = HfClipModel.from_pretrained(config.model, dtype=torch.float32)
            processor = HfClipProcessor.from_pretrained(config.model)
        return model, processor
    source = str(config.variant)
    if (Path(source) / "tokenizer.json").is_file():
        model, processor = build_from_scratch(source, tokenizer=source, seed=config.seed)
    elif source in VARIANTS:
        model, processor = build_from_scratch(source, seed=config.seed)
    else:
        model, processor = build_from_scratch(source, captions=_captions(data.train), seed=config.seed)
    processor.image_processor = load_image_processor(config, model.config)
    return model, processor


def change_model_(model: HfClipModel, processor: Any, config: TrainingConfig) -> None:
    """Give a model and its processor the image size, text length, widths and loss that the options ask for.

    Raises:
        ValueError: the model cannot have them.
    """
    if config.image_size is not None:
        set_image_size_(model, processor, config.image_size)
    if config.max_text_length is not None:
        set_text_length_(model, processor, config.max_text_length)
    model.config.matryoshka_dims = list(config.widths) or None
    if config.loss == "sigmoid":
        switch_to_sigmoid_(model)
    elif config.loss == "softmax" and model.config.contrastive_loss == "sigmoid":
        raise ValueError(
            f"{config.model or config.variant} was trained with the sigmoid loss, whose bias the softmax has no use "
            f"for; leave out --loss."
        )
    if config.label_smoothing_factor and model.config.contrastive_loss == "sigmoid":
        raise ValueError("--label_smoothing_factor would have no effect: this model has the sigmoid loss.")


def _captions(pairs: Pairs | PairStream) -> Iterator[str]:
    """The texts that a vocabulary is learned from."""
    for draw in islice(pairs.draws(0, shuffle=False), MOST_CAPTIONED_ROWS):
        yield from pairs.read(draw).captions


def prepare_training_(model: HfClipModel, config: TrainingConfig, device_type: str, num_processes: int) -> None:
    """Lock and freeze what is not trained, and put adapters beside it.

    Args:
        model: after `change_model_`.
        config: the options.
        device_type: where the model will be trained, such as "cuda".
        num_processes: of the run.

    Raises:
        ValueError: the model has no such parts.
    """
    lock_(model, config.lock)
    if config.variant is None:
        freeze_batch_norm_(model)
    add_lora_of_run_(model, config)
    if config.patch_dropout is not None:
        drop_patches_(model, config.patch_dropout)
    if config.sync_batchnorm:
        if num_processes == 1:
            raise ValueError("--sync_batchnorm would have no effect: there is one process.")
        synchronize_batch_norm_(model, device_type)
    if config.gradient_checkpointing:
        # The second is what older versions of transformers call it.
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})


def build_optimizer(model: PreTrainedModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the options ask for. Raises as `create_optimizer`."""
    assert config.learning_rate is not None
    return create_optimizer(
        model,
        config.optim,
        rates=config.learning_rate,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> Any:
    """The schedule of the learning rates over so many steps.

    Raises:
        ValueError: there is no such schedule, or its warm-up is longer than the run.
    """
    warmup = warmup_steps(config.warmup_steps, total_steps)
    if warmup > total_steps:
        raise ValueError(f"warmup_steps is {warmup}, but the run has {total_steps} steps; take at most as many.")
    try:
        return get_scheduler(config.lr_scheduler_type, optimizer, warmup, total_steps)
    except (ValueError, TypeError) as error:
        raise ValueError(f"The scheduler {config.lr_scheduler_type!r} cannot be made: {error}") from error


def build_learner(plan: Plan, data: Data, accelerator: Any) -> Learner:
    """Load the model and make it ready for training. Every process calls this.

    Args:
        plan: of the run, as `check_run` returns it.
        data: likewise.
        accelerator: what `accelerate launch` has set up.
    """
    from accelerate.utils import set_seed

    config = plan.config
    model, processor = load_model(config, data)
    change_model_(model, processor, config)
    set_seed(config.seed, device_specific=True)
    pretrained = copy_weights(model) if config.alphas else None
    prepare_training_(model, config, accelerator.device.type, accelerator.num_processes)
    parameters, frozen = count_parameters(model), None
    written = {} if plan.start is None else parse_state(plan.start).frozen
    teacher = make_teacher(config, accelerator, data.train, workers_of(config, accelerator), written)
    if config.cached_towers:
        frozen = store_towers_(
            model,
            processor,
            config,
            accelerator,
            train=data.train,
            validation=data.validation_sets,
            num_workers=workers_of(config, accelerator),
            written=written,
        )
        if pretrained is not None:
            pretrained = {name: pretrained[name] for name in pretrained if not name.startswith(frozen.prefixes)}
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, plan.total_steps)
    wrapped, optimizer = sharding.prepare(accelerator, model, optimizer, config)
    average = None
    if config.ema_decay is not None:
        access = partial(sharding.whole_parameters, accelerator, model)
        average = MovingAverage(model, config.ema_decay, access, plan.total_steps)
    weight = config.l2_to_pretrained
    penalty = None if weight is None else PenaltyTowardsStart(model, weight)  # of the parameters as they are wrapped
    return Learner(
        *(accelerator, wrapped, model, processor, optimizer, scheduler),
        average=average,
        pretrained=pretrained,
        penalty=penalty,
        parameters=parameters,
        frozen=frozen,
        teacher=teacher,
    )


def find_num_workers(accelerator: Any) -> int:
    """How many workers a loader of this process has where the options do not say: see `MOST_WORKERS`.

    A GPU leaves all cores but one to them, of which the processes of this machine have as many each. Without a GPU the
    cores compute, and one worker is enough.

    Args:
        accelerator: what `accelerate launch` has set up.
    """
    if accelerator.device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return min(max(cores // on_this_machine - 1, 1), MOST_WORKERS)


def workers_of(config: TrainingConfig, accelerator: Any) -> int:
    """How many workers a loader of this process has."""
    return find_num_workers(accelerator) if config.dataloader_num_workers is None else config.dataloader_num_workers


def build_loaders(data: Data, learner: Learner, config: TrainingConfig) -> tuple[PairLoader, Validation | None]:
    """What this process trains on and what it is evaluated on.

    Args:
        data: as `check_run` returns it.
        learner: whose processor prepares images and captions.
        config: the options.
    """
    accelerator, processor = learner.accelerator, learner.processor
    frozen = learner.frozen or FrozenTowers()
    shared: dict[str, Any] = {
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
        "pin_memory": accelerator.device.type == "cuda",
        "seed": config.seed,
        "finish_images": False,
    }
    is_masked = config.mask_duplicates == "on"
    prepared: dict[str, Any] = {
        "seed": config.seed,
        "on_device": config.augment_on == "device",
        "keep_own": not is_masked,
    }

    def make(pairs: Pairs | PairStream, stores: Stores, size: int, **chosen: Any) -> PairLoader:
        augmentation = Augmentation.parse(config.augmentation) if chosen.get("training", True) else None
        bad_rows, workers = BadRows(config.max_bad_fraction), workers_of(config, accelerator)
        if not stores.is_any:
            collator = PairCollator(processor, augmentation, **prepared)
        else:
            assert isinstance(pairs, Pairs), "streams are refused"
            collator, pairs = StoredCollator(stores, processor, augmentation, **prepared), StoredPairs(pairs, stores)
            if stores.is_all and config.dataloader_num_workers is None:
                workers = 0  # to look features up takes less time than to send them
        return build_loader(pairs, collator, size, bad_rows=bad_rows, num_workers=workers, **chosen, **shared)

    size = config.per_device_train_batch_size
    stores = frozen.train
    if learner.teacher is not None:
        stores = replace(stores, teacher_images=learner.teacher.images, teacher_texts=learner.teacher.texts)
    train = make(data.train, stores, size)
    if not data.validation_sets:
        return train, None
    size = min(size, LARGEST_EVALUATED_BATCH)
    stored, sets = frozen.validation or [StoredSet()] * len(data.validation_sets), []
    for place, (each, found) in enumerate(zip(data.validation_sets, stored, strict=True)):
        class_tokens = PairCollator(processor).tokenize(each.class_prompts) if each.class_prompts else None
        if found.class_features is not None:
            class_tokens = {"input_ids": found.class_features}
        # The workers of several sets would all wait at once, each with batches in memory.
        loader = make(each.pairs, found.stores, size, training=False, keep_workers=len(stored) == 1)
        sets.append(EvaluatedPairs(loader, class_tokens, prefix_of(config.validation_sets, place)))
    guard = None if data.guard is None else Guard(data.guard, processor, min(config.pairs_at_once or size, size))
    return train, Validation(tuple(sets), guard, tuple(config.widths), tuple(frozen.files))
