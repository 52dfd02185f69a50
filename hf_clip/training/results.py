"""What a run leaves: a folder that loads as any other model, its card, its curve, and its publication.

The folder's files appear together; checkpoints and metrics.jsonl are there from the start.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor
from transformers import ProcessorMixin

from ..checkpoints.folders import DESCRIPTIONS
from ..checkpoints.remote_code import add_remote_code
from ..checkpoints.stock import stock_image_processor, why_not_stock, write_stock_files
from ..checkpoints.whole_folder import whole_folder
from ..hub.upload import check_repo_id, publish_folder
from ..model.modeling_hf_clip import HfClipModel
from .card import RunFacts, trained_card
from .config import TrainingConfig

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "training_config.json"
CURVE_FILE = "training-curve.png"
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


def save_results(
    model: HfClipModel,
    processor: ProcessorMixin,
    weights: dict[str, Tensor],
    config: TrainingConfig,
    figures: dict[str, float],
    facts: RunFacts,
) -> bool:
    """Write the trained model into the run's folder, which the caller holds, all files at once.

    The folder carries the code that loads it, as a repository does, so that it works wherever it is copied to.

    Args:
        weights: the model's, whole, on the CPU.
        figures: of these weights on the validation data, if there is any.
        facts: what the options alone do not tell of the run.

    Returns:
        Whether the curve could be drawn.
    """
    out = Path(config.output_dir)
    with whole_folder(out, instead_of=DESCRIPTIONS, is_held=True) as folder:
        model.save_pretrained(folder, state_dict=weights)
        if config.output_format == "transformers":
            write_stock_files(folder, model.config, processor.tokenizer, processor.image_processor)
        else:
            processor.save_pretrained(folder)
            add_remote_code(folder)
        has_curve = draw_curve(read_metrics(out), folder / CURVE_FILE)
        curve = CURVE_FILE if has_curve else None
        (folder / "README.md").write_text(trained_card(model.config, config, figures, facts, curve), encoding="utf-8")
    return has_curve


def publish_results(config: TrainingConfig, message: str) -> str:
    """Push the run's folder. Raises PublishingError; what is on this machine stays as it is."""
    assert config.hub_model_id is not None
    return publish_folder(config.output_dir, config.hub_model_id, message=message)


def name_repository(config: TrainingConfig) -> str:
    """The repository that a run publishes in: the one that was named, or one of the user's, named as the output folder.

    Raises:
        ValueError: the name is none that the Hub takes, or the user is not known.
    """
    if config.hub_model_id is not None:
        return check_repo_id(config.hub_model_id)
    name = Path(config.output_dir).resolve().name
    try:
        owner = HfApi().whoami()["name"]
    except Exception as error:  # no token, one that the Hub does not know, no network
        raise ValueError(
            f"--push_to_hub would publish {name} in your account, which could not be found out "
            f"({str(error).strip().splitlines()[0]}): log in with `hf auth login`, or name the repository with "
            f"--hub_model_id."
        ) from None
    return check_repo_id(f"{owner}/{name}")
