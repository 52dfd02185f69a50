"""The card of a trained model: what it comes from, what decided how it was trained, what was measured.

Invariant: every option that decides the result (`TrainingConfig.identity`) stands on the card unless it has its
default. So a new option cannot be forgotten here.
"""

import dataclasses
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.sources import Source, names_a_source, parse_sources
from ..evaluation.widths import split_name
from ..hub.model_card import architecture_table, card_metadata, card_text, markdown_table, name_of, usage_part
from ..model.configuration_hf_clip import HfClipConfig
from .averaging import warmup_of
from .config import TrainingConfig
from .guarding import GuardProtocol
from .lora import ADAPTER_FOLDER
from .optim import warmup_steps
from .option_checks import WITHOUT_WARMUP
from .options import GUARD
from .validation_sets import ValidationSet, place_of, prefix_of

FILES = (".csv", ".json", ".jsonl", ".parquet", ".tar", ".txt")

ALWAYS = (*("learning_rate", "optim", "weight_decay", "lr_scheduler_type", "augmentation", "mask_duplicates", "seed"),)
"""Options that stand on every card, with their defaults too."""

SAID_OTHERWISE = ("model", "variant", "dataset", "loss", "warmup_steps")
"""Options whose value stands on the card in other words: in its first sentence, or as what became of it."""

LABELS = {
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
    "label_smoothing_factor": "label smoothing",
    "lock": "locked",
    "cache_frozen_features": "features of locked towers stored",
    "cached_views": "stored views of each image",
    "lora_rank": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "lora_target_modules": "LoRA target modules",
    "mask_duplicates": "equal images and captions masked",
    "matryoshka_dims": "widths of the loss (Matryoshka)",
    "matryoshka_weights": "weights of these widths",
    "ema_decay": "decay of the moving average of weights",
}
"""Rows whose name is not the option's."""

PRECISIONS = {"no": "float32", "bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)", "fp8": "float8 (mixed)"}


@dataclass(frozen=True)
class RunFacts:
    """What the options alone do not tell of a run.

    Attributes:
        step: after which the saved weights were.
        total_steps: steps of the whole run.
        global_batch: pairs of all processes that are contrasted with each other.
        launched: see `launch_settings`.
        alpha: with which the weights were averaged with the pretrained ones.
        start_figures: of the model that training started from; empty where it was not evaluated.
        part_cut: of the captions, those that were longer than the model takes.
        guard: how the guard set was measured; None where there is none.
    """

    step: int
    total_steps: int
    global_batch: int
    launched: dict[str, Any]
    alpha: float | None = None
    start_figures: dict[str, float] = field(default_factory=dict)
    part_cut: float = 0.0
    guard: GuardProtocol | None = None


