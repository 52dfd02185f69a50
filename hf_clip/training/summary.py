"""What a run tells the terminal: what it is about to do, what it measured, and what came of it."""

from collections.abc import Mapping

from torch import nn

from .chosen_metric import Figure, read_figure
from .data.pairs import Pairs, PairStream
from .plan import Plan

SHORT_RUN = 30.0
"""Seconds below which the start of the workers is most of the wait, which then says nothing."""

SHOWN = ("recall@1", "recall@5", "recall@10", "zero_shot_top1", "guard_acc1", "guard_mean_average_precision")
SHOWN_OF_ALL = ("recall@1", "zero_shot_top1")

WORTH_SAYING = 0.05
"""A larger part of an epoch's pairs that its last, incomplete batch leaves out is said."""


def _rows(pairs: Pairs | PairStream) -> str:
    return "a stream of pairs" if isinstance(pairs, PairStream) else f"{len(pairs):,} pairs"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Those that are trained, and all; before a wrapper splits them."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters())


def _parts_in_words(plan: Plan) -> str:
    """What a step is made of, where that is not one batch at once: sentences behind others."""
    batches, batch, at_once = plan.pairs_in_step // plan.global_batch, plan.global_batch, plan.config.pairs_at_once
    words = ""
    if batches > 1:
        words += (
            f" A step adds up the gradients of {batches} separate batches: a pair is contrasted with the {batch:,} of "
            f"its own batch alone."
        )
    if at_once is not None and at_once < plan.config.per_device_train_batch_size:
        words += f" Each process has {at_once:,} pairs in memory at once; all {batch:,} of a batch are contrasted."
    return words


def run_in_words(
    train: Pairs | PairStream,
    validation: Mapping[str, Pairs | PairStream],
    parameters: tuple[int, int],
    plan: Plan,
) -> str:
    """The line before the first step.

    Args:
        train: pairs to train on.
        validation: the sets of pairs to evaluate on, by name.
        parameters: how many numbers are trained, and how many there are.
        plan: of the run.
    """
    trained, whole = parameters
    steps, pairs, processes = plan.total_steps, plan.pairs_in_step, int(plan.launched["processes"])
    epochs = ""
    if not isinstance(train, PairStream):
        epochs = f", {steps * pairs / len(train):.3g} epochs"
        left_out = len(train) % plan.global_batch
        if left_out > WORTH_SAYING * len(train):
            epochs += f" (of {len(train):,} pairs an epoch leaves out {left_out:,}, less than a batch)"
    over = f" over {processes} processes" if processes > 1 else ""
    named = [f"{name}, {_rows(pairs)}" for name, pairs in validation.items()]
    evaluated = "; ".join(named) if len(named) > 1 else "".join(map(_rows, validation.values())) or "none"
    return (
        f"Training on {_rows(train)}, validation on {evaluated}. "
        f"{trained:,} of {whole:,} parameters are trained. {steps:,} steps of {pairs:,} pairs{over}{epochs}."
        f"{_parts_in_words(plan)}"
    )


def figures_in_words(figures: dict[str, float]) -> str:
    """The figures that a line has room for, those of other widths and sets behind those of the first."""
    more = [name for name in figures if is_shown(read_figure(name)) and name not in SHOWN]
    return ", ".join(f"{name} {figures[name]:.3f}" for name in (*SHOWN, *more) if name in figures)


def is_shown(figure: Figure | None) -> bool:
    """Whether a figure of another width or set than the first stands in a line."""
    return figure is not None and figure.metric in SHOWN_OF_ALL


def gain_in_words(
    metric: str,
    before: float,
    saved: tuple[int, float],
    last: tuple[int, float] | None,
    is_best_kept: bool,
    alpha: float | None = None,
) -> str:
    """The line that says what training has gained.

    Args:
        metric: The name of the figure.
        before: The figure of the model that training started from.
        saved: The step of the saved weights, and their figure.
        last: The last step and its figure, if it is another.
        is_best_kept: Whether the best weights are saved.
        alpha: With which the saved weights were averaged with the pretrained ones, if they were.
    """
    step, after = saved
    ended = f", {last[1]:.3f} at step {last[0]} (the last)" if last is not None else ""
    if step == 0:
        return (
            f"{metric} {before:.3f} at the start (kept){ended}: no evaluation was better, and the model that is saved "
            f"is the one that training began with."
        )
    kept = "kept" if is_best_kept else "saved"
    averaged = "" if alpha is None else f", averaged with the pretrained weights at α = {alpha:g}"
    line = f"{metric} {before:.3f} at the start, {after:.3f} at step {step}{averaged} ({kept}){ended}"
    if after < before:
        advice = "" if is_best_kept else f"; --metric_for_best_model {metric} keeps the best, the start included"
        return f"{line}: the model was better before training{advice}."
    return f"{line}."


def guard_in_words(metric: str, before: float, after: float, is_chosen_by: bool) -> str:
    """The line that says what training has cost on the guard set.

    Args:
        metric: The name of the figure.
        before: The figure of the model that training started from.
        after: The figure of the saved weights.
        is_chosen_by: Whether the saved weights were chosen by it.
    """
    line = f"{metric} {before:.3f} at the start, {after:.3f} of the model that is saved"
    if after < before and not is_chosen_by:
        return f'{line}; --metric_for_best_model "mean(recall@1, {metric})" chooses by both.'
    return f"{line}."


def wait_in_words(waited: float, trained: float) -> str:
    """The line that says how long training took, and how long it waited for data.

    Args:
        waited: Seconds without a batch.
        trained: Seconds of training in all.
    """
    if trained < SHORT_RUN:
        return f"{trained:.0f} s of training."
    share = waited / trained
    advice = "; more --dataloader_num_workers may help, and on a GPU --augment_on device" if share > 0.1 else ""
    return f"{trained:.0f} s of training, {waited:.0f} s of which ({share:.0%}) it waited for data{advice}."


def sentence(words: str) -> str:
    """Words that may stand within a sentence as a sentence of their own."""
    return f"{words[:1].upper()}{words[1:]}."
