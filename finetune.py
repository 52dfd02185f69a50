"""Contrastive training of a CLIP on images with captions.

    accelerate launch finetune.py --model clip-vit-b32/ --dataset my/pairs --num_train_epochs 3 --output_dir fine-tuned/
    accelerate launch finetune.py run.yaml --max_steps 100

From one CPU to many GPUs: the loss is that of all processes' pairs together. The output folder holds the model, its
processor and card, metrics.jsonl, training_config.json and the checkpoints.
"""

import os
import sys

# Threads that wait for work in a loop take the cores from whatever else runs. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import hf_clip  # noqa: F401  (registers the classes)
from hf_clip.checkpoints.whole_folder import check_destination
from hf_clip.extras import require
from hf_clip.hub.upload import PublishingError
from hf_clip.training import build, failures, sharding, stopping
from hf_clip.training.checkpoint import find_checkpoint, read_state
from hf_clip.training.config import TrainingConfig, parse_config
from hf_clip.training.data.bad_rows import BadRows
from hf_clip.training.evaluating import model_inputs
from hf_clip.training.launching import launch_settings, make_accelerator
from hf_clip.training.losses import global_contrastive_loss
from hf_clip.training.optim import learning_rates
from hf_clip.training.output import held, prepare_output
from hf_clip.training.results import check_output_format, name_repository
from hf_clip.training.run import Run
from hf_clip.training.summary import count_parameters, run_in_words


def check_ends(config: TrainingConfig, accelerator: Any) -> None:
    """Refuse, before any work is done, a folder that cannot be written or would lose something, or a missing model."""
    if config.resume_from_checkpoint is not None:
        read_state(find_checkpoint(config.output_dir, config.resume_from_checkpoint), identity={})
    elif accelerator.is_main_process:
        check_destination(config.output_dir, config.overwrite_output_dir, "--overwrite_output_dir")
    if config.push_to_hub and accelerator.is_main_process:
        config.hub_model_id = name_repository(config)
    build.check_start(config)


def train(config: TrainingConfig) -> None:
    """Train one model as `config` says and save it.

    Raises OSError or ValueError for what cannot be done, and `Stopped`, a KeyboardInterrupt, when a signal ends it.
    """
    require("Training", "train")
    signals = stopping.Signals()
    with stopping.heeded(signals):
        accelerator = make_accelerator(config)
        check_ends(config, accelerator)
        with stopping.others_watched(), held(config.output_dir) if accelerator.is_main_process else nullcontext():
            train_alone(config, accelerator, signals)


def train_alone(config: TrainingConfig, accelerator: Any, signals: stopping.Signals) -> None:
    """`train`, of one who holds the output folder."""
    from accelerate.utils import set_seed

    launched = launch_settings(accelerator)
    data = build.build_data(config, accelerator.num_processes)
    model, processor = build.build_model(config, data)
    if accelerator.is_main_process:
        sys.stderr.writelines(f"{line}\n" for line in build.describe_start(config, data, processor))
    check_output_format(model, processor, config)
    set_seed(config.seed, device_specific=True)
    pretrained = build.prepare_training_(model, config, accelerator.device.type, accelerator.num_processes)
    bad_rows, bad_validation_rows = BadRows(config.max_bad_fraction), BadRows(config.max_bad_fraction)
    loader, validation = build.build_loaders(
        data,
        processor,
        config,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        pin_memory=accelerator.device.type == "cuda",
        bad_rows=bad_rows,
        bad_validation_rows=bad_validation_rows,
    )
    batches_in_step = accelerator.gradient_accumulation_steps
    steps = build.count_steps(loader, config, batches_in_step)
    summary = run_in_words(
        data.train,
        data.validation,
        count_parameters(model),
        steps=steps,
        pairs_in_step=config.per_device_train_batch_size * accelerator.num_processes * batches_in_step,
        processes=accelerator.num_processes,
    )
    optimizer = build.build_optimizer(model, config)
    scheduler = build.build_scheduler(optimizer, config, steps)
    wrapped, optimizer = sharding.prepare(accelerator, model, optimizer, config)
    counters = bad_rows, bad_validation_rows
    run = Run(
        config,
        accelerator,
        wrapped,
        model,
        processor,
        optimizer,
        scheduler,
        counters,
        pretrained,
        steps,
        launched,
        signals,
    )
    run.set_validation(validation, data.class_prompts)
    run.start()
    if accelerator.device.type == "cpu":
        warn_of_few_threads()
    if accelerator.is_main_process:
        print(summary)

    kind = model.config.contrastive_loss
    wrapped.train()
    with tqdm(total=steps, initial=run.state.step, desc="Training", disable=not accelerator.is_main_process) as run.bar:
        for position, batch in run.batches(loader, partial(prepare_output, config, launched)):
            with accelerator.accumulate(wrapped):
                outputs = wrapped(**model_inputs(batch, accelerator.device))
                result = global_contrastive_loss(
                    outputs.image_embeds,
                    outputs.text_embeds,
                    model.logit_scale,
                    logit_bias=model.logit_bias,
                    kind=kind,
                    label_smoothing=config.label_smoothing_factor,
                    local_image_ids=batch["image_ids"] if config.mask_duplicates == "on" else None,
                    local_text_ids=batch["text_ids"] if config.mask_duplicates == "on" else None,
                )
                run.check_loss(result.global_loss)
                accelerator.backward(result.local_loss_to_backpropagate)
                if accelerator.sync_gradients:
                    sharding.average_left_out_gradients(accelerator, model)
                    if config.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
                rates = learning_rates(optimizer)
                optimizer.step()
                optimizer.zero_grad()
            run.count(position, result, len(batch["input_ids"]))
            if accelerator.sync_gradients:
                if not accelerator.optimizer_step_was_skipped:  # fp16 passes over steps whose gradients overflow
                    scheduler.step()
                sharding.clamp_temperature_(accelerator, model)
                run.after_step(rates)
    run.finish()


def warn_of_few_threads() -> None:
    if torch.get_num_threads() == 1 < (os.cpu_count() or 1) and "LOCAL_RANK" not in os.environ:
        print(
            f"note: `accelerate launch` gives a process one CPU thread unless told otherwise; this machine has "
            f"{os.cpu_count()}: pass --num_cpu_threads_per_process before the program's name.",
            file=sys.stderr,
        )


def main() -> int:
    try:
        with failures.said_once():
            config = parse_config()
        train(config)
    except KeyboardInterrupt as stop:
        return failures.report_stop(stop)
    except PublishingError as error:
        return failures.report(PublishingError(f"{error} The model itself is in the output folder."))
    except Exception as error:
        return failures.report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
