"""What the tasks of `hf-clip evaluate` have in common: options, and the grid of models and data sets that they run."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..program import Dtype


def say(line: str) -> None:
    """Print what is no result."""
    print(line, file=sys.stderr)


def expanded(path: str | None) -> str | None:
    """Return a path with the user's folder in place of `~`, which the shell leaves in `--output=~/results`."""
    return None if path is None else os.path.expanduser(path)


def _cache_folder(path: str | None) -> str | None:
    path = expanded(path)
    if path:
        try:
            check_folder(path)
        except OSError as error:
            raise typer.BadParameter(str(error)) from None
    return path


def _device(device: str | None) -> str | None:
    """Check a device before anything is loaded."""
    if device:
        from ...evaluation.device import check_computes

        try:
            check_computes(device)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return device


def check_folder(path: str) -> None:
    """Raise FileExistsError or PermissionError if nothing can be written into a folder, which need not be there."""
    from pathlib import Path

    from ...checkpoints.whole_folder import check_writable

    if Path(path).exists() and not Path(path).is_dir():
        raise FileExistsError(f"{path} is a file, but a folder to write to is needed: name another.")
    check_writable(Path(path))


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
    str,
    typer.Option(
        "--output",
        help="Folder of the results. What is there is not measured again.",
        metavar="FOLDER",
        callback=expanded,
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of the data. Default: test, validation, or the only one.")]
ClassNames = Annotated[
    str | None, typer.Option(help="Names of the classes: a text with one a line, or JSON.", metavar="FILE")
]
Templates = Annotated[
    str | None,
    typer.Option(help="A template with {}, a file of them, a set's name, or prompts by class (JSON, as CuPL's)."),
]
Metric = Annotated[str | None, typer.Option(help="Metric that the table shows. Default: the paper's.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of labels, if not the only one.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of images, if not the only one that can be it.")]
BatchSize = Annotated[int, typer.Option(help="Images encoded at once; halved if a GPU runs out of memory.", min=1)]
Cache = Annotated[
    str | None,
    typer.Option(
        "--feature-cache", help="Folder in which image features are kept.", metavar="FOLDER", callback=_cache_folder
    ),
]
Precision = Annotated[Dtype, typer.Option("--dtype", help="What the model computes in.")]
Optimize = Annotated[
    bool,
    typer.Option("--optimize", help="Optimize our models for this processor first. Features differ by up to 1e-5."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.", callback=_device)]
UpdateCard = Annotated[
    bool, typer.Option("--update-card", help="Put the results into the model-index of a local model's README.md.")
]
Push = Annotated[
    bool, typer.Option("--push", help="Put the results into the model-index of the models' repositories on the Hub.")
]
TruncateDim = Annotated[
    list[str] | None,
    typer.Option(
        "--truncate-dim",
        help="Compare a feature's first N numbers; several widths are measured side by side. Default: all.",
        metavar="N [N ...]",
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads that open images. Default: the number of processors.", min=1)
]


def read_truncate_dim(given: list[str] | None) -> list[int] | None:
    """Read `--truncate-dim 512 64`, or `512,64`. Raises ValueError for what is no width."""
    words = [word for text in given or [] for word in text.replace(",", " ").split()]
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise ValueError(f"--truncate-dim has {word!r:.40}, but widths are needed, such as 512 256 64.")
    return list(map(int, words)) or None


def check_task(
    task: str,
    models: list[str],
    output: str,
    *,
    metric: str | None,
    update_card: bool,
    push: bool,
) -> None:
    """Refuse, before anything is encoded, what could not be written or reported afterwards."""
    from pathlib import Path

    from ...checkpoints.whole_folder import held_folder
    from ...evaluation.linear_probe import PREFIX
    from ...evaluation.processes import current
    from ...evaluation.reports import check_card, check_repository
    from ...evaluation.zero_shot import METRICS
    from ...extras import require

    require(f"hf-clip evaluate {task}", "eval")
    if metric is not None and metric.removeprefix(PREFIX) not in METRICS:
        raise ValueError(f"--metric is {metric!r}, but there is no such metric: name one of {', '.join(METRICS)}.")
    for name in models:
        if push:
            check_repository(name)
        if update_card:
            check_card(name)
    check_folder(output)
    if current().is_main:
        with held_folder(Path(output).resolve()):  # nobody else writes there now
            pass


def lines_of_unreadable(records: Sequence[dict[str, Any]]) -> list[str]:
    """What is said of images that were left out of measurements, once for each data set."""
    counts = {record["dataset"]: record["unreadable"] for record in records if record["unreadable"]}
    return [f"{name}: {count:,} images could not be opened and are left out" for name, count in counts.items()]


def run_task(
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
    optimize: bool = False,
    push: bool = False,
    plots: bool = False,
    needs_model: bool = True,
    resume: bool = True,
) -> None:
    """Measure all pairs of a model and a data set, print a table, and end with 1 or 2 if some failed."""
    from pathlib import Path

    from ...evaluation.grid import run_grid
    from ...evaluation.processes import current
    from ...evaluation.reports import push_card, table_rows, text_table
    from ...evaluation.reports import update_card as write_card

    output = os.path.expanduser(output)
    with current().together(task):
        check_task(task, models, output, metric=options.get("metric"), update_card=update_card, push=push)
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
            optimize=optimize,
            plots=plots,
            resume=resume,
            say=say,
            needs_model=needs_model,
        )
    for line in lines_of_unreadable(outcome.records):
        say(line)
    if outcome.records:
        print(text_table(*table_rows(outcome.records)))
        print(f"\n{Path(output) / 'results.json'}")
    with current().together("cards"):
        for name in dict.fromkeys(record["pretrained"] for record in outcome.records if current().is_main):
            own = [record for record in outcome.records if record["pretrained"] == name]
            if update_card:
                print(write_card(name, own))
            if push:
                print(push_card(name, own))
    if outcome.failures:
        raise typer.Exit(2 if outcome.records else 1)
