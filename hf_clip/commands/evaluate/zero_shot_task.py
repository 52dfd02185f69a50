"""`hf-clip evaluate zero-shot`."""

import sys
from typing import Annotated, Any

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
    Models,
    Optimize,
    Output,
    Precision,
    Push,
    Split,
    Templates,
    Threads,
    TruncateDim,
    UpdateCard,
    read_truncate_dim,
    run_task,
)


def zero_shot(
    model: Models,
    dataset: DataSets,
    output: Output = "results",
    split: Split = None,
    class_names: ClassNames = None,
    templates: Templates = None,
    metric: Metric = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    truncate_dim: TruncateDim = None,
    batch_size: BatchSize = 32,
    bins: Annotated[int, typer.Option(help="Bins of the calibration error.")] = 15,
    mistakes: Annotated[int, typer.Option(help="Mistakes on the sheet of thumbnails.")] = 24,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no pictures.")] = False,
    feature_cache: Cache = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    optimize: Optimize = False,
    threads: Threads = None,
    update_card: UpdateCard = False,
    push: Push = False,
) -> None:
    """Classify images by their classes' names: top-1, top-5, mean per-class recall, mAP, calibration error.

    Examples:

        hf-clip evaluate zero-shot --model clip-vit-b32/ --dataset flowers/ --templates "a photo of a {}, a flower."

        hf-clip evaluate zero-shot --model clip-vit-b32/ clip-rn50/ --dataset CIFAR10 OxfordPets --output results/
    """
    from ...evaluation.paper_data_sets import open_named
    from ...evaluation.zero_shot import evaluate_zero_shot

    widths = read_truncate_dim(truncate_dim)
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        data, reported = open_named(name, split, class_names=class_names, **columns)
        return evaluate_zero_shot(
            loaded,
            processor,
            data,
            templates=templates or data.templates,
            metric=metric or reported,
            batch_size=batch_size,
            bins=bins,
            mistakes=0 if no_plots else mistakes,
            feature_cache=feature_cache,
            threads=threads,
            progress=sys.stderr.isatty(),
            truncate_dim=widths,
        )

    options = columns | {"class_names": class_names, "templates": templates, "metric": metric, "bins": bins}
    options |= {"truncate_dim": widths}
    run_task(
        "zero-shot",
        model,
        dataset,
        output,
        measure,
        options,
        split=split,
        dtype=dtype,
        device=device,
        optimize=optimize,
        update_card=update_card,
        push=push,
        plots=not no_plots,
    )
