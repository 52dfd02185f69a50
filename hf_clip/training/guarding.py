"""The guard set: labelled images that a run does not train on, whose accuracy shows what the model forgets meanwhile.

Invariant: the figures are those that `hf-clip evaluate zero-shot` gives for the weights that would be saved, in
float32, with any number of processes.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from transformers import ProcessorMixin

from ..evaluation.labelled_images import LabelledImages
from ..evaluation.paper_data_sets import open_named
from ..evaluation.processes import ALONE, LONGEST_WAIT, Processes, acting_as
from ..evaluation.zero_shot import evaluate_zero_shot
from ..model.modeling_hf_clip import HfClipModel
from .config import TrainingConfig
from .gathering import process_index, world_size
from .options import GUARD, GUARD_METRICS

OPTIONS_HERE = {"--label-column": "--guard_label_column", "--class-names": "--guard_labels"}
"""Options of `hf-clip evaluate`, which its messages name, and what a run calls them."""


@dataclass(frozen=True)
class GuardProtocol:
    """What was measured, for the card.

    Attributes:
        split: Of the guard set.
        count: Number of its images that were classified.
        protocol: How they were, in words.
    """

    split: str
    count: int
    protocol: str


def open_guard(config: TrainingConfig) -> LabelledImages | None:
    """Open the guard set. None if there is none.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: A column or the names of the classes are missing.
    """
    if config.guard_dataset is None:
        return None
    try:
        data, _ = open_named(
            config.guard_dataset, class_names=config.guard_labels, label_column=config.guard_label_column
        )
    except ValueError as error:
        message = str(error)
        for name, here in OPTIONS_HERE.items():
            message = message.replace(name, here)
        raise ValueError(f"--guard_dataset: {message}") from error
    return data


def _processes() -> Processes:
    """This run's processes, which share the images. They talk through gloo, since features are exchanged on the CPU."""
    if world_size() == 1:
        return ALONE
    group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Processes(process_index(), world_size(), local_count, group)


class Guard:
    """Measures models on the guard set. Every process has one and calls it alike.

    Attributes:
        data: The images.
        protocol: How they were measured the last time. None before the first.
    """

    def __init__(self, data: LabelledImages, processor: ProcessorMixin, batch_size: int):
        self.data, self.processor, self.batch_size = data, processor, batch_size
        self.protocol: GuardProtocol | None = None
        self._processes = _processes()

    def measure(self, model: HfClipModel) -> dict[str, float]:
        """Classify the images by the names of their classes.

        Args:
            model: A plain model, on the device where it is to compute. All processes have the same weights.

        Returns:
            Those of `GUARD_METRICS` that there are, from 0 to 1.

        Raises:
            ValueError: The images or the texts cannot be encoded. On all processes.
        """
        with acting_as(self._processes), self._processes.together("the guard set"):
            found = evaluate_zero_shot(model, self.processor, self.data, batch_size=self.batch_size)
        self.protocol = GuardProtocol(found.split, found.count, found.protocol)
        figures = {f"{GUARD}{name}": value for name, value in found.metrics.items()}
        return {name: value for name, value in figures.items() if name in GUARD_METRICS}


def shown_guard_metric(figures: dict[str, Any]) -> str | None:
    """The figure that a guard set is reported by: accuracy, or mean average precision. None without a guard set."""
    return next((name for name in GUARD_METRICS if name in figures), None)


__all__ = ["Guard", "GuardProtocol", "open_guard", "shown_guard_metric"]
