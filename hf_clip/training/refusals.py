"""Everything that a run is refused for, found before weights are loaded and before anything is written.

What options alone tell, `TrainingConfig` refuses. What they mean for this launcher, this folder, this model and these
data is refused by `check_run`. The data are opened for it. The model and its optimizer are made once without numbers,
on torch's meta device, by the same calls that make them later: what cannot be made is refused by these.

What only shows in the midst of a run (data that go away, weights that are no numbers) is not here.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..checkpoints.folders import in_one_line
from ..checkpoints.read import check_model
from ..checkpoints.whole_folder import check_destination
from ..model.configuration_hf_clip import HfClipConfig
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from .agreement import of_main_process
from .best import step_of_best
from .build import build_optimizer, build_scheduler, change_model_, load_image_processor, prepare_training_
from .checkpoint import find_checkpoint, list_checkpoints, step_of
from .chosen_metric import Figure, parse_metric, read_figure
from .config import TrainingConfig
from .data.collator import check_image_processor
from .feature_store import check_folder, holds_only_features
from .frozen_towers import check_cacheable, replace_towers_
from .gradient_caching import check_batch_norm_is_frozen
from .launching import launch_settings
from .plan import Plan, make_plan
from .publishing import name_repository
from .results import check_output_format
from .run_data import Data, open_data
from .run_state import check_identity, parse_state
from .scratch import read_config
from .sharding import check_batch_norm, check_wrapper


def check_run(config: TrainingConfig, accelerator: Any) -> tuple[Data, Plan]:
    """Refuse a run that cannot be done, or that would lose something. Every process calls this.

    Args:
        config: the options. Batches become no larger than the data, and a repository gets its name.
        accelerator: what `accelerate launch` has set up. Its main process holds the output folder.

    Returns:
        The data, opened, and the plan of the run.

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: a file or folder is missing, or in the way.
        ImportError: a package is missing.
        ValueError: an option fits neither the model, nor the data, nor the launcher.
    """
    _check_trackers(config)
    check_wrapper(accelerator, config)
    start = _check_output(config, accelerator)
    model_config = _check_model(config)
    if config.teacher is not None:
        _check_there(config.teacher, "teacher")
        check_model(config.teacher)
    config.settle_widths(model_config.projection_dim, model_config.matryoshka_dims)
    _check_batch(config, accelerator.num_processes)
    if config.loss_ring and accelerator.num_processes == 1:
        raise ValueError("--loss_ring would have no effect: there is one process, which holds all texts anyway.")
    data = open_data(config, accelerator.num_processes)
    if config.metric_for_best_model is not None:
        for name in parse_metric(config.metric_for_best_model):
            if (figure := read_figure(name)) is not None:
                named = [each for each in data.validation_sets if each.name == figure.set]
                _check_metric(figure, (named or data.validation_sets)[0].class_prompts, list(config.widths))
    plan = make_plan(config, data.train, launch_settings(accelerator), start)
    if start is not None:
        check_identity(start, parse_state(start), plan.identity())
    _rehearse(plan, model_config, accelerator)
    return data, plan


def _check_trackers(config: TrainingConfig) -> None:
    for name in config.report_to:
        if find_spec(name) is None:  # accelerate would pass over it
            raise ImportError(f"--report_to {name} needs a package that is not installed: pip install {name}")


def _check_output(config: TrainingConfig, accelerator: Any) -> Path | None:
    """Refuse a folder that cannot be written or would lose something, checkpoints that are damaged, or a repository.

    Returns:
        The checkpoint to go on from, if any.
    """
    start, is_main_process = None, accelerator.is_main_process
    if is_main_process and (config.cache_frozen_features or config.teacher is not None):
        check_folder(config.output_dir)
    if (resume := config.resume_from_checkpoint) is not None:
        start = of_main_process(accelerator, lambda: find_checkpoint(config.output_dir, resume))
        step_of_best(config.output_dir)
    elif is_main_process:
        may_hold_files = config.overwrite_output_dir or holds_only_features(config.output_dir)
        if not may_hold_files and (before := list_checkpoints(config.output_dir)):
            raise FileExistsError(
                f"{config.output_dir} holds checkpoints of an earlier run, the last of step {step_of(before[-1])}: go "
                f"on with it by --resume_from_checkpoint latest, name another folder, or pass --overwrite_output_dir "
                f"to replace it."
            )
        check_destination(config.output_dir, may_hold_files, "--overwrite_output_dir")
    if config.push_to_hub and is_main_process:
        config.hub_model_id = name_repository(config)
    return start


def _check_batch(config: TrainingConfig, num_processes: int) -> None:
    if config.per_device_train_batch_size * num_processes < 2:
        raise ValueError(
            f"per_device_train_batch_size is {config.per_device_train_batch_size}, but a pair is learned against "
            f"others: take at least 2."
        )


def _check_model(config: TrainingConfig) -> HfClipConfig:
    """Refuse a missing or damaged model or variant; returns its configuration."""
    if config.variant is not None:
        return read_config(config.variant)
    assert config.model is not None
    _check_there(config.model, "model")
    return check_model(config.model)


def _check_there(model: str, what: str) -> None:
    if (model.startswith((".", "/", "~")) or model.endswith("/")) and not Path(model).exists():
        raise FileNotFoundError(f"There is no {what} folder {model}; check the path.")


def _check_metric(figure: Figure, class_prompts: list[str] | None, widths: list[int]) -> None:
    """Refuse to keep what is best at something that is not measured, or that these data cannot measure."""
    metric, name = figure.name, figure.metric
    if figure.width is not None and figure.width not in widths[1:]:
        known = ", ".join(replace(figure, width=each).name for each in (None, *widths[1:]))
        known = f"there are {known}"
        raise ValueError(
            f"--metric_for_best_model {metric} cannot be measured: "
            f"{known if widths else 'the full width alone is trained without --matryoshka_dims'}."
        )
    if not name.startswith("zero_shot"):
        return
    if class_prompts is None:
        raise ValueError(
            f"--metric_for_best_model {metric} cannot be measured: zero-shot accuracy needs captions made of labels "
            f'by a template, such as --caption_column "a photo of a {{label}}.".'
        )
    k, classes = int(name.rpartition("top")[2]), len(class_prompts)
    if classes <= k:
        instead = " or zero_shot_top1" if classes > 1 < k else ""
        raise ValueError(
            f"--metric_for_best_model {metric} cannot be measured: there are {classes} classes, of which {k} are "
            f"always right or nearly so; take recall@1{instead}."
        )


def _rehearse(plan: Plan, model_config: HfClipConfig, accelerator: Any) -> None:
    """Make the model, what is trained of it, its optimizer and schedule without numbers."""
    config = plan.config
    with in_one_line(config.model or str(config.variant)):
        image_processor = load_image_processor(config, model_config)
        # The tokenizer of a model from scratch may still have to be learned, and nothing is changed in it.
        tokenizer = None if config.model is None else HfClipProcessor.from_pretrained(config.model).tokenizer
        processor = SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)
    check_image_processor(image_processor)
    with torch.device("meta"):
        model = HfClipModel(model_config)
        change_model_(model, processor, config)
        check_output_format(config, model.config, image_processor)
        prepare_training_(model, config, accelerator.device.type, accelerator.num_processes)
        check_cacheable(model, config)
        replace_towers_(model, config)
        check_batch_norm(accelerator, model)
        if config.micro_batch_size is not None:
            check_batch_norm_is_frozen(model.train())
        build_scheduler(build_optimizer(model, config), config, plan.total_steps)
