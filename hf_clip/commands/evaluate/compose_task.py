"""`hf-clip evaluate compose`."""

import sys
from typing import Annotated, Any

import typer

from ..program import Dtype
from .task_options import (
    BatchSize,
    DataSets,
    Device,
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


def compose(
    model: Models,
    dataset: DataSets,
    output: Output = "results",
    split: Split = None,
    image_column: ImageColumn = None,
    right_column: Annotated[str | None, typer.Option(help="Column of right captions.")] = None,
    wrong_column: Annotated[str | None, typer.Option(help="Column of wrong captions, one or several.")] = None,
    right_index: Annotated[
        int | None, typer.Option(help="Place of the right caption in a column caption_options, from 0.", min=0)
    ] = None,
    batch_size: BatchSize = 32,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    optimize: Optimize = False,
    threads: Threads = None,
    update_card: UpdateCard = False,
    push: Push = False,
) -> None:
    """Tell right captions from wrong ones with nearly the same words: text, image and group score.

    Reads the layouts of ARO and SugarCrepe (an image, a right and wrong captions) and of Winoground (two of each).

    Examples:

        hf-clip evaluate compose --model clip-vit-b32/ --dataset sugarcrepe.jsonl
    """
    from ...evaluation.composition import evaluate_composition

    options: dict[str, Any] = {
        "image_column": image_column,
        "right_column": right_column,
        "wrong_column": wrong_column,
        "right_index": right_index,
    }

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        return evaluate_composition(
            loaded,
            processor,
            name,
            split=split,
            **options,
            batch_size=batch_size,
            threads=threads,
            progress=sys.stderr.isatty(),
        )

    run_task(
        "compose",
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
    )
