"""What a run leaves: a folder that loads as any other model, with its card and the plot of its run.

These files appear together; checkpoints and metrics.jsonl are there from the start.
"""

import sys
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from ..checkpoints.folders import DESCRIPTIONS
from ..checkpoints.remote_code import add_remote_code
from ..checkpoints.stock import stock_image_processor, why_not_stock, write_stock_files
from ..checkpoints.whole_folder import whole_folder
from ..extras import missing_packages
from ..model.configuration_hf_clip import HfClipConfig
from .card import RunFacts, shown, trained_card
from .chosen_metric import read_figure
from .config import TrainingConfig
from .guarding import GuardProtocol, shown_guard_metric
from .lora import ADAPTER_FOLDER
from .outcome import Outcome
from .plan import Plan
from .records import Records, read_metrics

CURVE_FILE = "training-curve.png"
RETRIEVAL = {"recall@10": (8.0, "#a8c8ec"), "recall@5": (4.0, "#4f8fd0"), "recall@1": (1.3, "#12355b")}
"""Curve → width and colour. The wide ones are drawn first, so curves that lie on each other are all seen."""


def check_output_format(config: TrainingConfig, model_config: HfClipConfig, image_processor: Any) -> None:
    """Refuse a layout that cannot hold a model.

    Args:
        config: the options.
        model_config: of the model as it will be trained.
        image_processor: the model's.

    Raises:
        ValueError: transformers' own layout is asked for, and cannot hold it.
    """
    if config.output_format == "transformers":
        if reason := why_not_stock(model_config):
            raise ValueError(f"--output_format transformers cannot hold this model: {reason}.")
        stock_image_processor(image_processor)


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, and recall and the guard set's figure if they were evaluated, over the steps.

    Args:
        records: as `read_metrics` returns them.
        path: of the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    evaluated = [record for record in records if "recall@1" in record and "alpha" not in record]
    trained = [record for record in records if "loss" in record]
    figure, axes = pyplot.subplots(1, 2 if evaluated else 1, figsize=(9 if evaluated else 5, 3.2), squeeze=False)
    marker = "o" if len(trained) == 1 else None  # one point makes no line
    axes[0][0].plot([r["step"] for r in trained], [r["loss"] for r in trained], color="#1f5fa8", marker=marker)
    axes[0][0].set(title="Training loss", xlabel="step")
    if evaluated:
        for name, (width, colour) in RETRIEVAL.items():
            points = [100 * record[name] for record in evaluated]
            steps = [record["step"] for record in evaluated]
            axes[0][1].plot(steps, points, color=colour, linewidth=width, marker="o", markersize=width + 2, label=name)
        figures = [read_figure(name) for name in evaluated[0]]
        others = [figure.name for figure in figures if figure is not None and figure.metric == "recall@1"][1:]
        for place, name in enumerate(others):  # of other widths and sets
            colour = pyplot.get_cmap("viridis")(0.35 + 0.6 * place / len(others))
            points = [100 * record[name] for record in evaluated]
            axes[0][1].plot([r["step"] for r in evaluated], points, ":", color=colour, marker=".", label=name)
        guard = shown_guard_metric(evaluated[0])
        if guard is not None:
            points = [100 * record[guard] for record in evaluated]
            axes[0][1].plot(steps, points, "--", color="#c25a00", marker="s", markersize=4, label=guard)
        title = "Retrieval on validation pairs, %" if guard is None else "Validation pairs and guard set, %"
        axes[0][1].set(title=title, xlabel="step")
        if others:  # too many for a place among the curves
            figure.set_figwidth(11)
            axes[0][1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.02))
        else:
            axes[0][1].legend(frameon=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save_results(
    plan: Plan,
    processor: ProcessorMixin,
    outcome: Outcome,
    start_figures: dict[str, float],
    records: Records,
    guard: GuardProtocol | None = None,
) -> None:
    """Write the trained model into the run's folder, all files at once. The main process alone calls this.

    The folder carries the code that loads it, as a repository does, so that it works wherever it is copied to.

    Args:
        plan: of the run, whose folder the caller holds.
        processor: of the model.
        outcome: the weights, with what is known of them.
        start_figures: of the model that training started from; empty where it was not evaluated.
        records: of the run.
        guard: how the guard set was measured, if there is one.
    """
    config = plan.config
    out, model = Path(config.output_dir), outcome.model
    facts = RunFacts(
        step=outcome.step,
        total_steps=plan.total_steps,
        global_batch=plan.global_batch,
        launched=plan.launched,
        alpha=outcome.alpha,
        start_figures=start_figures,
        part_cut=records.last_part_cut(),
        guard=guard,
    )
    with whole_folder(out, instead_of=(*DESCRIPTIONS, ADAPTER_FOLDER), is_held=True) as folder:
        model.save_pretrained(folder)
        if config.output_format == "transformers":
            write_stock_files(folder, model.config, processor.tokenizer, processor.image_processor)
        else:
            processor.save_pretrained(folder)
            add_remote_code(folder)
        if outcome.adapter is not None:
            base, part = shown(str(config.model)), 1.0 if outcome.alpha is None else outcome.alpha
            outcome.adapter.save(folder / ADAPTER_FOLDER, model, base=base, part=part)
        if missing := missing_packages("The plot on the card", "train", ["matplotlib"]):
            print(f"note: {missing}", file=sys.stderr)
        else:
            draw_curve(read_metrics(out), folder / CURVE_FILE)
        card = trained_card(model.config, config, outcome.figures, facts, None if missing else CURVE_FILE)
        (folder / "README.md").write_text(card, encoding="utf-8")
