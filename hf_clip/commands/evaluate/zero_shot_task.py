"""`hf-clip evaluate zero-shot`."""

import sys
from typing import Annotated, Any

import typer

from .task_options import (
    BatchSize,
    Cache,
    DataSets,
    Device,
    Dtype,
    ImageColumn,
    Models,
    Optimize,
    Output,
    Precision,
    Push,
    Split,
    Threads,
    UpdateCard,
    run_task,
)


def zero_shot(
    model: Models,
    dataset: DataSets,
    output: Output = "results",
    split: Split = None,
    class_names: Annotated[
        str | None, typer.Option(help="Names of the classes: a text with one a line, or JSON.", metavar="FILE")
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(help="A template with {}, a file of them, a set's name, or prompts by class (JSON, as CuPL's)."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Metric that the table shows. Default: the paper's.")] = None,
    image_column: ImageColumn = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels, if not the only one.")] = None,
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
    from ...evaluation.labelled_images import open_labelled
    from ...evaluation.paper_data_sets import resolve_data_set
    from ...evaluation.zero_shot import evaluate_zero_shot

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        source, chosen, known = resolve_data_set(name, split)
        columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
        data = open_labelled(source, chosen, class_names=class_names, **columns)
        return evaluate_zero_shot(
            loaded,
            processor,
            data,
            templates=templates or data.templates or (known.templates if known else None),
            metric=metric or (known.metric if known else None),
            batch_size=batch_size,
            bins=bins,
            mistakes=0 if no_plots else mistakes,
            feature_cache=feature_cache,
            threads=threads,
            progress=sys.stderr.isatty(),
        )

    options = {"class_names": class_names, "templates": templates, "metric": metric, "bins": bins}
    options |= {"image_column": image_column, "label_column": label_column}
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
