"""`hf-clip quantize`: embeddings in fewer bits, with the recall that is kept."""

from typing import Annotated

import typer


def quantize(
    place: Annotated[
        str,
        typer.Argument(
            help="An index; or a folder of embeddings that `hf-clip embed` or clip-retrieval wrote.",
            metavar="INDEX|EMBEDDINGS",
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="int8 or bits.", metavar="KIND")],
    into: Annotated[
        str | None, typer.Option(help="The file to write; by default one in the place itself.", metavar="FILE")
    ] = None,
) -> None:
    """Quantize embeddings for faster searches, and measure what is kept.

    Recall@10 is the part of the ten most similar images of the exact scan that a search finds. Images are the queries,
    and none is its own result.

    Examples:

        hf-clip quantize photos-index --to bits

        hf-clip quantize embeddings/ --to int8 --into embeddings-int8.safetensors
    """
    from ..search import quantized_files

    done = quantized_files.quantize(place, to, into)
    print(f"{done.images:,} embeddings in {done.path}")
    print(f"recall@10 {done.recall:.4f}")
    print(f"{done.code_bytes / 1e6:,.1f} MB of codes, {done.float16_bytes / 1e6:,.1f} MB in float16")
