"""The steps of a run: pairs are embedded, contrasted over all processes, and the optimizer takes a step.

What is done around them stands in `run`.

Dimensions: B local batch, D embedding.
"""

import os
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..extras import require
from ..hub.upload import PublishingError
from . import sharding, stopping
from .build import build_learner
from .config import TrainingConfig
from .distillation import add_distillation
from .evaluating import INPUTS
from .gradient_caching import backpropagate
from .launching import make_accelerator
from .losses import ContrastiveResult
from .matryoshka_loss import matryoshka_contrastive_loss
from .micro_batch_size import settle_micro_batch_size
from .optim import learning_rates
from .output import held
from .refusals import check_run
from .run import Run
from .run_data import describe_start
from .run_loaders import build_loaders
from .summary import run_in_words


def train(config: TrainingConfig) -> None:
    """Train one model, save it, and publish it if that is asked for.

    Args:
        config: all options of the run.

    Raises:
        OSError, ValueError, ImportError: the run cannot be done. The message says why and what to do.
        Stopped: a signal ended it. This is a KeyboardInterrupt.
    """
    require("Training", "train")
    signals = stopping.Signals()
    with stopping.heeded(signals):
        accelerator = make_accelerator(config)
        holding = held(config.output_dir) if accelerator.is_main_process else nullcontext()
        with stopping.others_watched(), holding:
            try:
                train_alone(config, accelerator, signals)
            except PublishingError as error:
                raise PublishingError(f"{error} The model itself is in the output folder.") from error


def train_alone(config: TrainingConfig, accelerator: Any, signals: stopping.Signals) -> None:
    """`train`, in the output folder that the main process holds."""
    data, plan = check_run(config, accelerator)
    learner = build_learner(plan, data, accelerator)
    loader, validation = build_loaders(data, learner, config)
    settle_micro_batch_size(config, learner)
    run = Run(plan, learner, loader, validation, signals)
    if accelerator.is_main_process:
        sys.stderr.writelines(f"{line}\n" for line in describe_start(config, data, learner.processor))
        evaluated = {each.name: each.pairs for each in data.validation_sets}
        print(run_in_words(data.train, evaluated, learner.parameters, plan))
    if accelerator.device.type == "cpu":
        warn_of_few_threads()

    wrapped, model = learner.wrapped, learner.model
    wrapped.train()
    for batch in run.batches():
        with accelerator.accumulate(wrapped):
            result = backpropagate(
                model,
                {name: batch[name] for name in INPUTS},
                partial(contrast, run, batch),
                micro_batch_size=config.pairs_at_once,
                wrapped=wrapped,
                accelerator=accelerator,
            )
            if accelerator.sync_gradients:
                sharding.average_left_out_gradients(accelerator, model)
                if learner.penalty is not None:
                    learner.penalty.add_gradients_(model, accelerator.scaler)
                if config.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
            rates = learning_rates(learner.optimizer)
            learner.optimizer.step()
            learner.optimizer.zero_grad()
        if accelerator.sync_gradients:
            if not accelerator.optimizer_step_was_skipped:  # fp16 passes over steps whose gradients overflow
                learner.scheduler.step()
            sharding.clamp_temperature_(accelerator, model)
        run.batch_done(result, rates)
    run.finish()


def contrast(
    run: Run,
    batch: dict[str, Tensor],
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> ContrastiveResult:
    """The loss of a whole batch, however many of its pairs are embedded at once.

    Args:
        run: Which refuses a loss that is no number.
        batch: Pairs of this process.
        image_embeds: (B, D) of all of them.
        text_embeds: (B, D) likewise, with those of negative captions behind.
        logit_scale: () as the model has it.
        logit_bias: () likewise.
    """
    is_masked, widths, pairs = run.config.mask_duplicates == "on", run.config.widths, len(image_embeds)
    result = matryoshka_contrastive_loss(
        image_embeds,
        text_embeds[:pairs],
        logit_scale,
        dims=list(widths),
        weights=list(widths.values()),
        logit_bias=logit_bias,
        kind=run.learner.model.config.contrastive_loss,
        label_smoothing=run.config.label_smoothing_factor,
        local_image_ids=batch["image_ids"] if is_masked else None,
        local_text_ids=batch["text_ids"] if is_masked else None,
        local_negative_text_embeds=text_embeds[pairs:],
        local_negative_text_ids=batch.get("negative_text_ids") if is_masked else None,
        ring=run.config.loss_ring,
    )
    if run.learner.teacher is None:
        run.check_loss(result.global_loss)
        return result
    given = (image_embeds, text_embeds[:pairs], logit_scale)
    distillation = run.learner.teacher.distill(batch, *given, run.config.loss_ring)
    run.check_loss(result.global_loss, distillation.global_loss)
    return add_distillation(result, distillation, run.config.teacher_weight)


def warn_of_few_threads() -> None:
    """Say so where `accelerate launch` has left most of a machine's cores unused."""
    is_launched_alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ
    if is_launched_alone and torch.get_num_threads() == 1 < (os.cpu_count() or 1) and not is_one_thread_wanted():
        print(
            f"note: `accelerate launch` gives a process one CPU thread unless told otherwise; this machine has "
            f"{os.cpu_count()}: pass --num_cpu_threads_per_process before the program's name.",
            file=sys.stderr,
        )


def is_one_thread_wanted() -> bool:
    """Whether `OMP_NUM_THREADS` was set for the launcher, which is this process's parent and sets it for this one."""
    from psutil import Error, Process  # which accelerate brings

    try:
        return "OMP_NUM_THREADS" in Process(os.getppid()).environ()
    except Error:  # another user's, or gone
        return False
