"""The configuration of one run: the options' values, checked against each other.

`parse_config` reads it from a command line, or from a YAML or JSON file with a command line behind it. A value that
cannot be meant is refused, and so is an option that another option leaves without effect.
"""

import dataclasses
import math
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.wise_ft import parse_alphas
from ..data.sources import Source
from .chosen_metric import metric_of, parse_metric
from .data.augment import Augmentation
from .optim import find_optimizer, parse_optimizer, parse_rates
from .option_file import LAUNCH, OPTION_FILES, plain, read_options, words_of
from .option_names import hint
from .options import (
    DEFAULT_RATES,
    GROUPS,
    GUARD,
    METRICS,
    OPTIONS,
    TRACKERS,
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    OutputOptions,
    TrainedOptions,
)
from .trainable import parse_lock

AUTO = "auto"
"""Of `--micro_batch_size`: the largest that fits into memory."""

WITHOUT_WARMUP = ("constant",)

NEED_A_METRIC = ("reduce_lr_on_plateau", "greedy")

BELOW_ONE = math.nextafter(1, 0)
RANGES = (
    ("max_bad_fraction", 0, 1, "from 0 to 1"),
    ("label_smoothing_factor", 0, BELOW_ONE, "at least 0 and below 1"),
    ("lora_dropout", 0, BELOW_ONE, "at least 0 and below 1"),
    ("patch_dropout", math.ulp(0), BELOW_ONE, "between 0 and 1, such as 0.5"),
    ("ema_decay", math.ulp(0), BELOW_ONE, "between 0 and 1, such as 0.9999"),
    ("layer_decay", math.ulp(0), 1, "above 0 and at most 1"),
    ("seed", 0, 2**31 - 1, f"from 0 to {2**31 - 1}"),
)
COUNTS = (
    *("per_device_train_batch_size", "num_train_epochs", "max_steps", "logging_steps", "save_steps", "eval_steps"),
    *("save_total_limit", "early_stopping_patience", "image_size", "max_text_length", "lora_rank", "max_grad_norm"),
    "lora_alpha",
    "l2_to_pretrained",
)
"""Options that are above zero where they are given."""

CHOICES = {
    "loss": (None, "softmax", "sigmoid"),
    "captions": ("one", "all"),
    "augment_on": ("worker", "device"),
    "mask_duplicates": ("on", "off"),
    "output_format": ("hf_clip", "transformers"),
    "hub_strategy": ("end", "every_save"),
}

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

