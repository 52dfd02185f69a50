"""Which weights a run saves: the last or the best ones, averaged with the pretrained weights if that is asked for."""

from dataclasses import dataclass

from ..checkpoints.wise_ft import interpolate_weights
from ..model.modeling_hf_clip import HfClipModel
from .best import load_best
from .checkpoint import Checkpoints
from .chosen_metric import metric_of, value_of
from .config import TrainingConfig
from .evaluating import Evaluations
from .guarding import shown_guard_metric
from .learner import Learner
from .lora import Adapter
from .records import DEFAULT_METRIC, Records


@dataclass
class Outcome:
    """What is saved.

    Attributes:
        model: on the CPU, with adapters merged.
        step: after which its weights were.
        figures: of these weights on the validation data, by name; empty where nothing was evaluated.
        adapter: of LoRA, before the average with the pretrained weights.
        alpha: with which they were averaged with the pretrained ones.
    """

    model: HfClipModel
    step: int
    figures: dict[str, float]
    adapter: Adapter | None = None
    alpha: float | None = None


def present_outcome(learner: Learner, config: TrainingConfig, step: int, figures: dict[str, float]) -> Outcome:
    """The present weights as they are, in the midst of a run. Every process calls this.

    Args:
        learner: with the weights.
        config: the options.
        step: the present one.
        figures: of the last evaluation.
    """
    model, adapter = learner.plain_model(learner.weights(), config)
    return Outcome(model, step, figures, adapter)


def final_outcome(
    config: TrainingConfig, learner: Learner, checkpoints: Checkpoints, evaluations: Evaluations, records: Records
) -> Outcome:
    """What comes of a run whose last step is done and evaluated. Every process calls this.

    Raises:
        ValueError: the weights are no numbers, or the file of the best ones is damaged.
    """
    state = checkpoints.state
    if config.metric_for_best_model is not None and state.best_step != state.step:
        model, adapter = learner.plain_model(load_best(config.output_dir), config)
        outcome = Outcome(model, state.best_step, records.figures_of(state.best_step), adapter)
    else:
        outcome = present_outcome(learner, config, state.step, evaluations.figures)
        if not all(bool(tensor.isfinite().all()) for tensor in outcome.model.state_dict().values()):
            raise checkpoints.diverged(f"Weights became nan in step {state.step}")
    if config.alphas:
        _average_with_pretrained_(outcome, config, learner, evaluations, records, state.step)
    return outcome


def default_metric(figures: dict[str, float]) -> str:
    """What an average is chosen by if no metric is named: the target, or its mean with the guard set's figure."""
    guard = shown_guard_metric(figures)
    return DEFAULT_METRIC if guard is None else metric_of((DEFAULT_METRIC, guard))


def _average_with_pretrained_(
    outcome: Outcome, config: TrainingConfig, learner: Learner, evaluations: Evaluations, records: Records, step: int
) -> None:
    """WiSE-FT: average with the only α, or of several with the one that is best on the validation data."""
    assert learner.pretrained is not None
    model, accelerator, validation = outcome.model, learner.accelerator, evaluations.validation
    pretrained = learner.whole(learner.pretrained)
    finetuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alphas, metric = config.alphas, config.metric_for_best_model or default_metric(evaluations.figures)
    outcome.alpha, best = alphas[0], -1.0
    for alpha in alphas if validation is not None else []:
        assert validation is not None
        model.load_state_dict(interpolate_weights(pretrained, finetuned, alpha))
        figures = validation.measure_plain(model, accelerator.device)
        records.add({"step": step, "alpha": alpha, **figures})
        if (value := value_of(metric, figures)) > best:
            best, outcome.alpha, outcome.figures = value, alpha, figures
    model.load_state_dict(interpolate_weights(pretrained, finetuned, outcome.alpha))
    if len(alphas) > 1 and accelerator.is_main_process:
        print(f"averaged with the pretrained weights at α = {outcome.alpha:g}, the best of {len(alphas)} at {metric}")
