"""What comes of a run: its last weights or its best, averaged where asked for, saved and published.

Every process calls `finish` and `publish_checkpoint` alike.
"""

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hub.upload import PublishingError
from ..model.modeling_hf_clip import HfClipModel
from .averaging import interpolate_weights
from .card import RunFacts
from .checkpoint import load_best
from .evaluating import evaluate
from .lora import add_lora_, merge_lora_
from .results import publish_results, read_metrics, save_results
from .stopping import Stopped
from .summary import gain_in_words, wait_in_words
from .trainable import lock_

if TYPE_CHECKING:
    from .run import Run

DEFAULT_METRIC = "recall@1"


def publish_checkpoint(run: "Run") -> None:
    """Save and push what there is so far; a push that fails is said and doesn't end the run."""
    weights = run.weights()
    if run.accelerator.is_main_process:
        _save(run, _merged(run, weights))
        try:
            print(publish_results(run.config, f"Step {run.state.step}"))
        except PublishingError as error:
            print(f"\nnote: {error}", file=sys.stderr)
    run.accelerator.wait_for_everyone()


def finish(run: "Run") -> None:
    """Save the result of a run whose last step is done and evaluated, and publish it."""
    config, step = run.config, run.state.step
    weights, last = run.weights(), run.figures
    if config.metric_for_best_model is not None and run.state.best_step != step:
        weights = load_best(config.output_dir)
        run.figures = run.figures_of(run.state.best_step)
        run.saved_step = run.state.best_step
    elif not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise run.diverged(f"Weights became nan in step {step}")
    model = _merged(run, weights)
    if config.alphas:
        _average_with_pretrained(run, model)
    if run.accelerator.is_main_process:
        _say_what_was_gained(run, last)
        _save(run, model)
        signum = run.signals.received
        if config.push_to_hub:
            if signum is not None:
                raise Stopped(signum, f"the model is in {config.output_dir}, and was not published")
            print(publish_results(config, f"{step} steps of training"))
        print(f"Saved to {config.output_dir}")
    run.accelerator.end_training()


def _merged(run: "Run", weights: dict[str, Tensor]) -> HfClipModel:
    """A model of its own on the CPU with these weights, adapters merged."""
    rank = run.config.lora_rank
    with torch.device("meta"):  # a copy of the model would bring its wrapper along
        model = HfClipModel(copy.deepcopy(run.model.config))
        if rank is not None:
            lock_(model, run.config.lock)
            add_lora_(model, rank)
    model.load_state_dict(weights, assign=True)
    return merge_lora_(model) if rank is not None else model


def _save(run: "Run", model: HfClipModel) -> None:
    has_curve = save_results(
        model,
        run.processor,
        model.state_dict(),
        run.config,
        run.figures,
        RunFacts(
            step=run.state.step if run.saved_step is None else run.saved_step,
            total_steps=run.total_steps,
            global_batch=run.global_batch,
            launched=run.launched,
            alpha=run.alpha,
            start_figures=run.start_figures,
            part_cut=_last_part_cut(run),
        ),
    )
    if not has_curve:
        print("note: the curve of the card was not drawn: pip install matplotlib", file=sys.stderr)


def _last_part_cut(run: "Run") -> float:
    records = read_metrics(Path(run.config.output_dir))
    return next((r["truncated_captions"] for r in reversed(records) if "truncated_captions" in r), 0.0)


def _average_with_pretrained(run: "Run", model: HfClipModel) -> None:
    """WiSE-FT: the one α, or of a range the best on the validation data."""
    assert run.pretrained is not None
    finetuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    best: tuple[float, float] | None = None
    metric = run.config.metric_for_best_model or DEFAULT_METRIC
    alphas = run.config.alphas
    chosen = alphas[0]
    for alpha in alphas if run.validation is not None else []:
        model.load_state_dict(interpolate_weights(run.pretrained, finetuned, alpha))
        whole: Any = model.to(run.accelerator.device)
        assert run.validation is not None
        figures = evaluate(whole, run.validation, run.accelerator.device, run.class_tokens)
        model.cpu()
        run.record({"step": run.state.step, "alpha": alpha, **figures})
        if best is None or figures[metric] > best[0]:
            best, chosen, run.figures = (figures[metric], alpha), alpha, figures
    model.load_state_dict(interpolate_weights(run.pretrained, finetuned, chosen))
    run.alpha = chosen
    if len(alphas) > 1 and run.accelerator.is_main_process:
        print(f"averaged with the pretrained weights at α = {chosen:g}, the best of {len(alphas)} at {metric}")


def _say_what_was_gained(run: "Run", last: dict[str, float]) -> None:
    """`last`: the figures of the last step; run.figures are those of the weights that are saved."""
    if run.state.step > run.resumed_at:
        print(wait_in_words(run.waited, run.trained))
    metric = run.config.metric_for_best_model or DEFAULT_METRIC
    if metric not in run.start_figures or metric not in run.figures:
        return
    saved = (run.state.step if run.saved_step is None else run.saved_step, run.figures[metric])
    end = None if run.saved_step is None else (run.state.step, last[metric])
    print(gain_in_words(metric, run.start_figures, saved, end, run.config.metric_for_best_model is not None))
