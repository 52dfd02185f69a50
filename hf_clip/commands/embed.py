"""`hf-clip embed`: embeddings of images as files."""

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


def embed(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images; or a data set: a repository on the Hub, a saved one, CSV, JSON lines, parquet or "
            "webdataset files, which are streamed.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(help="A new or empty folder, or an address such as s3://bucket/folder.", metavar="OUT"),
    ],
    model: Annotated[
        str,
        typer.Option(help=MODEL_HELP, show_default=False),
    ],
    format: Annotated[str, typer.Option(help="parquet, safetensors or clip-retrieval.", metavar="FORMAT")] = "parquet",
    dtype: Annotated[str, typer.Option(help="float16 or float32.", metavar="DTYPE")] = "float16",
    texts: Annotated[bool, typer.Option("--texts", help="Embed the captions of a data set too.")] = False,
    shard_rows: Annotated[int, typer.Option(help="Images of a file.", min=1)] = 10_000,
    split: SplitOption = None,
    image_column: ImageColumnOption = None,
    caption_column: CaptionColumnOption = None,
    image_folders: ImageFoldersOption = None,
    exact: ExactOption = False,
    ray: Annotated[bool, typer.Option("--ray", help="Embed on many machines, through Ray Data.")] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster. By default what RAY_ADDRESS names, else this machine.", metavar="ADDRESS"),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            help="How many processes of Ray hold a model. By default one for each GPU, or for each four cores.", min=1
        ),
    ] = None,
    errors: ErrorsOption = False,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
) -> None:
    """Write embeddings of images into files: parquet, safetensors, or as clip-retrieval does.

    After an interruption, the same command goes on after the last file that is whole.

    Exit status: 0, all images are embedded; 2, some could not be opened; 1, an error.

    Examples:

        hf-clip embed ~/Pictures photo-embeddings --model clip-vit-b32/

        hf-clip embed "shards/{000..099}.tar" s3://bucket/embeddings --model ViT-B/32 --texts --format clip-retrieval

        hf-clip embed org/pairs embeddings --model org/clip-vit-l14 --ray --ray-address auto
    """
    from ..search.embed_source import RayOptions, embed_source

    if not ray and (ray_address is not None or ray_workers is not None):
        raise ValueError("--ray-address and --ray-workers say how Ray embeds: give --ray too.")

    done = embed_source(
        source,
        out,
        model=model,
        layout=format,
        dtype=dtype,
        texts=texts,
        shard_rows=shard_rows,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
        image_folders=image_folders or (),
        batch_size=batch_size,
        exact=exact,
        threads=threads,
        progress=None,
        ray=RayOptions(ray_address, ray_workers) if ray else None,
    )
    earlier = f", {done.rows - done.added:,} before" if done.added < done.rows else ""
    shards = f"{done.shards:,} shard{'s' * (done.shards != 1)}"
    print(f"{source}: {done.added:,} embedded{earlier}; {shards} in {out}")
    end_by_problems(done.reasons, done.problems, errors)
