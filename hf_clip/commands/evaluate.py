"""`hf-clip evaluate TASK`: models measured on data sets, the way the papers do it."""

import sys
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import typer

from .app import in_one_line

SEVERAL = ("--model", "--dataset")
"""Options that take several values: `--model A B`."""

evaluate = typer.Typer(
    name="evaluate",
    help="""Measure models on data sets, the way the papers do it. Each result is named by its protocol.

    Examples:

        hf-clip evaluate zero-shot --model clip-vit-b32/ --dataset flowers/ --templates "a photo of a {}, a flower."

        hf-clip evaluate retrieval --model clip-vit-b32/ clip-rn50/ --dataset clip-benchmark/wds_flickr30k
    """,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Models = Annotated[
    list[str],
    typer.Option("--model", help="Folders or repositories: ours, or stock CLIP or SigLIP.", metavar="M [M ...]"),
]
DataSets = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        help="What the trainer opens; a folder of class folders; clip-benchmark/wds_*; a name of `evaluate list`.",
        metavar="D [D ...]",
    ),
]
Output = Annotated[
    str, typer.Option("--output", help="Folder of the results. What is there is not measured again.", metavar="FOLDER")
]
Split = Annotated[str | None, typer.Option(help="Split of the data. Default: test, validation, or the only one.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of images, if not the only one that can be it.")]
BatchSize = Annotated[int, typer.Option(help="Images encoded at once; halved if a GPU runs out of memory.")]
Cache = Annotated[
    str | None, typer.Option("--feature-cache", help="Folder in which image features are kept.", metavar="FOLDER")
]
Precision = Annotated[Dtype, typer.Option("--dtype", help="What the model computes in.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")]
UpdateCard = Annotated[
    bool, typer.Option("--update-card", help="Put the results into the model-index of a local model's README.md.")
]
Threads = Annotated[int | None, typer.Option(help="Threads that open images. Default: the number of processors.")]


def _resolved(dataset: str, split: str | None) -> tuple[str, str | None, Any]:
    """Return what a data set's name stands for, the split, and the entry of the paper's table if there is one."""
    from pathlib import Path

    from ..evaluation.paper_data_sets import find_paper_data_set

    found = find_paper_data_set(dataset)
    if found is None or Path(dataset).expanduser().exists() or "/" in dataset:
        return dataset, split, found
    if found.repository is None:
        raise ValueError(
            f"{dataset} is one of the paper's data sets, but the Hub has no copy that is read as it is: name your own "
            f"folder or files."
        )
    return found.repository, split or found.split, found


def _run(
    task: str,
    models: list[str],
    datasets: list[str],
    output: str,
    measure: Callable[..., Any],
    options: dict[str, Any],
    *,
    split: str | None,
    dtype: Dtype,
    device: str | None,
    update_card: bool,
    plots: bool = False,
) -> None:
    """Measure all pairs of a model and a data set, print a table, and end with 1 or 2 if some failed."""
    from pathlib import Path

    from ..evaluation.grid import run_grid
    from ..evaluation.reports import table_rows, text_table
    from ..evaluation.reports import update_card as write_card
    from ..extras import require

    require(f"hf-clip evaluate {task}", "eval")
    outcome = run_grid(
        task,
        models,
        datasets,
        output,
        measure,
        options=options,
        split=split,
        dtype=dtype.value,
        device=device,
        plots=plots,
        say=lambda line: print(line, file=sys.stderr),
    )
    if outcome.records:
        print(text_table(*table_rows(outcome.records)))
        print(f"\n{Path(output) / 'results.json'}")
    if update_card:
        for name in dict.fromkeys(record["pretrained"] for record in outcome.records):
            card = write_card(name, [record for record in outcome.records if record["pretrained"] == name])
            print(card)
    if outcome.failures:
        raise typer.Exit(2 if outcome.records else 1)


@evaluate.command("zero-shot")
@in_one_line
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
    threads: Threads = None,
    update_card: UpdateCard = False,
) -> None:
    """Classify images by their classes' names: top-1, top-5, mean per-class recall, mAP, calibration error.

    Examples:

        hf-clip evaluate zero-shot --model clip-vit-b32/ --dataset flowers/ --templates "a photo of a {}, a flower."

        hf-clip evaluate zero-shot --model clip-vit-b32/ clip-rn50/ --dataset CIFAR10 OxfordPets --output results/
    """
    from ..evaluation.labelled_images import open_labelled
    from ..evaluation.zero_shot import evaluate_zero_shot

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        source, chosen, known = _resolved(name, split)
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
    _run(
        "zero-shot",
        model,
        dataset,
        output,
        measure,
        options,
        split=split,
        dtype=dtype,
        device=device,
        update_card=update_card,
        plots=not no_plots,
    )


