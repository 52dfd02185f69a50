"""`hf-clip curate`: scores of a data set's images, and the rows that are worth keeping."""

import sys
from typing import Annotated

import typer

from .image_results import end_by_problems
from .shared_options import (
    MODEL_HELP,
    BatchSizeOption,
    CaptionColumnOption,
    ErrorsOption,
    ExactOption,
    ImageColumnOption,
    ImageFoldersOption,
    SplitOption,
    ThreadsOption,
)


def curate(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images; or a data set: a repository on the Hub, a saved one, CSV, JSON lines, parquet or "
            "webdataset files, which are streamed.",
            metavar="DATASET",
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(
            help="A table NAME.parquet, or a new folder, which is filled with webdataset tars.", metavar="OUT"
        ),
    ],
    model: Annotated[
        str,
        typer.Option(help=MODEL_HELP, show_default=False),
    ],
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="A head of scores, such as aesthetic: its name beside the model, its file, or the .pth file of a "
            "LAION-Aesthetics predictor.",
            metavar="HEAD",
        ),
    ] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Look for near duplicates; all images are compared with one another.")
    ] = False,
    labels: Annotated[
        str | None, typer.Option(help="Labels that may become tags: A,B,… or a file with one on each line.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help='Keep the rows that fulfil this condition, in SQL over the columns, such as "clip_score > 0.28 AND '
            'NOT duplicate".',
            metavar="CONDITION",
        ),
    ] = None,
    top_fraction: Annotated[
        tuple[str, float] | None,
        typer.Option(help="Of what --keep leaves, keep the part with the highest scores.", metavar="SCORE PART"),
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="Write the images into the table too.")] = False,
    picture: Annotated[str | None, typer.Option(help="Draw histograms of the scores, a PNG.", metavar="FILE")] = None,
    split: SplitOption = None,
    image_column: ImageColumnOption = None,
    caption_column: CaptionColumnOption = None,
    image_folders: ImageFoldersOption = None,
    tar_rows: Annotated[int, typer.Option(help="Rows of a tar.", min=1)] = 10_000,
    exact: ExactOption = False,
    errors: ErrorsOption = False,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
) -> None:
    """Score the images of a data set, and write the rows that are worth keeping.

    clip_score is the cosine similarity of an image and its caption. A head gives any score that it was trained for. A
    summary in JSON stands beside the result. The result appears when it is whole.

    Exit status: 0, all images were scored; 2, some could not be opened; 1, an error.

    Examples:

        hf-clip curate pairs/ scores.parquet --model clip-vit-l14/ --picture scores.png

        hf-clip curate "shards/{000..099}.tar" best/ --model clip-vit-l14/ --top-fraction clip_score 0.3

        hf-clip curate org/pairs kept.parquet --model clip-vit-l14/ --keep "clip_score > 0.28 AND NOT duplicate"

        hf-clip curate photos/ good.parquet --model clip-vit-l14/ --head aesthetic --keep "aesthetic > 5"
    """
    from ..search.curation import curate as curate_source
    from ..zero_shot.prompts import parse_labels

    done = curate_source(
        source,
        out,
        model=model,
        heads=head or (),
        duplicates=duplicates,
        labels=None if labels is None else parse_labels(labels),
        keep=keep,
        top_fraction=top_fraction,
        images=images,
        picture=picture,
        tar_rows=tar_rows,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
        image_folders=image_folders or (),
        batch_size=batch_size,
        exact=exact,
        threads=threads,
        progress=sys.stderr.isatty(),
    )
    print(f"{source}: {done.images:,} images, {done.kept:,} kept in {out}")
    for name, found in done.summary["scores"].items():
        if found["all"]["count"]:
            values = "  ".join(f"{part} {found['all'][part]:.3f}" for part in ("5%", "50%", "95%"))
            print(f"{name}: {values}")
    if done.duplicates is not None:
        print(f"near duplicates: {done.duplicates:,}")
    end_by_problems(done.problems, done.unreadable, errors)
