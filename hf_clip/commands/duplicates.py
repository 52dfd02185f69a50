"""`hf-clip duplicates`: near duplicates among the images of an index."""

from typing import Annotated

import typer

from .shared_options import IndexOption


def duplicates(
    index: IndexOption = None,
    similarity: Annotated[
        float, typer.Option(help="Least cosine similarity of near duplicates.", min=0.0, max=1.0)
    ] = 0.95,
    bits: Annotated[
        int,
        typer.Option(help="Most bits, of 64, in which the perceptual hashes of near duplicates differ.", min=0, max=64),
    ] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Group images that show the same: copies in other sizes, formats and qualities.

    The largest image of each group comes first. Groups are separated by an empty line. Nothing is deleted.

    Examples:

        hf-clip duplicates

        hf-clip duplicates --index photos-index --json
    """
    import json
    import os

    from ..search.index_table import IndexTables, default_index, shown_path

    tables = IndexTables.open(os.path.expanduser(index or default_index()))
    from ..search.image_index import ImageIndex  # imports torch, for which a missing index need not wait
    from ..search.index_table import printable

    groups = ImageIndex(tables).duplicates(similarity=similarity, bits=bits)
    if as_json:
        rows = [[{"path": shown_path(r.path), "width": r.width, "height": r.height} for r in group] for group in groups]
        print(json.dumps({"groups": rows}, ensure_ascii=False, indent=2))
        return
    for group in groups:
        print(*(f"{r.width}x{r.height}  {printable(r.path)}" for r in group), "", sep="\n")
    count = sum(len(group) - 1 for group in groups)
    print(f"{len(groups):,} groups, {count:,} images beside the largest of each")
