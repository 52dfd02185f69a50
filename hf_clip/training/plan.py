"""What a run is about to do, known before its first step: its options, its launcher's, and its number of steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import TrainingConfig
from .data.pairs import Pairs, PairStream


@dataclass(frozen=True)
class Plan:
    """Of one run.

    Attributes:
        config: the options.
        launched: what the launcher decided, see `launch_settings`.
        total_steps: optimizer steps from the first to the last.
        start: the checkpoint that the run goes on from, None for a new run.
    """

    config: TrainingConfig
    launched: dict[str, Any]
    total_steps: int
    start: Path | None = None

    @property
    def global_batch(self) -> int:
        """Pairs of all processes that are contrasted with each other."""
        return self.config.per_device_train_batch_size * int(self.launched["processes"])

    @property
    def pairs_in_step(self) -> int:
        """Pairs of all processes and of all batches that are accumulated to one step."""
        return self.global_batch * int(self.launched["gradient_accumulation_steps"])

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on from."""
        counts = {"pairs in a batch": self.global_batch, "steps": self.total_steps}
        return self.config.identity() | counts | self.launched


def make_plan(
    config: TrainingConfig, pairs: Pairs | PairStream, launched: dict[str, Any], start: Path | None = None
) -> Plan:
    """Count the steps of a run.

    Args:
        config: the options, whose batches are no larger than the data.
        pairs: to train on.
        launched: see `launch_settings`.
        start: see `Plan`.

    Returns:
        The plan.

    Raises:
        ValueError: the number of steps is not known, or the run ends before its first checkpoint or evaluation.
    """
    if config.max_steps is not None:
        steps = config.max_steps
    elif isinstance(pairs, PairStream):
        raise ValueError(
            "How long an epoch of a stream is isn't known before it was read: say how long to train with --max_steps."
        )
    else:
        assert config.num_train_epochs is not None
        batches = len(pairs) // (config.per_device_train_batch_size * int(launched["processes"]))
        steps = max(1, int(config.num_train_epochs * batches) // int(launched["gradient_accumulation_steps"]))
    for name, every in (("save_steps", config.save_steps), ("eval_steps", config.eval_steps)):
        if every is not None and every >= steps:
            raise ValueError(f"--{name} {every} would have no effect: the run has {steps} steps in all.")
    return Plan(config, launched, steps, start)
