"""What is counted from batch to batch: losses and accuracies between two records, and where the time goes."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch

from .data.bad_rows import BadRows, negatives_of_a_row, part_cut
from .distillation import DistilledResult
from .learner import Learner
from .losses import ContrastiveResult
from .run_state import RunState


def peak_memory(device: torch.device) -> int:
    """The largest memory that was in use until now, in bytes: a GPU's, or on a CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Counts:
    """Of the steps since the last record.

    Losses and accuracies are kept in the run's state, since a checkpoint may come between two records.

    Attributes:
        trained: seconds of training in all, without evaluations and checkpoints.
        waited: seconds of these in which there was no batch to train on.
        distillation: of the last batch, where the run has a teacher. A record has this one, and no mean, since a
            checkpoint may come between two records.
    """

    def __init__(self, learner: Learner, state: RunState, bad_rows: BadRows, has_negatives: bool = False):
        self.has_negatives = has_negatives
        self.learner, self.state, self.bad_rows = learner, state, bad_rows
        self.trained = self.waited = self._waited_lately = 0.0
        self.distillation: float | None = None
        self.begin()

    def begin(self) -> None:
        """Count images and seconds from now on."""
        self.images, self.since, self._waited_lately = 0, time.perf_counter(), 0.0

    def add_wait(self, seconds: float) -> None:
        """Count seconds in which there was no batch to train on."""
        self.waited += seconds
        self.trained += seconds
        self._waited_lately += seconds

    def add(self, result: ContrastiveResult, global_pairs: int) -> None:
        """Count one batch."""
        self.state.losses.append(result.global_loss.item())
        if isinstance(result, DistilledResult):
            self.distillation = result.global_distillation.item()
        self.state.accuracies.append(result.global_accuracy.item())
        self.images += global_pairs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within this block is no training, so its seconds don't count."""
        started = time.perf_counter()
        yield
        besides = time.perf_counter() - started
        self.since += besides
        self.trained -= besides

    def take_record(self, rates: dict[str, float]) -> dict[str, Any]:
        """The record of the steps since the last one, and begin anew. Every process calls this.

        Args:
            rates: the learning rate of each part of the model.
        """
        model, device = self.learner.model, self.learner.accelerator.device
        seconds = time.perf_counter() - self.since
        record = {
            "step": self.state.step,
            "loss": mean(self.state.losses),
            "accuracy": mean(self.state.accuracies),
            "learning_rate": max(rates.values()),
            "logit_scale": model.logit_scale.exp().item(),
            "images_per_second": self.images / seconds,
            "data_wait": self._waited_lately / seconds,
            "peak_memory_gb": peak_memory(device) / 1e9,
            "truncated_captions": part_cut(self.bad_rows, device),
        }
        if self.has_negatives:
            record["negative_captions"] = negatives_of_a_row(self.bad_rows, device)
        if self.learner.penalty is not None:
            record["l2_to_pretrained"] = self.learner.penalty.value(model)
        if self.distillation is not None:
            record["distillation"] = self.distillation
        if len(set(rates.values())) > 1:
            record |= {f"learning_rate_{part}": rate for part, rate in rates.items()}
        if model.logit_bias is not None:
            record["logit_bias"] = model.logit_bias.item()
        self.state.losses, self.state.accuracies = [], []
        self.begin()
        return record


def shown_on_the_bar(record: dict[str, Any]) -> dict[str, str]:
    """What of a record stands behind the progress bar."""
    return {
        "loss": f"{record['loss']:.3f}",
        "acc": f"{record['accuracy']:.0%}",
        "scale": f"{record['logit_scale']:.1f}",
        "images_per_s": f"{record['images_per_second']:.0f}",
        "wait": f"{record['data_wait']:.0%}",
        "mem": f"{record['peak_memory_gb']:.1f}GB",
    }
