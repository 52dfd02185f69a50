"""Everything that a run of finetune.py can be told: flags, or a YAML or JSON file, checked before any work is done.

No option is silently without effect: one that the others leave nothing to do is an error that says which.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .averaging import parse_alphas
from .data.augment import Augmentation
from .optim import find_optimizer, parse_optimizer, parse_rates
from .option_file import LAUNCH, plain, read_options, words_of
from .option_names import hint
from .trainable import parse_lock

METRICS = (
    "recall@1",
    "recall@5",
    "recall@10",
    "image_to_text_recall@1",
    "text_to_image_recall@1",
    "zero_shot_top1",
    "zero_shot_top5",
)
"""What `--keep_best` may name; `recall@k` is the mean of both directions."""

WITHOUT_WARMUP = ("constant",)

NEED_A_METRIC = ("reduce_lr_on_plateau", "greedy")

BELOW_ONE = math.nextafter(1, 0)
RANGES = (
    ("max_bad_fraction", 0, 1, "from 0 to 1"),
    ("label_smoothing", 0, BELOW_ONE, "at least 0 and below 1"),
    ("ema_decay", math.ulp(0), BELOW_ONE, "between 0 and 1, such as 0.9999"),
    ("layer_decay", math.ulp(0), 1, "above 0 and at most 1"),
    ("seed", 0, 2**31 - 1, f"from 0 to {2**31 - 1}"),
)

MAY_CHANGE = (
    *("output_dir", "overwrite", "resume", "output_format", "push_to_hub", "hub_strategy", "report_to"),
    *("logging_steps", "checkpoint_steps", "keep_checkpoints", "patience", "average_with_pretrained"),
    *("num_workers", "max_bad_fraction", "image_folders", "gradient_checkpointing"),
    *("batch_size", "epochs", "max_steps"),  # what counts is the global batch and the steps of the run, kept beside
)
"""Options that a resumed run may have otherwise; all others decide what comes out of it."""


DEFAULT_RATES = {
    "from scratch": "5e-4",
    "LoRA": "3e-4",
    "the projections alone": "1e-3",
    "fine-tuning": "1e-5",
}
"""The peak learning rate where none is given: what suits random weights, or moves few of those that are trained
already, leaves a model that learns all over without what it knew."""


def _option(default: Any, help: str, **more: Any) -> Any:
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    model: str | None = _option(None, "Folder or repository to start from: hf_clip's, stock CLIP's or open_clip's")
    variant: str | None = _option(
        None,
        "Train from scratch instead: one of OpenAI's nine names (with their vocabulary), a config.json (a vocabulary "
        "is learned from the captions), or a folder with one, a tokenizer and perhaps an image processor",
    )
    loss: str | None = _option(None, "softmax (CLIP) or sigmoid (SigLIP); default: what the model was trained with")
    image_size: int | None = _option(None, "Go over to images of this size (FixRes); the position table is resized")
    max_text_length: int | None = _option(None, "Go over to texts of this many tokens (Long-CLIP)")


@dataclass
class TrainedOptions:
    _argument_group_name = "what is trained"

    lock: str | None = _option(
        None,
        "Towers to keep: image, text, image:2 (all but its last 2 blocks), image,text (all but projections)",
    )
    lora_rank: int | None = _option(None, "Train factors of this rank beside frozen matrices; needs peft")
    sync_batchnorm: bool = _option(False, "Take BatchNorm's statistics over all GPUs; with --variant")
    gradient_checkpointing: bool = _option(False, "Compute activations twice and hold few of them")


@dataclass
class DataOptions:
    _argument_group_name = "data"

    dataset: list[str] = _option(
        [],
        "Pairs: a repository, a folder with metadata.csv or classes, CSV, JSON, parquet, tars; several as a=3 b=1",
    )
    split: str = _option("train", "Split to train on")
    image_column: str | None = _option(None, "Column with images, paths or URLs; default: the only possible one")
    caption_column: str | None = _option(
        None, 'Column with texts, or a template such as "a photo of a {label}."; default: the only possible one'
    )
    image_folders: list[str] = _option(
        [], "Folders outside of the data sets' own whose images rows may name; only for rows that you trust"
    )
    captions: str = _option("one", "Of a row's several captions: one drawn in each epoch, or all as rows")
    mask_duplicates: str = _option(
        "on", "Equal images or captions of a batch are no negatives of each other; off: they are", nargs="?", const="on"
    )
    streaming: bool = _option(False, "Read as it comes, instead of preparing tables on disk")
    validation: str | None = _option(None, "A split, a number of rows (500) or a part (0.05) to evaluate on")
    augmentation: str = _option("crop=0.9", '"crop=0.9,flip=0.5,jitter=0.2" (smallest area, chance, strength) or none')
    max_bad_fraction: float = _option(0.01, "End the run when more rows than this part cannot be used")
    num_workers: int = _option(1, "Processes that open and prepare images, for each process of the run")


@dataclass
class OptimizationOptions:
    _argument_group_name = "optimization"

    batch_size: int = _option(256, "Pairs of each process in a step, at most as many as there are; all are negatives")
    epochs: float | None = _option(None, "Passes over the data")
    max_steps: int | None = _option(None, "Or optimizer steps")
    learning_rate: str | None = _option(
        None,
        'Peak rate; by parts as "1e-5,temperature=1e-3" (image, text, projections). Default: '
        + ", ".join(f"{rate} for {mode}" for mode, rate in DEFAULT_RATES.items()),
    )
    optimizer: str = _option(
        "AdamW",
        'A torch.optim or 8-bit bitsandbytes class: "SGD momentum=0.9". AdamW has the paper\'s options',
    )
    weight_decay: float = _option(0.2, "Decay of matrices; not of gains, biases, positions, temperature")
    layer_decay: float = _option(1.0, "Multiply the rate by this with each level down a tower")
    scheduler: str = _option("cosine", "cosine, linear, constant, constant_with_warmup, ... of transformers")
    warmup_steps: int | None = _option(None, "Steps until the peak rate; default: 5 %% of all, at most 2000")
    max_grad_norm: float | None = _option(None, "Clip gradients to this norm")
    label_smoothing: float = _option(0.0, "Part of the target spread over a batch; softmax only")
    seed: int = _option(0, "Of order, captions, augmentation and, from scratch, weights")


@dataclass
class OutputOptions:
    _argument_group_name = "output"

    output_dir: str = _option("", "Folder for the model, its card, metrics.jsonl and checkpoints")
    overwrite: bool = _option(False, "Replace what an earlier run left in output_dir")
    logging_steps: int = _option(25, "Steps between two lines of metrics.jsonl")
    checkpoint_steps: int | None = _option(None, "Write a checkpoint, and evaluate, every so many steps")
    keep_checkpoints: int = _option(2, "Checkpoints to keep")
    resume: str | None = _option(None, "Go on from a checkpoint: latest, or its folder")
    keep_best: str | None = _option(None, f"Save the weights that were best at one of {', '.join(METRICS)}")
    patience: int | None = _option(None, "Stop after so many evaluations without a new best; with --keep_best")
    ema_decay: float | None = _option(
        None, "Evaluate and save a moving average of the weights, over about 1/(1 - decay) steps: 0.999"
    )
    average_with_pretrained: str | None = _option(
        None, "WiSE-FT: α of (1-α) pretrained + α fine-tuned: 0.5, or a range 0:1:0.1 of which the best is kept"
    )
    output_format: str = _option("hf_clip", "hf_clip, or transformers for servers that take no code (ViTs)")
    push_to_hub: str | None = _option(None, "Repository to publish in at the end")
    hub_strategy: str = _option("end", "end, or checkpoint: publish at every checkpoint too")
    report_to: list[str] = _option([], "Trackers besides metrics.jsonl: tensorboard, wandb, trackio")


GROUPS: tuple[type, ...] = (ModelOptions, TrainedOptions, DataOptions, OptimizationOptions, OutputOptions)


@dataclass
class TrainingConfig(OutputOptions, OptimizationOptions, DataOptions, TrainedOptions, ModelOptions):
    """All options of one run. Raises ValueError for values that cannot be meant, and for those without effect."""

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
        find_optimizer(parse_optimizer(self.optimizer)[0])
        Augmentation.parse(self.augmentation)

    @property
    def notes(self) -> list[str]:
        """What was chosen where nothing was given, to be said when the run begins."""
        return self._notes

    def limit_batch_size(self, rows: int, num_processes: int, data: str) -> None:
        """Take batches no larger than the data, and note it.

        Args:
            rows: how many pairs an epoch has.
            num_processes: of the run, which share a batch.
            data: what the data are called.

        Raises:
            ValueError: there are not even two pairs.
        """
        most = rows // num_processes
        if self.batch_size <= most:
            return
        of_each = f" in each of {num_processes} processes" if num_processes > 1 else ""
        if most * num_processes < 2:
            raise ValueError(
                f"{data}: an epoch has {rows} pairs{f' for {num_processes} processes' if of_each else ''}, but a pair "
                f"is learned against others: at least {max(2, num_processes)} are needed."
            )
        self._notes.append(f"note: --batch_size is {most}{of_each}, since an epoch has {rows} pairs.")
        self.batch_size = most

    def _make_plain(self) -> None:
        """Paths, NumPy's numbers and arrays, single words for lists and YAML's `on` and `off` as what JSON can hold."""
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            if field.default_factory is not dataclasses.MISSING:
                value = [value] if isinstance(value, str) else list(value or [])
            setattr(self, field.name, value)
        switch = str(self.mask_duplicates).lower()
        self.mask_duplicates = {"true": "on", "false": "off"}.get(switch, self.mask_duplicates)

    def _mode(self) -> str:
        """Which of `DEFAULT_RATES` this run is."""
        lock = parse_lock(self.lock)
        if self.variant is not None:
            return "from scratch"
        if self.lora_rank is not None:
            return "LoRA"
        are_both_locked = len(lock) == 2 and all(unlocked is None for unlocked in lock.values())
        return "the projections alone" if are_both_locked else "fine-tuning"

    @property
    def alphas(self) -> list[float]:
        return [] if self.average_with_pretrained is None else parse_alphas(self.average_with_pretrained)

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
        if (self.epochs is None) == (self.max_steps is None):
            given = "neither" if self.epochs is None else "both"
            raise ValueError(f"Say how long to train with --epochs or --max_steps; {given} were given.")

    def _check_values(self) -> None:
        counts = ("batch_size", "epochs", "max_steps", "logging_steps", "checkpoint_steps", "keep_checkpoints")
        for name in (*counts, "patience", "image_size", "max_text_length", "lora_rank", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but it must be positive.")
        for name in ("num_workers", "weight_decay", "warmup_steps"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, but must be 0 (none) or more.")
        for name, low, high, words in RANGES:
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, but must be {words}.")
        choices = {
            "loss": (None, "softmax", "sigmoid"),
            "captions": ("one", "all"),
            "mask_duplicates": ("on", "off"),
            "output_format": ("hf_clip", "transformers"),
            "hub_strategy": ("end", "checkpoint"),
            "keep_best": (None, *METRICS),
        }
        if self.scheduler in NEED_A_METRIC:
            raise ValueError(
                f"scheduler is {self.scheduler!r}, which follows a metric; take one over steps, as cosine."
            )
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise ValueError(f"{name} is {value!r}, but must be one of {listed}.")

    def _check_effects(self) -> None:
        """Refuse what the other options leave without effect."""
        scratch, evaluated = self.variant is not None, self.validation is not None
        alphas = self.alphas
        lock = parse_lock(self.lock)
        are_both_locked = len(lock) == 2 and all(unlocked is None for unlocked in lock.values())
        without_effect = [
            (are_both_locked and self.layer_decay != 1, "layer_decay", "both towers are locked"),
            (are_both_locked and self.gradient_checkpointing, "gradient_checkpointing", "both towers are locked"),
            (
                self.sync_batchnorm and not scratch,
                "sync_batchnorm",
                "fine-tuning keeps BatchNorm as it is",
            ),
            (scratch and self.lora_rank, "lora_rank", "adapters stand beside trained weights; use --model"),
            (scratch and self.lock, "lock", "random weights are not worth keeping; use --model"),
            (scratch and alphas, "average_with_pretrained", "there is nothing pretrained; use --model"),
            (scratch and self.image_size, "image_size", "a model from scratch has its configuration's"),
            (scratch and self.max_text_length, "max_text_length", "a model from scratch has its configuration's"),
            (self.loss == "sigmoid" and self.label_smoothing, "label_smoothing", "the sigmoid loss has none"),
            (self.keep_best and not evaluated, "keep_best", "nothing is evaluated without --validation"),
            (
                self.keep_best and not self.checkpoint_steps,
                "keep_best",
                "it needs --checkpoint_steps",
            ),
            (self.patience and not self.keep_best, "patience", "there is no best without --keep_best"),
            (len(alphas) > 1 and not evaluated, "average_with_pretrained", "a range is chosen from by --validation"),
            (
                self.hub_strategy != "end" and not self.push_to_hub,
                "hub_strategy",
                "there is no --push_to_hub",
            ),
            (
                self.hub_strategy == "checkpoint" and not self.checkpoint_steps,
                "hub_strategy",
                "there are no checkpoints without --checkpoint_steps",
            ),
            (self.warmup_steps and self.scheduler in WITHOUT_WARMUP, "warmup_steps", f"{self.scheduler} has none"),
            (self.keep_checkpoints != 2 and not self.checkpoint_steps, "keep_checkpoints", "none are written"),
            (self.resume and self.overwrite, "overwrite", "--resume goes on with what is there"),
        ]
        for is_so, name, reason in without_effect:
            if is_so:
                raise ValueError(f"--{name} would have no effect: {reason}.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on from."""
        return {name: value for name, value in self.to_dict().items() if name not in MAY_CHANGE}