@evaluate.command()
@in_one_line
def retrieval(
    model: Models,
    dataset: DataSets,
    output: Output = "results",
    split: Split = None,
    image_column: ImageColumn = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of captions, or a template over the columns.")
    ] = None,
    hub_correction: Annotated[
        float | None, typer.Option(help="Factor of the correction of hubs (arXiv:2410.24114), e.g. 0.75.")
    ] = None,
    hub_references: Annotated[
        str | None, typer.Option(help="Split of the same data whose captions and images are the reference queries.")
    ] = None,
    hub_k: Annotated[int, typer.Option(help="Similarities that the correction averages.")] = 128,
    batch_size: BatchSize = 32,
    feature_cache: Cache = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    threads: Threads = None,
    update_card: UpdateCard = False,
) -> None:
    """Search images by captions and captions by images: recall at 1, 5 and 10, and the median rank, both ways.

    Equal similarities count against the model.

    Examples:

        hf-clip evaluate retrieval --model clip-vit-b32/ --dataset clip-benchmark/wds_flickr30k
    """
    from ..evaluation.captioned_images import open_captioned
    from ..evaluation.retrieval import evaluate_retrieval

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        columns: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column}
        references = None if hub_references is None else open_captioned(name, hub_references, **columns)
        return evaluate_retrieval(
            loaded,
            processor,
            name,
            split=split,
            **columns,
            hub_correction=hub_correction,
            references=references,
            hub_k=hub_k,
            batch_size=batch_size,
            feature_cache=feature_cache,
            threads=threads,
            progress=sys.stderr.isatty(),
        )

    options: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column}
    options |= {"hub_correction": hub_correction, "hub_references": hub_references, "hub_k": hub_k}
    _run(
        "retrieval",
        model,
        dataset,
        output,
        measure,
        options,
        split=split,
        dtype=dtype,
        device=device,
        update_card=update_card,
    )


@evaluate.command()
@in_one_line
def compose(
    model: Models,
    dataset: DataSets,
    output: Output = "results",
    split: Split = None,
    image_column: ImageColumn = None,
    right_column: Annotated[str | None, typer.Option(help="Column of right captions.")] = None,
    wrong_column: Annotated[str | None, typer.Option(help="Column of wrong captions, one or several.")] = None,
    batch_size: BatchSize = 32,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    threads: Threads = None,
    update_card: UpdateCard = False,
) -> None:
    """Tell right captions from wrong ones with nearly the same words: text, image and group score.

    Reads the layouts of ARO and SugarCrepe (an image, a right and wrong captions) and of Winoground (two of each).

    Examples:

        hf-clip evaluate compose --model clip-vit-b32/ --dataset sugarcrepe.jsonl
    """
    from ..evaluation.composition import evaluate_composition

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        return evaluate_composition(
            loaded,
            processor,
            name,
            split=split,
            image_column=image_column,
            right_column=right_column,
            wrong_column=wrong_column,
            batch_size=batch_size,
            threads=threads,
            progress=sys.stderr.isatty(),
        )

    options = {"image_column": image_column, "right_column": right_column, "wrong_column": wrong_column}
    _run(
        "compose",
        model,
        dataset,
        output,
        measure,
        options,
        split=split,
        dtype=dtype,
        device=device,
        update_card=update_card,
    )


@evaluate.command("list")
@in_one_line
def list_data_sets(
    architecture: Annotated[
        str, typer.Option("--architecture", help="Model whose published figures are shown.", metavar="NAME")
    ] = "ViT-B/32",
) -> None:
    """List the 27 data sets of the paper: name, metric, copy on the Hub, published figures."""
    from ..evaluation.paper_data_sets import SOURCE, paper_data_sets
    from ..evaluation.reports import text_table
    from ..model.variants import VARIANTS

    if architecture not in VARIANTS:
        raise ValueError(f"{architecture!r} is no model of the paper's; those are {', '.join(VARIANTS)}.")
    header = ["name", "metric", "zero-shot", "linear probe", "on the Hub"]
    rows = []
    for entry in paper_data_sets():
        figures = [entry.zero_shot.get(architecture), entry.linear_probe.get(architecture)]
        shown = ["" if figure is None else f"{figure:.1f}" for figure in figures]
        rows.append([entry.name, entry.metric, *shown, entry.repository or ""])
    print(text_table(header, rows))
    print(f"\n{architecture}, per cent. {SOURCE}.")
