"""`hf-clip publish`: a model onto the Hub, with the code that loads it and a model card."""

from enum import Enum
from typing import Annotated

import typer

from ..hub.stage import CARD
from ..hub.upload import Upload

WIDTH = 98
CARD_LINES = 8


class Layout(str, Enum):
    hf_clip = "hf_clip"
    transformers = "transformers"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def listing(uploads: list[Upload]) -> str:
    """A table of files and their sizes."""
    width = max(len(upload.name) for upload in uploads)
    lines = [f"  {upload.name:<{width}}  {_size(upload.size):>9}" for upload in uploads]
    total = _size(sum(upload.size for upload in uploads))
    return "\n".join([*lines, f"  {f'{len(uploads)} files':<{width}}  {total:>9}"])


def beginning(card: str) -> str:
    """The first lines of a card's text, cut to the width of a screen."""
    body = card.split("\n---\n", 1)[-1].strip()
    lines = [line for line in body.splitlines()[:CARD_LINES] if line and not line.startswith("|")]
    return "\n".join(f"  {line if len(line) <= WIDTH else line[: WIDTH - 1] + '…'}" for line in lines)


def publish(
    folder: Annotated[str, typer.Argument(help="Folder that convert or the trainer has written.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name of the repository, which is created unless it is there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that is created private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; nothing is sent.")] = False,
    layout: Annotated[
        Layout,
        typer.Option(
            "--format", "--layout", help="transformers: a stock repository for servers that take no code, ViTs only."
        ),
    ] = Layout.hf_clip,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Say that these are the weights of that model of OpenAI's, for its card (known by itself when they "
            "were converted from the published file).",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Publish a model on the Hub, with the code that loads it and a model card, in one commit.

    The folder itself stays as it is. After an error the same command goes on where it stopped.

    Examples:

        hf-clip publish clip-vit-l14-336/ org/clip-vit-l14-336 --dry-run

        hf-clip publish clip-vit-l14-336/ org/clip-vit-l14-336 --private
    """
    from ..hub.stage import publish as publish_model

    try:
        found = publish_model(
            folder, repo_id, private=private or None, dry_run=dry_run, layout=layout.value, variant_name=variant
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None
    if not dry_run:
        print(found.address)
        return
    kind = "private " if private else ""
    print(f"Would push to the {kind}model repository {repo_id}, in one commit:\n{listing(found.uploads)}")
    print(f"Its card, {CARD}:\n{beginning(found.card)}")
