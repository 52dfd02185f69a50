"""`hf-clip info`: what a checkpoint file, folder or repository is, without loading it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..checkpoints.describe import Description


def in_words(found: "Description") -> list[tuple[str, str]]:
    """What is known, as titles and texts."""
    lines = [("layout", found.layout)]
    kind = ", ".join(part for part in (found.variant, found.model) if part)
    lines.append(("model", kind or "unknown"))
    if count := found.parameters:
        parts = f": images {count['image']:,}, texts {count['all'] - count['image']:,}" if count["image"] > 0 else ""
        lines.append(("parameters", f"{count['all']:,}{parts}"))
    if found.nbytes is not None:
        kinds = " and ".join(found.dtypes) or "no floating-point numbers"
        lines.append(("weights", f"{found.nbytes / 1e6:,.1f} MB, {kinds}"))
    if text := found.text:
        sizes = f"{text['layers']} layers of width {text['width']} with {text['heads']} heads"
        lines.append(("text tower", f"{sizes}, {text['tokens']} tokens of {text['vocabulary']:,}"))
    if image := found.image:
        if image["kind"] == "ViT":
            sizes = f"{image['layers']} layers of width {image['width']} with {image['heads']} heads"
            sizes += f", patches of {image['patch']} pixels"
        else:
            sizes = f"{'-'.join(map(str, image['blocks']))} blocks to width {image['width']}, {image['heads']} heads"
        lines.append(("image tower", f"{image['kind']}, {sizes}, images of {image['pixels']}"))
    widths = f", trained at the widths {', '.join(map(str, found.matryoshka_dims))}" if found.matryoshka_dims else ""
    lines.append(("embedding", f"{found.embedding}{widths}" if found.embedding else ""))
    lines.append(("activation", found.activation or ("not told" if found.text else "")))
    lines += [("loss", found.loss or ""), ("tokenizer", found.tokenizer or "")]
    if settings := found.images:
        lines.append(("images", f"{settings['size']}, {settings['fit']}, {settings['resample']}"))
        lines.append(("", f"mean {settings['mean']}, std {settings['std']}"))
    lines += [("problem", problem) for problem in found.problems]
    for loader in found.loaders:
        lines.append((loader.name, f"{'yes: ' if loader.loads else 'no: '}{loader.how}"))
    return [(title, text) for title, text in lines if text]


def info(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint file, a folder, a repository on the Hub, or one of OpenAI's nine names.",
            metavar="PATH_OR_REPO",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Look for repositories in the Hub's cache only.")] = False,
) -> None:
    """Say what a checkpoint, folder or repository is, and who would load it.

    Only headers and small files are read: no weights are loaded or downloaded, and no code of the source is run. The
    exit status is 1 for weights that are cut off or damaged.

    Examples:

        hf-clip info ViT-L-14-336px.pt

        hf-clip info openai/clip-vit-base-patch32 --json
    """
    from ..checkpoints.describe import describe

    found = describe(source, offline=offline)
    if as_json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        lines = in_words(found)
        width = max(len(title) for title, _ in lines)
        print(found.source)
        for title, text in lines:
            print(f"  {title:<{width}}  {text}")
    if found.damage is not None:
        raise ValueError(found.damage)
