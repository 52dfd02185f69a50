"""`hf-clip export-onnx`: a CLIP as ONNX graphs, for browsers and inference servers."""

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checkpoints.onnx_choices import LEAST_COSINE, PRECISIONS

if TYPE_CHECKING:
    from ..checkpoints.onnx_export import Written


class GraphLayout(str, Enum):
    """Whose folder is written."""

    onnx = "onnx"
    immich = "immich"
    infinity = "infinity"


def split_words(words: list[str], precisions: list[str]) -> tuple[str, str | None, list[str]]:
    """Source, folder to write to, and precisions: `--precision fp32 fp16` leaves all but the first among the words.

    Raises typer.BadParameter.
    """
    listed = [name for given in precisions for name in given.replace(",", " ").split()]
    while precisions and len(words) > 1 and words[-1] in PRECISIONS:
        listed.append(words[-1])
        words = words[:-1]
    if unknown := [name for name in listed if name not in PRECISIONS]:
        raise typer.BadParameter(f"--precision has {unknown[0]!r}, which is none of {', '.join(PRECISIONS)}")
    if len(words) > 2:
        raise typer.BadParameter(f"a source and a folder to write to are taken, but there is {words[2]!r} as well")
    return words[0], words[1] if len(words) == 2 else None, listed or ["fp32"]


def report(written: "list[Written]") -> str:
    """A table of the files, their sizes and deviations."""
    width = max(len(file.name) for file in written)
    lines = [f"{'':{width}}  {'size':>9}  {'error':>7}  cosine"]
    for file in written:
        found = file.deviation
        lines.append(f"{file.name:{width}}  {file.nbytes / 1e6:>6.1f} MB  {found.error:7.1e}  {found.cosine:.5f}")
    return "\n".join(lines)


def left_over(folder: Path, written: "list[Written]") -> list[str]:
    """Graphs of an earlier export, which may be of other weights."""
    names = {file.name for file in written}
    return sorted(path.name for path in folder.glob("*.onnx") if path.name not in names)


def write_for_server(
    layout: GraphLayout, source: str, out: str | None, precisions: list[str], is_chosen: bool, force: bool
) -> None:
    """Write the folder of another server, and print what it holds.

    is_chosen: whether `precisions` were given
    """
    try:
        if layout == GraphLayout.infinity:
            if is_chosen:
                raise typer.BadParameter("--precision is of graphs, and infinity loads weights; leave it out")
            from ..checkpoints.infinity_folder import export_infinity

            export_infinity(source, out)
            print(f"{out}: the model in the layout of transformers' CLIPModel, which infinity loads")
            return
        if len(precisions) > 1:
            raise typer.BadParameter(f"Immich loads one graph for each tower; choose one of {', '.join(precisions)}")
        from ..checkpoints.immich_folder import export_immich

        written = export_immich(source, out, precision=precisions[0], force=force)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from None
    print(f"{out}, against the model on random inputs:")
    print(report(written))


def export_onnx(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE [OUT]",
            help="Folder or repository that HfClipModel.from_pretrained reads, and the folder to write to (default: "
            "the model's own).",
        ),
    ],
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="fp32 fp16 int8",
            help="One or more, of the weights; int8 computes linear layers in int8 too. By default fp32.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help=f"Write smaller graphs with cosines below {LEAST_COSINE} too.")
    ] = False,
    layout: Annotated[
        GraphLayout,
        typer.Option(
            help="onnx: for transformers.js and optimum. immich: the folder of Immich's machine-learning service. "
            "infinity: what the server infinity loads, which is a ViT's weights and no graph."
        ),
    ] = GraphLayout.onnx,
) -> None:
    """Write a CLIP as ONNX graphs with the names that transformers.js and optimum give a stock one.

    onnx/{model,text_model,vision_model}{,_fp16,_quantized}.onnx, each held against the model before it is put in place.

    Examples:

        hf-clip export-onnx clip-vit-b32/

        hf-clip export-onnx clip-vit-b32/ web/ --precision fp32 fp16 int8

        hf-clip export-onnx clip-vit-b32/ immich/ --layout immich
    """
    source, out, precisions = split_words(words, precision or [])
    from ..checkpoints.onnx_export import export_onnx as export  # imports torch
    from ..registration import register

    register()
    if layout != GraphLayout.onnx:
        write_for_server(layout, source, out, precisions, precision is not None, force)
        return
    try:
        written = export(source, out, precisions=precisions, force=force)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from None
    folder = Path(out or source) / "onnx"
    print(f"{folder}, against the model on random inputs:")
    print(report(written))
    if others := left_over(folder, written):
        print(f"note: {', '.join(others)} are from an earlier export; remove what is of other weights", file=sys.stderr)
