"""Contrastive training of a CLIP on pictures with captions.

    accelerate launch finetune.py --model clip-vit-b32/ --dataset my/pairs --epochs 3 --output_dir fine-tuned/
    accelerate launch finetune.py run.yaml --max_steps 100

From one CPU to many GPUs: the loss is that of all processes' pairs together. The output folder holds the model, its
processor and card, metrics.jsonl, training_config.json and the checkpoints.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

import hf_clip  # noqa: F401  (registers the classes)
from hf_clip.publishing import PublishingError, check_repo_id
from hf_clip.training import build, failures, sharding
from hf_clip.training.bad_rows import BadRows
from hf_clip.training.checkpoint import FOLDER as CHECKPOINTS_FOLDER
from hf_clip.training.checkpoint import find_checkpoint, read_state
from hf_clip.training.config import LAUNCH, TrainingConfig, parse_config
from hf_clip.training.data import Position
from hf_clip.training.evaluating import model_inputs
from hf_clip.training.losses import global_contrastive_loss
from hf_clip.training.optim import learning_rates
from hf_clip.training.results import CONFIG_FILE, METRICS_FILE, check_output_format
from hf_clip.training.run import Run, launch_settings, make_accelerator
from hf_clip.whole_folder import check_destination


def check_ends(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Refuse, before any work is done, a folder that cannot be written or would lose something, or a missing model."""
    if config.resume is not None:
        read_state(find_checkpoint(config.output_dir, config.resume), identity={})
    elif accelerator.is_main_process:
        check_destination(config.output_dir, config.overwrite)
    if config.push_to_hub is not None:
        check_repo_id(config.push_to_hub)
    build.check_start(config)


def prepare_output(config: TrainingConfig, accelerator: Accelerator, launched: dict[str, Any]) -> None:
    """Make the output folder, with the records of this run alone."""
    if accelerator.is_main_process and config.resume is None:
        output = Path(config.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output / CHECKPOINTS_FOLDER, ignore_errors=True)
        (output / METRICS_FILE).write_text("")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        content = config.to_dict() | {LAUNCH: launched}
        (Path(config.output_dir) / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def train(config: TrainingConfig) -> None:
    """Train one model as `config` says and save it. Raises OSError or ValueError for what cannot be done."""
    accelerator = make_accelerator(config)
    launched = launch_settings(accelerator)
    check_ends(config, accelerator)
    data = build.build_data(config)
    model, processor = build.build_model(config, data)
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
    steps = build.count_steps(loader, config, accelerator.gradient_accumulation_steps)
    optimizer = build.build_optimizer(model, config)
    scheduler = build.build_scheduler(optimizer, config, steps)
    wrapped, optimizer = sharding.prepare(accelerator, model, optimizer, config)
    counters = bad_rows, bad_validation_rows
    run = Run(
        config, accelerator, wrapped, model, processor, optimizer, scheduler, counters, pretrained, steps, launched
    )
    run.set_validation(validation, data.class_prompts)
    run.start()
    prepare_output(config, accelerator, launched)
    if accelerator.device.type == "cpu":
        warn_of_few_threads()

    kind = model.config.contrastive_loss
    wrapped.train()
    with tqdm(total=steps, initial=run.state.step, desc="Training", disable=not accelerator.is_main_process) as run.bar:
        for position, batch in loader.batches(Position(run.state.epoch, run.state.batch)):
            if run.is_over():
                break
            with accelerator.accumulate(wrapped):
                outputs = wrapped(**model_inputs(batch, accelerator.device))
                result = global_contrastive_loss(
                    outputs.image_embeds,
                    outputs.text_embeds,
                    model.logit_scale,
                    logit_bias=model.logit_bias,
                    kind=kind,
                    label_smoothing=config.label_smoothing,
                    local_image_ids=batch["image_ids"] if config.mask_duplicates else None,
                    local_text_ids=batch["text_ids"] if config.mask_duplicates else None,
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
    except KeyboardInterrupt:
        with failures.said_once():
            print("\ninterrupted; --resume latest goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except PublishingError as error:
        return failures.report(PublishingError(f"{error} The model itself is in the output folder."))
    except Exception as error:
        return failures.report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