INSTEAD = (("epochs", "max_steps"), ("model", "variant"), ("overwrite", "resume"))
"""Options of which a run has one: on the command line it takes the place of the other in a file."""

OPTIONS = [field.name for group in GROUPS for field in dataclasses.fields(group)]


def _without_replaced(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A file's options but for those in whose place the command line has another."""
    given = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    replaced = {one for pair in INSTEAD for one, other in (pair, pair[::-1]) if other in given and one not in given}
    return {name: value for name, value in values.items() if name not in replaced}


def _check_words(parser: Any, words: list[str], path: Path) -> None:
    """Raises ValueError that names the file for a value of a wrong type, instead of ending the program."""

    def refuse(message: str) -> None:
        raise ValueError(f"{path}: {message}.")

    end, parser.error = parser.error, refuse
    try:
        parser.parse_args(words)
    finally:
        parser.error = end


def parse_config(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration from a command line; a first word that is a .yaml or .json file holds options, over which
    those of the command line go.

    Raises FileNotFoundError or ValueError; wrong flags end the program with a line of usage, as everywhere.
    """
    import sys

    from transformers import HfArgumentParser

    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(
        GROUPS,
        prog="finetune.py",
        description="Contrastive training of a CLIP on images with captions. Options may stand in a file: "
        "finetune.py run.yaml --max_steps 100",
        usage="finetune.py [run.yaml] --model MODEL --dataset DATASET --output_dir FOLDER --epochs N [options]",
        allow_abbrev=False,
    )
    if words and words[0].endswith((".json", ".yaml", ".yml")):
        path, words = Path(words[0]), words[1:]
        from_file = words_of(_without_replaced(read_options(path, OPTIONS), words))
        _check_words(parser, from_file, path)
        words = [*from_file, *words]
    values: dict[str, Any] = {}
    *groups, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        parser.error(f"there is no option {unknown[0]!r}.{hint(unknown[0], OPTIONS, dashes='--')}")
    for group in groups:
        values |= dataclasses.asdict(group)
    return TrainingConfig(**values)


__all__ = ["LAUNCH", "METRICS", "TrainingConfig", "parse_config"]
