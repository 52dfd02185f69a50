"""`hf-clip evaluate head`."""

import sys
from pathlib import Path
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
    Models,
    Precision,
    Push,
    Split,
    Threads,
    UpdateCard,
    expanded,
    run_task,
    say,
)


def _place_of_head(model: str, output: str, name: str, overwrite: bool) -> tuple[str, Path]:
    """Return what a head's file calls its model, and the file: beside a local model, else below the results.

    Raises FileExistsError for a head that is not to be replaced, and PermissionError where nothing can be written.
    """
    from ...checkpoints.whole_folder import check_writable
    from ...zero_shot.embedding_head import path_of_head

    folder = Path(model)
    is_local = folder.is_dir()
    file = path_of_head(folder if is_local else Path(output) / str(folder).replace("/", "--"), name)
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; name another head, or pass --overwrite to replace it.")
    check_writable(file.parent)
    # The file may be published, and then says nothing of this machine's folders.
    return folder.resolve().name if is_local else str(folder), file


def head(
    model: Models,
    dataset: DataSets,
    name: Annotated[str, typer.Option("--name", help="Name of the head: MODEL/heads/NAME.safetensors.")],
    score_column: Annotated[
        str | None, typer.Option(help="Column of scores, such as the aesthetic quality. Without it: labels.")
    ] = None,
    label_column: LabelColumn = None,
    hidden: Annotated[
        int | None, typer.Option(help="Width of a hidden layer. Default: none, the head is linear.", min=1)
    ] = None,
    output: Annotated[
        str, typer.Option("--output", help="Folder of the results.", metavar="FOLDER", callback=expanded)
    ] = "results",
    train_split: Annotated[str, typer.Option("--train-split", help="Split to train on.")] = "train",
    split: Split = None,
    class_names: ClassNames = None,
    image_column: ImageColumn = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a head of that name.")] = False,
    batch_size: BatchSize = 32,
    feature_cache: Cache = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    threads: Threads = None,
    update_card: UpdateCard = False,
    push: Push = False,
) -> None:
    """Train a head on a model's frozen image embeddings, out of scores or labels, and measure it on held-out images.

    The head of a local model is written to MODEL/heads/NAME.safetensors, and that of another one below the results.
    `hf-clip classify --head NAME` uses it. Data with one split are divided: a fifth is held out at random.

    Examples:

        hf-clip evaluate head --model clip-vit-l14/ --dataset photos.csv --score-column aesthetic --name aesthetic

        hf-clip evaluate head --model clip-vit-b32/ --dataset flowers/ --hidden 512 --name flowers
    """
    from ...evaluation.head_fits import check_options
    from ...evaluation.head_training import evaluate_head
    from ...evaluation.processes import current
    from ...zero_shot.embedding_head import check_head_name

    check_head_name(name)
    check_options(hidden, seed)
    if len(dataset) > 1:
        raise ValueError(f"{len(dataset)} data sets are given, but a head is trained on one: name one, or two heads.")
    options: dict[str, Any] = {
        "score_column": score_column,
        "label_column": label_column,
        "hidden": hidden,
        "train_split": train_split,
        "class_names": class_names,
        "image_column": image_column,
        "seed": seed,
    }

    def measure(loaded: Any, processor: Any, source: str) -> Any:
        model_name, file = _place_of_head(loaded.name_or_path, output, name, overwrite)
        result = evaluate_head(
            loaded,
            processor,
            source,
            split=split,
            **options,
            batch_size=batch_size,
            feature_cache=feature_cache,
            threads=threads,
            progress=sys.stderr.isatty(),
        )
        result.head.model = model_name
        if current().is_main:
            result.head.save(file)
        say(f"head: {file}")
        return result

    run_task(
        "label-head" if score_column is None else "score-head",
        model,
        dataset,
        output,
        measure,
        options | {"name": name},
        split=split,
        dtype=dtype,
        device=device,
        update_card=update_card,
        push=push,
        resume=False,
    )
