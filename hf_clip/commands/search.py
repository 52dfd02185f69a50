"""`hf-clip search`: find images of an index by text and by image."""

import sys
from typing import Annotated, Any

import typer

from .shared_options import IndexOption

NOTHING_FOUND = 2
"""Exit status: no image fits."""


def search(
    queries: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts, and paths or addresses of images, which are added up; or an expression such as "
            '\'2:"a beach" + ./b.jpg - "people"\'.',
            metavar="QUERY...",
            show_default=False,
        ),
    ] = None,
    index: IndexOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the index's model is now, if it was moved.", metavar="MODEL", show_default=False),
    ] = None,
    minus: Annotated[
        list[str] | None, typer.Option(help="A text or an image that is subtracted, with half of its weight.")
    ] = None,
    more_like: Annotated[
        list[int] | None, typer.Option(help="The id of an image of the index, as a search shows it, to look for.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many images to show at most.", min=1)] = 20,
    cutoff: Annotated[
        str,
        typer.Option(
            help="Where results end: auto, judged for each query by the index itself; a least score, such as 0.25; or "
            "off, at --top.",
            metavar="auto|off|SCORE",
        ),
    ] = "auto",
    filter: Annotated[
        str | None,
        typer.Option(help="A condition on columns of the index, such as \"path LIKE '%2023%' AND width > 1000\"."),
    ] = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            help="What a text is put into, as for classify. By default several for short nouns, and a sentence is "
            "taken as it is.",
            show_default=False,
        ),
    ] = None,
    quantized: Annotated[
        str | None,
        typer.Option(help="Search what `hf-clip quantize` wrote: int8, bits, or its file.", metavar="KIND|FILE"),
    ] = None,
    all_copies: Annotated[bool, typer.Option("--all-copies", help="Show near duplicates by themselves.")] = False,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Compare all images, even if `hf-clip index --approximate` was run."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    page: Annotated[str | None, typer.Option("--html", help="Write a page with thumbnails.", metavar="PAGE")] = None,
    montage: Annotated[str | None, typer.Option(help="Write a sheet of thumbnails.", metavar="FILE")] = None,
    copy_to: Annotated[str | None, typer.Option(help="Copy the files there, numbered.", metavar="FOLDER")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Search an index by text, by image, or by both.

    Each line has a score (cosine similarity), the image's id, and its path. Results end where images no longer fit
    the query, at --top at the latest; --cutoff off shows more.

    Exit status: 0, images were found; 2, none fits; 1, an error.

    Examples:

        hf-clip search "a dog on a beach"

        hf-clip search "a red car" ./like-this.jpg --minus snow --html results.html

        hf-clip search --more-like 17 --filter "path LIKE '%2023%'" --json
    """
    import os
    import webbrowser
    from pathlib import Path

    from ..search.approximate_note import EXACT_UP_TO
    from ..search.index_table import default_index
    from ..search.query import parse_queries, read_cutoff
    from ..search.search_copy import keep_copy, open_for_search

    parts = parse_queries(queries or (), minus or (), more_like or ())
    if open_page and page is None:
        raise ValueError("--open opens the page that --html writes: give --html PAGE too.")
    settings: dict[str, Any] = {"top": top, "where": filter, "templates": templates or None}
    settings |= {"folded": not all_copies, "cutoff": read_cutoff(cutoff), "exact": exact}
    needs_tables = {filter, quantized, page, montage} != {None}  # conditions and thumbnails
    tables = open_for_search(os.path.expanduser(index or default_index()), needs_tables, exact)
    from ..search import result_output
    from ..search.image_index import ImageIndex

    searched = ImageIndex(tables, name=model)
    if quantized is not None:
        searched.use_quantized(quantized)
    searched.avoid_torch(parts, exact=exact)
    found = searched.search(parts, **settings)
    scan = None if exact else searched.approximate_scan()
    if scan is None and not exact and quantized is None and len(searched) > EXACT_UP_TO:
        print(f"{len(searched):,} images were compared; hf-clip index --approximate is faster", file=sys.stderr)
    title = " ".join(
        [*(queries or ()), *(f"more like {id}" for id in more_like or ()), *(f"− {word}" for word in minus or ())]
    )
    if page is not None:
        result_output.write_page(page, found, title)
    if montage is not None:
        result_output.write_sheet(montage, found)
    failed = result_output.copy_results(copy_to, found) if copy_to is not None else []
    if as_json:
        print(result_output.as_json(found, scan))
    else:
        print(*result_output.format_lines(found, links=sys.stdout.isatty()), sep="\n", end="\n" if found else "")
    if open_page and page is not None:
        webbrowser.open(Path(page).resolve().as_uri())
    keep_copy(tables)
    if failed:
        raise OSError(f"{len(failed)} of {len(found)} files could not be copied: {'; '.join(failed[:3])}")
    if not found:
        best = found.best_score
        nearest = "" if best is None else f": the nearest has a score of {best:.4f}, and --cutoff off shows it"
        print(f"no image of the index fits{nearest}", file=sys.stderr)
        raise typer.Exit(NOTHING_FOUND)
