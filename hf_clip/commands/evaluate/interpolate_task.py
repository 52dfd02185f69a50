"""`hf-clip evaluate interpolate`."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..program import Dtype
from .task_options import (
    BatchSize,
    Cache,
    ClassNames,
    DataSets,
    Device,
    ImageColumn,
    LabelColumn,
    Metric,
    Output,
    Precision,
    Split,
    Templates,
    Threads,
    check_task,
    expanded,
    say,
)

if TYPE_CHECKING:
    from ...evaluation.interpolation import InterpolationResult


def _shown(alpha: float) -> str:
    """Write α with two digits, so that names are in its order; with more if it has more."""
    from ...checkpoints.wise_ft import show_alpha

    return f"{alpha:.2f}" if round(alpha, 2) == alpha else show_alpha(alpha)


def _check_best(place: str, output: str, feature_cache: str | None) -> None:
    """Refuse a folder for the best model that is in the way of something, or cannot be written."""
    from pathlib import Path

    from ...checkpoints.whole_folder import check_writable

    folder = Path(place)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{place} exists and is not empty; name a new folder for --save-best.")
    for option, other in {"--output": output, "--feature-cache": feature_cache}.items():
        if other is not None and Path(other).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"--save-best is {place} and {option} is {other}, but the model needs a folder that nothing else is "
                f"written to: name another for --save-best."
            )
    check_writable(folder)


def _open_each(names: list[str], split: str | None, **how: Any) -> dict[str, Any]:
    """Open data sets, each once. Those that cannot be opened are said and left out."""
    from ...evaluation.paper_data_sets import open_named
    from ...model.checked_files import one_line

    opened: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = open_named(name, split, **how)
        except (OSError, ValueError, ImportError) as error:
            say(f"error: {name}: {one_line(error)}")
    return opened


def _report(found: "InterpolationResult", pretrained: str, finetuned: str, plot_into: str | None) -> None:
    """Print the figures of each α and the best one, and plot them unless there is no folder for it."""
    from pathlib import Path

    from ...checkpoints.wise_ft import show_alpha
    from ...evaluation.processes import current
    from ...evaluation.reports import text_table

    print(text_table(*found.rows()))
    print(f"\nbest mean: {100 * max(found.mean):.1f} % at alpha {show_alpha(found.best)}")
    if plot_into is not None and current().is_main and len(found.alphas) > 1:  # of one value there is no curve
        from ...evaluation.plots import plot_interpolation

        before, after = Path(pretrained).name, Path(finetuned).name
        path = Path(plot_into) / f"interpolation--{before}--{after}.png"
        plot_interpolation(found, f"{before} to {after}", path)
        say(f"picture: {path}")


def interpolate(
    pretrained: Annotated[str, typer.Argument(help="The model before fine-tuning, α = 0.", metavar="A")],
    finetuned: Annotated[str, typer.Argument(help="The model after it, α = 1.", metavar="B")],
    dataset: DataSets,
    alphas: Annotated[
        str, typer.Option(help="Values of α: from, to and step; or a list with commas.", metavar="0:1:0.1|0.3,0.5")
    ] = "0:1:0.1",
    output: Output = "results",
    save_best: Annotated[
        str | None,
        typer.Option(
            "--save-best",
            help="New folder for the model of the α with the highest mean.",
            metavar="FOLDER",
            callback=expanded,
        ),
    ] = None,
    split: Split = None,
    class_names: ClassNames = None,
    templates: Templates = None,
    metric: Metric = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no picture.")] = False,
    feature_cache: Cache = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Average a pretrained and a fine-tuned model (WiSE-FT), and measure each average on all data sets.

    Examples:

        hf-clip evaluate interpolate clip-vit-b32/ my-finetune/ --alphas 0:1:0.1 --dataset flowers/ CIFAR10
    """
    from ...checkpoints.wise_ft import parse_alphas
    from ...evaluation.grid import WRITTEN_BESIDE, run_grid, state_of
    from ...evaluation.interpolation import InterpolationResult, load_interpolation
    from ...evaluation.processes import current
    from ...evaluation.zero_shot import evaluate_zero_shot

    points = {f"{pretrained} to {finetuned}, alpha {_shown(alpha)}": alpha for alpha in parse_alphas(alphas)}
    check_task("interpolate", [], output, metric=metric, update_card=False, push=False)
    if save_best is not None:
        _check_best(save_best, output, feature_cache)
    models, processor = load_interpolation(pretrained, finetuned, dtype.value, device)
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    opened = _open_each(dataset, split, class_names=class_names, **columns)

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        data, reported = opened[name]
        return evaluate_zero_shot(
            loaded,
            processor,
            data,
            templates=templates or data.templates,
            metric=metric or reported,
            batch_size=batch_size,
            feature_cache=feature_cache,
            threads=threads,
            progress=sys.stderr.isatty(),
        )

    options = {"class_names": class_names, "templates": templates, "metric": metric} | columns
    options |= {"ends": " ".join(state_of(name, WRITTEN_BESIDE) for name in (pretrained, finetuned))}
    outcome = run_grid(
        "interpolate",
        list(points),
        list(opened),
        output,
        measure,
        options=options,
        split=split,
        dtype=dtype.value,
        plots=False,
        say=say,
        load=lambda name: (models.at(points[name]), processor),
    )
    found = InterpolationResult.of_records(outcome.records, points)
    if found is not None:
        _report(found, pretrained, finetuned, None if no_plots else output)
        if save_best is not None and current().is_main:
            models.save(found.best, processor, save_best)
            print(f"model: {save_best}")
    if outcome.failures or len(opened) < len({*dataset}):
        raise typer.Exit(2 if found is not None else 1)
