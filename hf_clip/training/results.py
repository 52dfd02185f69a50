"""What a run leaves: a folder that loads as any other model, its card, its curve, and its publication.

The folder's files appear together; checkpoints and metrics.jsonl are there from the start.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import ProcessorMixin

from ..formats.folders import DESCRIPTIONS
from ..formats.stock import stock_image_processor, why_not_stock, write_stock_files
from ..model_card import architecture_table, card_metadata, card_text, markdown_table, name_of, usage_section
from ..modeling_hf_clip import HfClipModel
from ..publishing import publish_trained
from ..whole_folder import whole_folder
from .config import TrainingConfig
from .sources import parse_sources

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "training_config.json"
CURVE_FILE = "training-curve.png"

FILES = (".csv", ".json", ".jsonl", ".parquet", ".tar", ".txt")
RETRIEVAL = ("recall@1", "recall@5", "recall@10")


def check_output_format(model: HfClipModel, processor: ProcessorMixin, config: TrainingConfig) -> None:
    """Refuse before training what could not be written after it."""
    if config.output_format == "transformers":
        if reason := why_not_stock(model.config):
            raise ValueError(f"--output_format transformers cannot hold this model: {reason}.")
        stock_image_processor(processor.image_processor)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run. A line that the end of a program cut off is passed over."""
    path = folder / METRICS_FILE
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def draw_curve(records: list[dict[str, Any]], path: Path) -> bool:
    """Loss, and recall where it was evaluated, over the steps. False where matplotlib isn't installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    evaluated = [record for record in records if "recall@1" in record and "alpha" not in record]
    trained = [record for record in records if "loss" in record]
    figure, axes = pyplot.subplots(1, 2 if evaluated else 1, figsize=(9 if evaluated else 5, 3.2), squeeze=False)
    axes[0][0].plot([r["step"] for r in trained], [r["loss"] for r in trained], color="#1f5fa8")
    axes[0][0].set(title="Training loss", xlabel="step")
    if evaluated:
        for name in RETRIEVAL:
            points = [100 * record[name] for record in evaluated]
            axes[0][1].plot([record["step"] for record in evaluated], points, marker="o", markersize=3, label=name)
        axes[0][1].set(title="Retrieval on validation pairs, %", xlabel="step")
        axes[0][1].legend(frameon=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _results(figures: dict[str, float], config: TrainingConfig) -> list[EvalResult]:
    """Figures of the validation data for the model-index."""
    sources = [shown(source.path) for source in parse_sources(config.dataset)]
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=sources[0],
            dataset_name=" and ".join(sources),
            dataset_split=f"validation ({config.validation})",
            metric_type=metric.replace("@", "_at_"),
            metric_name=metric.replace("_", " "),
            metric_value=round(value, 4),
        )
        for metric, value in figures.items()
    ]


def is_repository(name: str | None) -> bool:
    """Whether this may be said on the Hub to be a repository: a local folder's name means nothing there."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return Path(name).suffix not in FILES


def shown(name: str) -> str:
    """A model's or a data set's name as it may be published: of a folder on this machine its last part."""
    repository, _, configuration = name.partition(":")
    if configuration and is_repository(repository):
        return name
    return name if is_repository(name) else Path(name).name


def write_card(
    model: HfClipModel,
    config: TrainingConfig,
    figures: dict[str, float],
    folder: Path,
    *,
    steps: int,
    global_batch: int,
    alpha: float | None,
) -> None:
    """The card of a trained model: what it comes from, how it was trained, what was measured."""
    repo_id = config.push_to_hub or Path(config.output_dir).resolve().name
    base = config.model if is_repository(config.model) else None
    names = [source.path.partition(":")[0] for source in parse_sources(config.dataset)]  # user/name:config
    data = [name for name in names if is_repository(name)]
    metadata = card_metadata(
        repo_id, tags=["generated_from_trainer"], base_model=base, datasets=data, results=_results(figures, config)
    )
    chosen = {
        "steps": steps,
        "pairs in a batch": global_batch,
        "learning rate": config.learning_rate,
        "optimizer": config.optimizer,
        "weight decay": config.weight_decay,
        "schedule": config.scheduler,
        "loss": model.config.contrastive_loss,
        "locked": config.lock,
        "LoRA rank": config.lora_rank,
        "augmentation": config.augmentation,
        "moving average": config.ema_decay,
        "averaged with the pretrained weights, α": alpha,
        "seed": config.seed,
    }
    sources = [shown(source.path) for source in parse_sources(config.dataset)]
    origin = f"fine-tuned from `{shown(config.model)}`" if config.model else "trained from scratch"
    parts = [
        f"# {name_of(repo_id)}",
        f"A CLIP model {origin} on {', '.join(f'`{source}`' for source in sources)}.",
        architecture_table(model.config),
        "## How it was trained",
        markdown_table(["", ""], [[name, str(value)] for name, value in chosen.items() if value is not None]),
    ]
    if (folder / CURVE_FILE).is_file():
        parts.append(f"![Loss and retrieval over the steps of training]({CURVE_FILE})")
    if figures:
        parts += [
            "## What was measured",
            f"On the validation pairs ({config.validation}), with the weights that are here. Pairs that share a "
            f"picture or a caption are right answers to each other.",
            markdown_table(["", "%"], [[name.replace("_", " "), f"{100 * v:.1f}"] for name, v in figures.items()]),
        ]
    usage = usage_section(model.config, repo_id, stock=config.output_format == "transformers")
    parts += ["## How to use it", usage]
    text = card_text(metadata, "\n\n".join(parts))
    (folder / "README.md").write_text(text, encoding="utf-8")


def save_results(
    model: HfClipModel,
    processor: ProcessorMixin,
    weights: dict[str, Tensor],
    config: TrainingConfig,
    figures: dict[str, float],
    *,
    steps: int,
    global_batch: int,
    alpha: float | None = None,
) -> bool:
    """Write the trained model into the run's folder, all files at once. Returns whether its curve could be drawn.

    weights: the model's, whole, on the CPU.   figures: of these weights on the validation data, if there is any
    steps:   after which these weights were.   alpha: with which they were averaged with the pretrained ones
    """
    out = Path(config.output_dir)
    with whole_folder(out, instead_of=DESCRIPTIONS) as folder:
        model.save_pretrained(folder, state_dict=weights)
        if config.output_format == "transformers":
            write_stock_files(folder, model.config, processor.tokenizer, processor.image_processor)
        else:
            processor.save_pretrained(folder)
        has_curve = draw_curve(read_metrics(out), folder / CURVE_FILE)
        write_card(model, config, figures, folder, steps=steps, global_batch=global_batch, alpha=alpha)
    return has_curve


def publish_results(config: TrainingConfig, message: str) -> str:
    """Push the run's folder. Raises PublishingError; what is on this machine stays as it is."""
    assert config.push_to_hub is not None
    return publish_trained(config.output_dir, config.push_to_hub, message)
