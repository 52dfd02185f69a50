"""The configuration of one run: the options' values, checked against each other.

A value that cannot be meant is refused, and so is an option that another option leaves without effect.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.wise_ft import parse_alphas
from ..data.sources import Source
from .chosen_metric import settled_metric
from .data.augment import Augmentation
from .matryoshka_loss import check_widths, parse_widths
from .optim import find_optimizer, parse_optimizer, parse_rates
from .option_checks import AUTO, check_effects, check_needed, check_values
from .option_file import plain
from .options import (
    DEFAULT_RATES,
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    OutputOptions,
    TrainedOptions,
)
from .trainable import TOWERS, parse_lock
from .validation_sets import ValidationSet, parse_validation

MAY_CHANGE = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "output_format", "report_to"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "early_stopping_patience", "average_with_pretrained"),
    *("logging_steps", "save_steps", "eval_steps", "save_total_limit", "keep_going_without_checkpoints"),
    *("dataloader_num_workers", "max_bad_fraction", "image_folders", "gradient_checkpointing"),
    "loss_ring",
    # What counts of these are the pairs in a batch and the steps of the run, which are compared by themselves.
    *("per_device_train_batch_size", "micro_batch_size", "num_train_epochs", "max_steps"),
)
"""Options that a resumed run may change. All others decide what comes out of a run."""

ADDED = {
    "augment_on": "worker",
    "lora_dropout": 0.0,
    "lora_target_modules": [],
    "cache_frozen_features": False,
    "cached_views": 1,
    "matryoshka_dims": [],
    "matryoshka_weights": [],
    "negative_caption_column": [],
    "teacher_weight": 1.0,
}
"""Options that checkpoints of older versions do not name, and what holds for them."""

NOTHING = object()


@dataclass
class TrainingConfig(OutputOptions, OptimizationOptions, DataOptions, TrainedOptions, ModelOptions):
    """All options of one run; `hf_clip.training.options` says what each means.

    Raises:
        ValueError: a value cannot be meant, or an option has no effect.
    """

    def __post_init__(self) -> None:
        self._make_plain()
        check_needed(self)
        check_values(self)
        check_effects(self)
        self._notes: list[str] = []
        if self.learning_rate is None:
            mode = self._mode()
            self.learning_rate = DEFAULT_RATES[mode]
            self._notes.append(f"note: --learning_rate is {self.learning_rate}, the default for {mode}.")
        # The grammars of single options, which raise with their own words.
        parse_rates(self.learning_rate)
        parse_widths(self.matryoshka_dims, self.matryoshka_weights)
        find_optimizer(parse_optimizer(self.optim)[0])
        if self.replay is not None:
            parse_replay(self.replay)
        Augmentation.parse(self.augmentation)

    @property
    def notes(self) -> list[str]:
        """What was chosen where nothing was given. It is printed when the run begins."""
        return self._notes

    @property
    def alphas(self) -> list[float]:
        """The values of α that `average_with_pretrained` names."""
        return [] if self.average_with_pretrained is None else parse_alphas(self.average_with_pretrained)

    @property
    def replayed(self) -> Source | None:
        """The old pairs; `weight` is their part of all pairs."""
        return None if self.replay is None else parse_replay(self.replay)

    @property
    def widths(self) -> dict[int, float]:
        """The widths at which the loss is computed, the largest first, and their weights. Empty: the full width."""
        return parse_widths(self.matryoshka_dims, self.matryoshka_weights)

    @property
    def validation_sets(self) -> list[ValidationSet]:
        """What the model is evaluated on. The first set's figures have no name in front."""
        return parse_validation(self.validation)

    @property
    def steps_between_evaluations(self) -> int | None:
        """`eval_steps`, else `save_steps`. None where the model is evaluated at the start and at the end only."""
        return self.save_steps if self.eval_steps is None else self.eval_steps

    @property
    def pairs_at_once(self) -> int | None:
        """Pairs of a process that are in memory at once. None: to be found, see `settle_micro_batch_size`."""
        if self.micro_batch_size is None:
            return self.per_device_train_batch_size
        if self.micro_batch_size == AUTO:
            return None
        return min(int(self.micro_batch_size), self.per_device_train_batch_size)

    def settle_micro_batch_size(self, size: int, reason: str) -> None:
        """Take what was found for `auto`, and note it.

        Args:
            size: in pairs of a process.
            reason: why it is this one, to be said behind "since".
        """
        self._notes.append(f"note: --micro_batch_size is {size}, since {reason}.")
        self.micro_batch_size = None if size >= self.per_device_train_batch_size else str(size)

    def settle_widths(self, full: int, trained: Sequence[int] | None) -> None:
        """Take over the widths that a model was trained at where none are given, and note it.

        Args:
            full: of the model's features.
            trained: the widths that the model was trained at; None for the full one.

        Raises:
            ValueError: the model cannot be trained at the widths that are given.
        """
        if widths := self.widths:
            check_widths(widths, full)
            if len(widths) > 1:
                return
            if trained is None:
                raise ValueError(
                    f"--matryoshka_dims {full} would have no effect: it is the full width, at which a model is trained "
                    f"anyway. Name smaller ones too."
                )
            self.matryoshka_dims, self.matryoshka_weights = [], []
        elif trained is not None:
            self.matryoshka_dims = list(map(str, trained))
            self._notes.append(
                f"note: --matryoshka_dims is {','.join(self.matryoshka_dims)}, at which the model was trained before; "
                f"--matryoshka_dims {full} trains the full width alone."
            )

    def limit_batch_size(self, rows: int, num_processes: int, data: str) -> None:
        """Make batches no larger than the data, and note it.

        Args:
            rows: how many pairs an epoch has.
            num_processes: of the run, which share a batch.
            data: what the data are called.

        Raises:
            ValueError: there are not even two pairs.
        """
        most = rows // num_processes
        if self.per_device_train_batch_size <= most:
            return
        of_each = f" in each of {num_processes} processes" if num_processes > 1 else ""
        if most * num_processes < 2:
            raise ValueError(
                f"{data}: an epoch has {rows} pairs{f' for {num_processes} processes' if of_each else ''}, but a pair "
                f"is learned against others: at least {max(2, num_processes)} are needed."
            )
        self._notes.append(f"note: --per_device_train_batch_size is {most}{of_each}, since an epoch has {rows} pairs.")
        self.per_device_train_batch_size = most
        if self.pairs_at_once == most:
            self.micro_batch_size = None

    def _make_plain(self) -> None:
        """Paths, NumPy's numbers and arrays, single words for lists and YAML's `on` and `off` as what JSON can hold."""
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            if field.default_factory is not dataclasses.MISSING:
                value = [value] if isinstance(value, (str, int, float)) else list(value or [])
            setattr(self, field.name, value)
        self.validation = list(map(str, self.validation))
        for name in ("matryoshka_dims", "matryoshka_weights"):
            words = [part.strip() for value in getattr(self, name) for part in str(value).split(",")]
            setattr(self, name, [word for word in words if word])
        self.micro_batch_size = None if self.micro_batch_size is None else str(self.micro_batch_size).lower()
        switch = str(self.mask_duplicates).lower()
        self.mask_duplicates = {"true": "on", "false": "off"}.get(switch, self.mask_duplicates)
        if self.metric_for_best_model is not None:
            names = [one.name for one in self.validation_sets]
            self.metric_for_best_model = settled_metric(self.metric_for_best_model, names)
        if str(self.resume_from_checkpoint).lower() == "true":  # as Trainer.train takes it
            self.resume_from_checkpoint = "latest"

    def _mode(self) -> str:
        """Which of `DEFAULT_RATES` this run is."""
        if self.variant is not None:
            return "from scratch"
        if self.lora_rank is not None:
            return "LoRA"
        return "the projections alone" if self.are_towers_locked else "fine-tuning"

    @property
    def are_towers_locked(self) -> bool:
        """Whether no block of either tower is trained."""
        lock = parse_lock(self.lock)
        return len(lock) == 2 and all(unlocked is None for unlocked in lock.values())

    @property
    def cached_towers(self) -> tuple[str, ...]:
        """The towers whose features are stored: with `cache_frozen_features` those that are locked whole."""
        lock = parse_lock(self.lock) if self.cache_frozen_features else {}
        return tuple(tower for tower in TOWERS if tower in lock and lock[tower] is None)

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as JSON can hold them. A single validation set is a text, as in older versions."""
        values = dataclasses.asdict(self)
        if len(self.validation) < 2:
            values["validation"] = self.validation[0] if self.validation else None
        return values

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on from."""
        found = {name: value for name, value in self.to_dict().items() if name not in MAY_CHANGE}
        return {name: None if ADDED.get(name, NOTHING) == value else value for name, value in found.items()}


def parse_replay(text: str) -> Source:
    """Read `--replay`: a data set and its part of all pairs, `old/pairs=0.3`.

    Raises:
        ValueError: The part is missing, or not between 0 and 1.
    """
    source = Source.parse(text)
    if source.weight is None or source.weight >= 1:
        raise ValueError(
            f"--replay is {text!r}, but must be a data set and its part of all pairs, between 0 and 1: old/pairs=0.3."
        )
    return source
