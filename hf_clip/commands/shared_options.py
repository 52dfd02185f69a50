"""Options that several commands have, with their help."""

from typing import Annotated

import typer

from .program import Dtype

MODEL_HELP = "A folder, a repository on the Hub, a checkpoint file, or one of OpenAI's nine names."
INDEX_HELP = (
    "The index: a folder, or an address on object storage. By default HF_CLIP_INDEX, else a folder of your own data."
)
IMAGES_HELP = (
    "Folders, of which all images are taken, those in their folders too; files; addresses. Or one data set: a "
    "repository on the Hub, a CSV, JSON lines, parquet or webdataset file, a saved data set."
)

LabelsOption = Annotated[
    str | None,
    typer.Option(
        help="Labels with commas between them; or a file: a label on each line, or JSON with the names of labels.",
        metavar="A,B,C|FILE",
    ),
]
TemplatesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A text with {} where the label belongs, given once or several times; the name of a set; or a file "
        "with a text on each line. By default: a photo of a {}.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        help="A table to write, which ends in .csv, .jsonl or .parquet. Without it, results are printed.",
        metavar="FILE",
    ),
]
ImageColumnOption = Annotated[str | None, typer.Option(help="The column of a data set that holds the images.")]
SplitOption = Annotated[str | None, typer.Option(help="The split of a data set; by default train.")]
ImageFoldersOption = Annotated[
    list[str] | None,
    typer.Option(help="More folders whose images the rows of a data set may name; only for rows you trust."),
]
BatchSizeOption = Annotated[int, typer.Option(help="How many images to encode at once.", min=1)]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="The dtype to compute in.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Download nothing.")]
CaptionColumnOption = Annotated[
    str | None, typer.Option(help="The column of a data set that holds captions, or a template over its columns.")
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact", help="Decode large JPEGs in full, and not at a half, a quarter or an eighth of their size."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="How many threads open images; by default one for each core, at most 8.", min=1)
]
ErrorsOption = Annotated[bool, typer.Option("--errors", help="List the images that cannot be opened, and why.")]
IndexOption = Annotated[str | None, typer.Option(help=INDEX_HELP, show_default=False)]


def read_given_templates(templates: list[str] | None) -> str | list[str]:
    """Return what `--templates` stands for: the default, a text, a set's name or a file, or several of them.

    Raises ValueError for what is no template.
    """
    from ..zero_shot.prompts import DEFAULT_TEMPLATE, read_templates

    given = DEFAULT_TEMPLATE if not templates else templates[0] if len(templates) == 1 else templates
    read_templates(given)
    return given