ADDED = {"augment_on": "worker", "lora_dropout": 0.0, "lora_target_modules": []}
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
        self._check_needed()
        self._check_values()
        self._check_effects()
        self._notes: list[str] = []
        if self.learning_rate is None:
            mode = self._mode()
            self.learning_rate = DEFAULT_RATES[mode]
            self._notes.append(f"note: --learning_rate is {self.learning_rate}, the default for {mode}.")
        # The grammars of single options, which raise with their own words.
        parse_rates(self.learning_rate)
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
                value = [value] if isinstance(value, str) else list(value or [])
            setattr(self, field.name, value)
        self.micro_batch_size = None if self.micro_batch_size is None else str(self.micro_batch_size).lower()
        switch = str(self.mask_duplicates).lower()
        self.mask_duplicates = {"true": "on", "false": "off"}.get(switch, self.mask_duplicates)
        if self.metric_for_best_model is not None:
            self.metric_for_best_model = metric_of(parse_metric(self.metric_for_best_model))
        if str(self.resume_from_checkpoint).lower() == "true":  # as Trainer.train takes it
            self.resume_from_checkpoint = "latest"

    def _mode(self) -> str:
        """Which of `DEFAULT_RATES` this run is."""
        if self.variant is not None:
            return "from scratch"
        if self.lora_rank is not None:
            return "LoRA"
        return "the projections alone" if self._are_towers_locked() else "fine-tuning"

    def _are_towers_locked(self) -> bool:
        lock = parse_lock(self.lock)
        return len(lock) == 2 and all(unlocked is None for unlocked in lock.values())

    def _check_needed(self) -> None:
        if (not self.model) == (not self.variant):
            given = "both" if self.model else "neither"
            raise ValueError(f"Name a model to start from with --model or --variant; {given} were given.")
        if not self.dataset or not all(self.dataset):
            raise ValueError("There is nothing to train on: name it with --dataset.")
        if not self.output_dir:
            raise ValueError("There is no place for the result: name a folder with --output_dir.")
        if self.validation is not None and self.validation == self.split:
            raise ValueError(
                f"--validation {self.validation} is the split that is trained on, so that nothing would be measured: "
                f"name another split, or hold rows out with a number (500) or a part (0.05) of them."
            )
        if (self.num_train_epochs is None) == (self.max_steps is None):
            given = "neither" if self.num_train_epochs is None else "both"
            raise ValueError(f"Say how long to train with --num_train_epochs or --max_steps; {given} were given.")

    def _check_values(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but it must be positive.")
        for name in ("dataloader_num_workers", "weight_decay", "warmup_steps"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, but must be 0 (none) or more.")
        micro = self.micro_batch_size
        if micro not in (None, AUTO) and not (micro.isdecimal() and int(micro) > 0):
            raise ValueError(
                f"micro_batch_size is {micro!r}, but must be a number of pairs, at least 1, or {AUTO} for the largest "
                f"that fits."
            )
        for name, low, high, words in RANGES:
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, but must be {words}.")
        if self.lr_scheduler_type in NEED_A_METRIC:
            raise ValueError(
                f"lr_scheduler_type is {self.lr_scheduler_type!r}, which follows a metric; take one over steps, such "
                f"as cosine."
            )
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise ValueError(f"{name} is {value!r}, but must be one of {listed}.")
        for name in self.report_to:
            if name not in TRACKERS:
                raise ValueError(f"report_to has {name!r}, but must be of {', '.join(TRACKERS)}.")
        if not isinstance(self.push_to_hub, bool):
            raise ValueError(moved_repository(self.push_to_hub))

    def _check_effects(self) -> None:
        """Refuse what the other options leave without effect."""
        scratch, evaluated, metric = self.variant is not None, self.validation is not None, self.metric_for_best_model
        alphas, are_towers_locked = self.alphas, self._are_towers_locked()
        at_once = self.pairs_at_once
        of_guard = [name for name in parse_metric(metric) if name.startswith(GUARD)] if metric else []
        without_effect = [
            (
                self.micro_batch_size is not None and at_once == self.per_device_train_batch_size,
                "micro_batch_size",
                f"a batch has {self.per_device_train_batch_size} pairs, which are in memory at once without it",
            ),
            (are_towers_locked and self.layer_decay != 1, "layer_decay", "both towers are locked"),
            (are_towers_locked and self.gradient_checkpointing, "gradient_checkpointing", "both towers are locked"),
            (self.sync_batchnorm and not scratch, "sync_batchnorm", "fine-tuning keeps BatchNorm as it is"),
            *(
                (getattr(self, name) and self.lora_rank is None, name, "there are no adapters without --lora_rank")
                for name in ("lora_alpha", "lora_dropout", "lora_target_modules")
            ),
            (scratch and self.lora_rank, "lora_rank", "adapters stand beside trained weights; use --model"),
            (scratch and self.l2_to_pretrained, "l2_to_pretrained", "there is nothing pretrained; use --model"),
            (
                self.lora_rank and self.l2_to_pretrained,
                "l2_to_pretrained",
                "beside adapters the pretrained weights stay as they are",
            ),
            (scratch and self.lock, "lock", "random weights are not worth keeping; use --model"),
            (scratch and alphas, "average_with_pretrained", "there is nothing pretrained; use --model"),
            (scratch and self.image_size, "image_size", "a model from scratch has its configuration's"),
            (scratch and self.max_text_length, "max_text_length", "a model from scratch has its configuration's"),
            (
                self.loss == "sigmoid" and self.label_smoothing_factor,
                "label_smoothing_factor",
                "the sigmoid loss has none",
            ),
            (self.replay_caption_column and not self.replay, "replay_caption_column", "there is no --replay"),
            (self.guard_labels and not self.guard_dataset, "guard_labels", "there is no --guard_dataset"),
            (self.guard_label_column and not self.guard_dataset, "guard_label_column", "there is no --guard_dataset"),
            (self.guard_dataset and not evaluated, "guard_dataset", "nothing is evaluated without --validation"),
            (
                of_guard and not self.guard_dataset,
                "metric_for_best_model",
                f"{of_guard and of_guard[0]} is measured on --guard_dataset, which is not given",
            ),
            (self.eval_steps and not evaluated, "eval_steps", "nothing is evaluated without --validation"),
            (metric and not evaluated, "metric_for_best_model", "nothing is evaluated without --validation"),
            (
                metric and not self.steps_between_evaluations,
                "metric_for_best_model",
                "it needs --eval_steps or --save_steps",
            ),
            (
                self.early_stopping_patience and not metric,
                "early_stopping_patience",
                "there is no best without --metric_for_best_model",
            ),
            (len(alphas) > 1 and not evaluated, "average_with_pretrained", "a range is chosen from by --validation"),
            (self.hub_model_id and not self.push_to_hub, "hub_model_id", "there is no --push_to_hub"),
            (self.hub_strategy != "end" and not self.push_to_hub, "hub_strategy", "there is no --push_to_hub"),
            (
                self.hub_strategy == "every_save" and not self.save_steps,
                "hub_strategy",
                "there are no checkpoints without --save_steps",
            ),
            (
                self.warmup_steps and self.lr_scheduler_type in WITHOUT_WARMUP,
                "warmup_steps",
                f"{self.lr_scheduler_type} has none",
            ),
            (self.save_total_limit != 2 and not self.save_steps, "save_total_limit", "none are written"),
            (
                self.keep_going_without_checkpoints and not self.save_steps,
                "keep_going_without_checkpoints",
                "none are written without --save_steps",
            ),
            (
                self.resume_from_checkpoint and self.overwrite_output_dir,
                "overwrite_output_dir",
                "--resume_from_checkpoint goes on with what is there",
            ),
        ]
        for is_so, name, reason in without_effect:
            if is_so:
                raise ValueError(f"--{name} would have no effect: {reason}.")

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as JSON can hold them."""
        return dataclasses.asdict(self)

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


def moved_repository(name: Any) -> str:
    """The line for a repository that was given to `--push_to_hub`, which is a switch."""
    return (
        f"--push_to_hub is a switch, but was given {str(name)!r}: name the repository with --hub_model_id, as in "
        f"--push_to_hub --hub_model_id {name}."
    )


EXAMPLES = """\
examples:
  {prog} --model clip-vit-b32/ --dataset my/pairs --num_train_epochs 3 --output_dir fine-tuned/
  {prog} run.yaml --max_steps 100
  accelerate launch --num_processes 8 -m hf_clip.commands.finetune run.yaml
"""


INSTEAD = (
    ("num_train_epochs", "max_steps"),
    ("model", "variant"),
    ("overwrite_output_dir", "resume_from_checkpoint"),
)
"""Options of which a run has one: on the command line it takes the place of the other in a file."""

SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0")
"""What may stand behind a switch."""


def _without_replaced(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A file's options without those that an option of the command line stands for."""
    given = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    replaced = {one for pair in INSTEAD for one, other in (pair, pair[::-1]) if other in given and one not in given}
    return {name: value for name, value in values.items() if name not in replaced}


def _check_push_to_hub(words: Sequence[str]) -> None:
    """Raises ValueError for a repository behind `--push_to_hub`."""
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else "" if following.startswith("-") else following
        if name.replace("-", "_") == "__push_to_hub" and value and value.lower() not in SWITCH_VALUES:
            raise ValueError(moved_repository(value))


def _refuse_with(words: Sequence[str], before: str = "", after: str = "") -> Callable[[str], None]:
    """What a parser does instead of ending the program with a line of usage: a function that raises ValueError.

    Args:
        words: Of the command line. An option that has two spellings is named as it stands there.
        before: What is said before what is wrong.
        after: What is said behind it.
    """

    def refuse(message: str) -> None:
        if found := re.match(r"argument (--\S+): ", message):
            spellings, given = found[1].split("/"), [word.partition("=")[0] for word in words]
            typed = next((name for name in reversed(given) if name in spellings), spellings[0])
            message = f"{typed}: {message[found.end() :]}"
        end = "" if message.endswith((".", "?")) else "."
        raise ValueError(f"{before}{message}{end}{after}")

    return refuse


def _check_words(parser: Any, words: list[str], path: Path) -> None:
    """Raises ValueError that names the file for a value of a wrong type."""
    before, parser.error = parser.error, _refuse_with(words, f"{path}: ")
    try:
        parser.parse_args(words)
    finally:
        parser.error = before


def parse_config(arguments: Sequence[str] | None = None, prog: str = "finetune.py") -> TrainingConfig:
    """The configuration that a command line asks for.

    Args:
        arguments: the words behind the program's name; None takes those of this process. Where the first is a .yaml or
            .json file, its options hold unless the command line says otherwise.
        prog: what the program is called in its help.

    Returns:
        The configuration, checked.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file cannot be read, there is no such option, its value is ill-formed, or the options contradict
            each other.
        SystemExit: after --help.
    """
    import sys

    from transformers import HfArgumentParser

    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(
        GROUPS,
        prog=prog,
        description="Contrastive training of a CLIP on images with captions.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=RawDescriptionHelpFormatter,
        usage=f"{prog} [run.yaml] --model MODEL --dataset DATASET --output_dir FOLDER --num_train_epochs N [options]",
        allow_abbrev=False,
    )
    if words and words[0].endswith(OPTION_FILES):
        path, words = Path(words[0]), words[1:]
        from_file = words_of(_without_replaced(read_options(path, OPTIONS), words))
        _check_push_to_hub(from_file)
        _check_words(parser, from_file, path)
        words = [*from_file, *words]
    _check_push_to_hub(words)
    parser.error = _refuse_with(words, after=f" See {prog} --help.")
    values: dict[str, Any] = {}
    *groups, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        if unknown[0].endswith(OPTION_FILES):
            parser.error(f"{unknown[0]} is no option; a file of options comes first, before all options.")
        parser.error(f"there is no option {unknown[0]!r}.{hint(unknown[0], OPTIONS, dashes='--')}")
    for group in groups:
        values |= dataclasses.asdict(group)
    return TrainingConfig(**values)


__all__ = ["DEFAULT_RATES", "GROUPS", "LAUNCH", "METRICS", "OPTIONS", "TrainingConfig", "parse_config"]
