"""The weights that were best at `--metric_for_best_model` so far, and the end of a run that finds no better ones.

They lie in output_dir/checkpoints/best/model.safetensors, with their step and a digest of both in the file's header.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.whole_file import whole_file
from ..checkpoints.whole_folder import DiskFullError, free_bytes, is_full
from .agreement import of_main_process
from .checkpoint import FOLDER
from .chosen_metric import value_of
from .config import TrainingConfig
from .learner import Learner
from .run_state import RunState

BEST = "best"


def _path(output_dir: str | Path) -> Path:
    return Path(output_dir, FOLDER, BEST, "model.safetensors")


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"The best weights so far, {path}, are damaged ({reason}). Delete that file: the best of the steps to come are "
        f"kept then."
    )


def _digest(weights: dict[str, Tensor], step: str) -> str:
    """Of the weights' names, kinds, shapes and bytes, and of their step."""
    found = hashlib.sha256(step.encode())
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def step_of_best(output_dir: str | Path) -> int | None:
    """After which step the best weights were; None where there are none.

    Raises:
        ValueError: their file is damaged.
    """
    return _read(_path(output_dir))[0] if _path(output_dir).is_file() else None


def load_best(output_dir: str | Path) -> dict[str, Tensor]:
    """The best weights by name. Raises ValueError where their file is damaged."""
    return _read(_path(output_dir))[1]


def _read(path: Path) -> tuple[int, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(about["step"])
        if about.get("digest", digest := _digest(weights, about["step"])) != digest:  # the oldest have none
            raise ValueError("they are not as they were written: their checksum differs")
        return step, weights
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def save_best(accelerator: Any, output_dir: str | Path, weights: dict[str, Tensor], step: int) -> None:
    """Keep these weights, of this step, as the best so far. Every process calls this.

    Raises:
        DiskFullError: there is no room. Those that were there are whole.
    """
    path = _path(output_dir)

    def write() -> None:
        about = {"step": str(step), "digest": _digest(weights, str(step))}
        try:
            with whole_file(path) as unfinished:
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, unfinished, about)
        except Exception as error:
            if is_full(error):
                needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
                raise DiskFullError(path.parent, needed, free_bytes(path.parent)) from error
            raise

    of_main_process(accelerator, write)


class BestWeights:
    """Keeps the best weights of a run that is going on."""

    def __init__(self, config: TrainingConfig, learner: Learner, state: RunState):
        self.config, self.learner, self.state = config, learner, state
        if state.best is not None and step_of_best(config.output_dir) != state.best_step:
            state.best = None  # a run that went back: the best weights are of a step that it will not reach

    def check(self, figures: dict[str, float]) -> None:
        """Raise ValueError if there is no figure of the metric."""
        if self.config.metric_for_best_model is not None:
            value_of(self.config.metric_for_best_model, figures)

    def compare(self, figures: dict[str, float]) -> None:
        """Keep the present weights if they are the best so far.

        Args:
            figures: of the present weights.
        """
        metric, state = self.config.metric_for_best_model, self.state
        if metric is None:
            return
        value = value_of(metric, figures)
        if state.best is not None and value <= state.best:
            state.evaluations_since += 1
            return
        accelerator = self.learner.accelerator
        try:
            save_best(accelerator, self.config.output_dir, self.learner.weights(), state.step)
        except DiskFullError as error:
            if not self.config.keep_going_without_checkpoints:
                raise
            if accelerator.is_main_process:
                tqdm.write(f"warning: {error} The best weights before stay the best.", file=sys.stderr)
            return
        state.best, state.best_step, state.evaluations_since = value, state.step, 0

    def is_given_up(self) -> bool:
        """Whether there was no new best for so many evaluations that the run ends."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.evaluations_since >= patience

    def describe_end(self) -> str:
        """The line that says why a run that is given up ends."""
        count = self.state.evaluations_since
        without = f"{count} evaluation{'s' * (count != 1)} without a new best {self.config.metric_for_best_model}"
        return f"stopped early at step {self.state.step}: {without} since step {self.state.best_step}"
