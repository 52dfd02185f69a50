"""`hf-clip evaluate retrieval`."""

import sys
from typing import Annotated, Any

import typer

from ..program import Dtype
from .task_options import (
    BatchSize,
    Cache,
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
    TruncateDim,
    UpdateCard,
    read_truncate_dim,
    run_task,
)


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
    truncate_dim: TruncateDim = None,
    batch_size: BatchSize = 32,
    feature_cache: Cache = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    optimize: Optimize = False,
    threads: Threads = None,
    update_card: UpdateCard = False,
    push: Push = False,
) -> None:
    """Search images by captions and captions by images: recall at 1, 5 and 10, and the median rank, both ways.

    Equal similarities count against the model.

    Examples:

        hf-clip evaluate retrieval --model clip-vit-b32/ --dataset clip-benchmark/wds_flickr30k
    """
    from ...evaluation.captioned_images import open_captioned
    from ...evaluation.retrieval import evaluate_retrieval

    columns: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column}
    options: dict[str, Any] = {"hub_correction": hub_correction, "hub_k": hub_k}
    options |= {"truncate_dim": read_truncate_dim(truncate_dim)}

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        return evaluate_retrieval(
            loaded,
            processor,
            name,
            split=split,
            references=None if hub_references is None else open_captioned(name, hub_references, **columns),
            **columns,
            **options,
            batch_size=batch_size,
            feature_cache=feature_cache,
            threads=threads,
            progress=sys.stderr.isatty(),
        )

    run_task(
        "retrieval",
        model,
        dataset,
        output,
        measure,
        columns | options | {"hub_references": hub_references},
        split=split,
        dtype=dtype,
        device=device,
        optimize=optimize,
        update_card=update_card,
        push=push,
        plots=True,
    )
