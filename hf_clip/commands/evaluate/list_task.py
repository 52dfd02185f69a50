"""`hf-clip evaluate list`."""

from typing import Annotated

import typer


def list_data_sets(
    architecture: Annotated[
        str, typer.Option("--architecture", help="Model whose published figures are shown.", metavar="NAME")
    ] = "ViT-B/32",
) -> None:
    """List the 27 data sets of the paper: name, metric, copy on the Hub, published figures."""
    from ...evaluation.paper_data_sets import SOURCE, paper_data_sets
    from ...evaluation.reports import text_table
    from ...model.variants import VARIANTS

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
