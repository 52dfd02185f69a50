"""What a run trains, made from its options: model and processor, optimizer, schedule, what is locked or added."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, get_scheduler

from ..checkpoints.folders import IMAGE_PROCESSOR_FILES, in_one_line
from ..model.checked_files import read_object
from ..model.configuration_hf_clip import HfClipConfig
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from ..model.variants import VARIANTS
from . import sharding
from .averaging import MovingAverage, copy_weights
from .config import TrainingConfig
from .data.pairs import Pairs, PairStream
from .frozen_towers import store_towers_
from .learner import Learner
from .lora import add_lora_of_run_
from .optim import create_optimizer, warmup_steps
from .patch_dropout import drop_patches_
from .penalty import PenaltyTowardsStart
from .plan import Plan
from .run_data import Data
from .run_loaders import workers_of
from .run_state import parse_state
from .scratch import build_from_scratch
from .summary import count_parameters
from .surgery import set_image_size_, set_text_length_, switch_to_sigmoid_
from .teacher import make_teacher
from .trainable import freeze_batch_norm_, lock_, synchronize_batch_norm_

MOST_CAPTIONED_ROWS = 1_000_000


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
