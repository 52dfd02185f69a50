"""The weights that were best at `--metric_for_best_model` so far, and the end of a run that finds no better ones.

They lie in output_dir/checkpoints/best/model.safetensors, with their step in the file's header.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoints.whole_file import whole_file
from .checkpoint import FOLDER, RunState
from .config import TrainingConfig
from .learner import Learner

BEST = "best"


def _path(output_dir: str | Path) -> Path:
    return Path(output_dir, FOLDER, BEST, "model.safetensors")


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"The best weights so far, {path}, are damaged ({reason}). Delete that file: the best of the steps to come are "
        f"kept then."
    )


def step_of_best(output_dir: str | Path) -> int | None:
    """After which step the best weights were; None where there are none.

    Raises:
        ValueError: their file is damaged.
    """
    path = _path(output_dir)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def load_best(output_dir: str | Path) -> dict[str, Tensor]:
    """The best weights by name. Raises ValueError where their file is damaged."""
    try:
        return load_file(_path(output_dir))
    except (SafetensorError, OSError) as error:
        raise _damaged(_path(output_dir), error) from error


def save_best(accelerator: Any, output_dir: str | Path, weights: dict[str, Tensor], step: int) -> None:
    """Keep these weights, of this step, as the best so far. Every process calls this."""
    if accelerator.is_main_process:
        with whole_file(_path(output_dir)) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, unfinished, {"step": str(step)})
    accelerator.wait_for_everyone()


class BestWeights:
    """Keeps the best weights of a run that is going on."""

    def __init__(self, config: TrainingConfig, learner: Learner, state: RunState):
        self.config, self.learner, self.state = config, learner, state
        if state.best is not None and step_of_best(config.output_dir) != state.best_step:
            state.best = None  # a run that went back: the best weights are of a step that it will not reach

    def compare(self, figures: dict[str, float]) -> None:
        """Keep the present weights if they are the best so far.

        Args:
            figures: of the present weights.
        """
        metric, state = self.config.metric_for_best_model, self.state
        if metric is None:
            return
        if state.best is not None and figures[metric] <= state.best:
            state.evaluations_since += 1
            return
        state.best, state.best_step, state.evaluations_since = figures[metric], state.step, 0
        save_best(self.learner.accelerator, self.config.output_dir, self.learner.weights(), state.step)

    def is_given_up(self) -> bool:
        """Whether there was no new best for so many evaluations that the run ends."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.evaluations_since >= patience
