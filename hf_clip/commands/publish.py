"""`hf-clip publish`: a model onto the Hub, with the code that loads it and a model card."""

import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..hub.stage import Publication
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


def listing(uploads: "list[Upload]") -> str:
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


def indented(code: str) -> str:
    """A program without its last line, which is a checksum."""
    return "\n".join(f"  {line}".rstrip() for line in code.rstrip().splitlines()[:-1]).rstrip()


def push_space(repo_id: str, space_id: str, page: dict[str, str], private: bool, is_there: bool) -> None:
    """Push the page of a published model, and say where it is and what is left to do."""
    from ..hub.space import is_private, publish_space

    is_hidden = private or is_private(repo_id)
    # A new Space is not shown to more people than the model.
    address = publish_space(repo_id, space_id, page, private=(is_hidden or None) if not is_there else (private or None))
    print(address)
    if is_hidden:
        print(
            f"{repo_id} is private, and the Space cannot load it yet: at {address}/settings add the secret HF_TOKEN, a "
            f"token that may read {repo_id}."
        )


def show_plan(found: "Publication", repo_id: str, space_id: str, page: dict[str, str], private: bool) -> None:
    """Print what would be pushed: files, the card's beginning, and the Space's if there is one."""
    from ..hub.space import list_files
    from ..hub.stage import CARD

    kind = "private " if private else ""
    print(f"Would push to the {kind}model repository {repo_id}, in one commit:\n{listing(found.uploads)}")
    print(f"Its card, {CARD}:\n{beginning(found.card)}")
    if space_id:
        print(f"Would push to the {kind}Space {space_id}, in one commit:\n{listing(list_files(page))}")
        print(f"Its program, app.py:\n{indented(page['app.py'])}")


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
    space: Annotated[
        bool, typer.Option("--space", help="Publish a Space, too: a page on which visitors try the model.")
    ] = False,
    space_repo: Annotated[
        str | None,
        typer.Option(help="Name of the Space (default: as that of the model).", metavar="OWNER/NAME"),
    ] = None,
    replace_space: Annotated[
        bool,
        typer.Option("--replace-space", help="Overwrite app.py, README.md and requirements.txt of another's hand."),
    ] = False,
) -> None:
    """Publish a model on the Hub, with the code that loads it and a model card, in one commit.

    The folder itself stays as it is. After an error the same command goes on where it stopped.

    With --space, a page for the model follows, which the Hub runs with Gradio. A Space that is there is not overwritten
    where somebody else wrote or changed it.

    Examples:

        hf-clip publish clip-vit-l14-336/ org/clip-vit-l14-336 --dry-run

        hf-clip publish clip-vit-l14-336/ org/clip-vit-l14-336 --private

        hf-clip publish clip-vit-l14-336/ org/clip-vit-l14-336 --space
    """
    from ..hub.space import check_space, space_files
    from ..hub.stage import publish as publish_model
    from ..hub.upload import check_repo_id

    space_id = check_repo_id(space_repo or repo_id) if space or space_repo else ""
    if replace_space and not space_id:
        raise ValueError("--replace-space says what becomes of a Space; give --space, too.")
    page = space_files(check_repo_id(repo_id), space_id, sys.modules["hf_clip"].__version__) if space_id else {}
    is_there = False
    try:
        if space_id and not dry_run:  # before the weights are sent
            is_there = check_space(space_id, page, private=private, replace=replace_space)
        found = publish_model(
            folder, repo_id, private=private or None, dry_run=dry_run, layout=layout.value, variant_name=variant
        )
        if not dry_run:
            print(found.address, flush=True)
            if space_id:
                push_space(repo_id, space_id, page, private, is_there)
            return
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None
    show_plan(found, repo_id, space_id, page, private)