def is_repository(name: str | None) -> bool:
    """Whether a name may be given on the Hub as a repository. A folder of this machine means nothing there."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return Path(name).suffix not in FILES


def shown(name: str) -> str:
    """The name of a model or data set as it may be published. Of a folder on this machine that is its last part."""
    repository, _, configuration = name.partition(":")
    if configuration and is_repository(repository):
        return name
    return name if is_repository(name) else Path(name).name


def shown_validation(validation: str) -> str:
    """The option `validation` as it may be published."""
    return shown(validation) if names_a_source(validation) else validation


@lru_cache(maxsize=64)
def licence_of(name: str, kind: type[ModelCard] | type[DatasetCard] = ModelCard) -> str | None:
    """The licence that a model's or data set's own card states; None where there is no card, or none can be had.

    Args:
        name: a folder or a repository on the Hub.
        kind: `ModelCard` or `DatasetCard`.
    """
    path = Path(name)
    if not path.is_dir() and not is_repository(name):
        return None
    with suppress(Exception):  # a card without network, without metadata or with others than the Hub's is no reason to
        licence = kind.load(path / "README.md" if path.is_dir() else name).data.get("license")  # lose what was trained
        return ", ".join(map(str, licence)) if isinstance(licence, list) else licence and str(licence)
    return None


def results_of(
    figures: dict[str, float], config: TrainingConfig, guard: GuardProtocol | None = None
) -> list[EvalResult]:
    """Figures of the validation data and of the guard set for the model-index."""
    sets, results = config.validation_sets, []
    of_data: dict[str, Any]
    for name, value in figures.items():
        if name.startswith(GUARD):
            metric, data = name.removeprefix(GUARD), shown(str(config.guard_dataset))
            of_data = {"dataset_type": data, "dataset_name": data, "dataset_split": guard.split if guard else ""}
        else:
            place = place_of(name, sets)
            metric, of_data = name.removeprefix(prefix_of(sets, place)), _evaluated_on(sets[place].source, config)
        results.append(
            EvalResult(
                task_type="zero-shot-image-classification",
                metric_type=metric.replace("@", "_at_"),
                metric_name=metric.replace("_", " "),
                metric_value=round(value, 4),
                **of_data,
            )
        )
    return results


def _evaluated_on(validation: str, config: TrainingConfig) -> dict[str, Any]:
    """What a validation set is called in the model-index."""
    sources = [shown(source.path) for source in parse_sources(config.dataset)]
    if names_a_source(validation):
        sources = [shown(validation)]
    return {
        "dataset_type": sources[0],
        "dataset_name": " and ".join(sources),
        "dataset_split": f"validation ({shown_validation(validation)})",
    }


def _trained_on(config: TrainingConfig) -> list[Source]:
    """All sources, the replayed one too."""
    return [*parse_sources(config.dataset), *([] if config.replayed is None else [config.replayed])]


def licence_rows(config: TrainingConfig) -> dict[str, str]:
    """What the cards of the base model and of the data say of their licences, each by its name."""
    rows = {}
    if config.model is not None:
        rows["licence of the base model"] = licence_of(config.model) or "not stated where it was loaded from"
    for source in _trained_on(config):
        name = source.path.partition(":")[0] if not Path(source.path).exists() else source.path
        rows[f"licence of {shown(source.path)}"] = licence_of(name, DatasetCard) or "not stated where it was read from"
    return rows


def row_name(option: str) -> str:
    """What an option is called on the card."""
    return LABELS.get(option, option.replace("_", " "))


def training_rows(config: TrainingConfig, facts: RunFacts, loss: str) -> dict[str, str]:
    """Everything that decided how a model was trained, by name."""
    launched, accumulated = facts.launched, int(facts.launched["gradient_accumulation_steps"])
    rows: dict[str, Any] = {
        "steps": facts.step if facts.step == facts.total_steps else f"{facts.step} of {facts.total_steps}",
        "epochs": config.num_train_epochs and f"{config.num_train_epochs:g}",
        "pairs contrasted with each other": facts.global_batch,
        "batches added up to a step": f"{accumulated}, each contrasted by itself" if accumulated > 1 else None,
        "processes": launched["processes"],
        "wrapper": None if launched["wrapper"] == "none" else launched["wrapper"],
        "precision": PRECISIONS.get(launched["mixed_precision"], launched["mixed_precision"]),
        "compiler": None if launched["compiler"] == "no" else launched["compiler"],
        "loss": loss,
        "warm-up steps": None
        if config.lr_scheduler_type in WITHOUT_WARMUP
        else warmup_steps(config.warmup_steps, facts.total_steps),
        "captions cut at the model's length": f"{100 * facts.part_cut:.2g} %" if facts.part_cut else None,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, value in config.identity().items():
        if name not in SAID_OTHERWISE and value is not None and (name in ALWAYS or value != defaults[name]):
            listed = ", ".join(value) if isinstance(value, list) else value
            rows[row_name(name)] = "yes" if value is True else listed
    if config.validation:
        rows["validation"] = ", ".join(map(_shown_set, named_sets(config)))
    if config.replayed is not None:
        rows["replay"] = f"{shown(config.replayed.path)}={config.replayed.weight:g}"
    for name in ("guard_dataset", "guard_labels", "teacher"):  # which may be files of this machine
        if (value := getattr(config, name)) is not None:
            rows[row_name(name)] = shown(value)
    if config.ema_decay is not None:
        k = warmup_of(config.ema_decay, facts.total_steps)
        rows["its decay after step n"] = f"at most (1 + n) / ({1 + k:.3g} + n)"
    rows["averaged with the pretrained weights, α"] = facts.alpha
    return {name: str(value) for name, value in rows.items() if value is not None} | licence_rows(config)


def _figures_table(figures: dict[str, float], start_figures: dict[str, float]) -> str:
    """In percent; before them those of the model that training started from, where it was measured."""
    figures, start_figures = ({n.removeprefix(GUARD): v for n, v in f.items()} for f in (figures, start_figures))
    rows = [[_words_of(name), f"{100 * value:.1f}"] for name, value in figures.items()]
    if not start_figures:
        return markdown_table(["", "%"], rows)
    before = [f"{100 * start_figures[name]:.1f}" if name in start_figures else "" for name in figures]
    rows = [[name, start, end] for (name, end), start in zip(rows, before, strict=True)]
    return markdown_table(["", "%, before training", "%, these weights"], rows)


def _words_of(figure: str) -> str:
    name, width = split_name(figure)
    return name.replace("_", " ") + ("" if width is None else f", first {width} numbers")


def _of_guard(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name.startswith(GUARD)}


def _of_set(figures: dict[str, float], sets: list[ValidationSet], place: int) -> dict[str, float]:
    """The figures of one validation set, by their plain names."""
    own = {name: value for name, value in figures.items() if not name.startswith(GUARD)}
    own = {name: value for name, value in own.items() if place_of(name, sets) == place}
    return {name.removeprefix(prefix_of(sets, place)): value for name, value in own.items()}


def _shown_set(one: ValidationSet) -> str:
    source = shown_validation(one.source)
    return f"{one.name} ({source})" if one.name else source


def named_sets(config: TrainingConfig) -> list[ValidationSet]:
    """The validation sets; a single one has no name."""
    sets = config.validation_sets
    return sets if len(sets) > 1 else [replace(one, name="") for one in sets]


def measured_section(figures: dict[str, float], config: TrainingConfig, facts: RunFacts) -> list[str]:
    """What was measured of the saved weights on the validation data, and on the guard set."""
    start_figures, guard = facts.start_figures, facts.guard
    sets = named_sets(config)
    parts = [
        "## What was measured",
        f"On the validation pairs ({_shown_set(sets[0])}), with the weights that are here. Pairs that share an image "
        f"or a caption are right answers to each other.",
        _figures_table(_of_set(figures, sets, 0), _of_set(start_figures, sets, 0)),
    ]
    for place, one in enumerate(sets[1:], start=1):
        parts += [
            f"On the validation pairs {_shown_set(one)}:",
            _figures_table(_of_set(figures, sets, place), _of_set(start_figures, sets, place)),
        ]
    if guard is not None:
        parts += [
            f"On the guard set, which was not trained on and shows what was forgotten: {guard.count:,} images of "
            f"`{shown(str(config.guard_dataset))}`, split `{guard.split}`; {guard.protocol}.",
            _figures_table(_of_guard(figures), _of_guard(start_figures)),
        ]
    return parts


def trained_card(
    model_config: HfClipConfig,
    config: TrainingConfig,
    figures: dict[str, float],
    facts: RunFacts,
    curve: str | None = None,
) -> str:
    """Write the README.md of a trained model.

    Args:
        model_config: Of the model.
        config: The options of the run.
        figures: Of the saved weights on the validation data; empty if nothing was evaluated.
        facts: What the options do not tell.
        curve: The file with the plot of the run, if there is one.

    Returns:
        The card's text, with the metadata for the Hub.
    """
    repo_id = config.hub_model_id or Path(config.output_dir).resolve().name
    names = [source.path.partition(":")[0] for source in _trained_on(config)]  # user/name:config
    metadata = card_metadata(
        repo_id,
        license=licence_of(config.model) if config.model is not None else None,
        tags=["generated_from_trainer"],
        base_model=config.model if is_repository(config.model) else None,
        datasets=[name for name in names if is_repository(name)],
        results=results_of(figures, config, facts.guard),
    )
    sources = ", ".join(f"`{shown(source.path)}`" for source in parse_sources(config.dataset))
    origin = f"fine-tuned from `{shown(config.model)}`" if config.model else "trained from scratch"
    parts = [
        f"# {name_of(repo_id)}",
        f"A CLIP model {origin} on {sources}.",
        architecture_table(model_config),
        "## How it was trained",
        markdown_table(["", ""], training_rows(config, facts, model_config.contrastive_loss).items()),
    ]
    if config.lora_rank is not None:
        parts.append(
            f"What LoRA trained lies in the folder `{ADAPTER_FOLDER}` by itself, in PEFT's format: "
            f"`PeftModel.from_pretrained` adds it to the model that training started from."
        )
    if curve is not None:
        parts.append(f"![Loss and retrieval over the steps of training]({curve})")
    if figures:
        parts += measured_section(figures, config, facts)
    note = f"The snippets name the folder `{repo_id}` as it is seen from the folder that it lies in."
    stock = config.output_format == "transformers"
    parts.append(usage_part(model_config, repo_id, stock=stock, note="" if config.push_to_hub else note))
    return card_text(metadata, "\n\n".join(parts))
