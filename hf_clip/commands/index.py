"""`hf-clip index`: bring an index of images up to date with folders."""

import os
import sys
from functools import partial
from typing import Annotated, Any

import typer

from .classify import BatchSizeOption, ImageColumnOption, ImageFoldersOption, SplitOption
from .program import Dtype

SOME_FAILED = 2
"""Exit status: the index is up to date, but some files could not be opened."""

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


def index(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders of images, those in their folders too; or data sets: repositories on the Hub, saved ones, "
            "CSV, JSON lines, parquet or webdataset files; or embeddings that `hf-clip embed` or clip-retrieval wrote. "
            "Without one, all folders that the index knows.",
            metavar="FOLDER|DATASET...",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a repository on the Hub, a checkpoint file, or one of OpenAI's nine names. Needed once: "
            "the index remembers it.",
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            "--into",
            "--index",
            help="The index: a folder, or an address on object storage. By default HF_CLIP_INDEX, else a folder of "
            "your own data.",
            metavar="INDEX",
            show_default=False,
        ),
    ] = None,
    keep_missing: Annotated[
        bool, typer.Option("--keep-missing", help="Keep images in the index whose files are gone.")
    ] = False,
    exact: ExactOption = False,
    split: SplitOption = None,
    image_column: ImageColumnOption = None,
    caption_column: CaptionColumnOption = None,
    image_folders: ImageFoldersOption = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate",
            help="Then let searches compare a part of the images only, which pays from about a million on. Its recall "
            "is measured and printed.",
        ),
    ] = False,
    errors: Annotated[bool, typer.Option("--errors", help="List the files that cannot be opened, and why.")] = False,
    batch_size: BatchSizeOption = 16,
    threads: ThreadsOption = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="The dtype to compute in. bfloat16 is faster where a processor computes in it."),
    ] = Dtype.float32,
) -> None:
    """Index the images of folders and data sets, so that they can be searched by text and by image.

    Only new and changed files are opened. What was renamed or moved is known by its content. What is gone leaves the
    index. After an interruption, the same command goes on where it stopped.

    Exit status: 0, the index is up to date; 2, some files could not be opened; 1, an error.

    Examples:

        hf-clip index ~/Pictures --model clip-vit-b32/

        hf-clip index

        hf-clip index embeddings/ --into pairs-index

        hf-clip index --approximate

        hf-clip index org/pairs --split test --into pairs-index --model ViT-B/32
    """
    from ..search.embedding_place import holds_embeddings, model_of_embeddings
    from ..search.folder_scan import refuse_to_empty, scan_folder
    from ..search.index_table import default_index, printable
    from ..search.unchanged_folders import UnchangedFolders
    from ..search.updatable_index import UpdatableIndex, holds_an_index, without_an_empty_index
    from ..training.data.image_stream import is_data_set

    place = os.path.expanduser(into or default_index())
    embedded = [folder for folder in folders or () if holds_embeddings(folder)]
    others = [folder for folder in folders or () if folder not in embedded]
    scans = {folder: scan_folder(folder) for folder in others if not is_data_set(os.path.expanduser(folder))}
    if not holds_an_index(place):
        for found in scans.values():
            refuse_to_empty(found)
    if embedded and model is None and not holds_an_index(place):
        model = model_of_embeddings(embedded[0])
    with without_an_empty_index(place):
        # Whether images were decoded in full stands in the tables.
        unchanged = None if embedded or exact else UnchangedFolders.read(place)
        open_index = partial(UpdatableIndex.open, place, model=model, dtype=dtype.value)
        opened = None if unchanged else open_index()
        known = unchanged.folders if unchanged else opened.tables.noted("folders", []) if opened is not None else []
        if not folders and not known and not (approximate and opened is not None):
            raise ValueError(f"The index {place} knows no folder yet: name one, such as hf-clip index ~/Pictures.")
        how: dict[str, Any] = {"batch_size": batch_size, "exact": exact, "keep_missing": keep_missing}
        how |= {"threads": threads, "progress": None}
        columns: dict[str, Any] = {"split": split, "image_column": image_column, "caption_column": caption_column}
        columns |= {"image_folders": image_folders or ()}
        problems: dict[str, str] = {}
        for folder in embedded:
            opened = open_index() if opened is None else opened
            put = opened.add_embeddings(folder, progress=None)
            problems |= put.problems
            print(f"{folder}: {put.describe()}", flush=True)
        for folder in others if folders else known:
            is_folder = not is_data_set(os.path.expanduser(folder))
            scan = scans.get(folder) or scan_folder(folder) if is_folder else None
            changes = unchanged.changes(scan, model) if unchanged and scan else None
            if changes is None:
                opened = open_index() if opened is None else opened  # one without images is false
                changes = opened.add_data_set(folder, **columns, **how) if scan is None else opened.add(scan, **how)
                unchanged = None if exact else UnchangedFolders.read(place)
            problems |= changes.problems
            print(f"{folder}: {changes.describe()}", flush=True)
        count = len(opened) if opened is not None else unchanged.images if unchanged else 0
        print(f"{count:,} images in {place}", flush=True)
        if approximate:
            from ..search.image_index import ImageIndex

            print(f"approximate scan: {ImageIndex.open(place, model=model).build_approximate_scan().describe()}")
    if problems:
        for path, problem in problems.items() if errors else ():
            print(f"{printable(path)}: {problem}", file=sys.stderr)
        advice = "" if errors else "; --errors lists them"
        print(f"{len(problems):,} files could not be opened{advice}", file=sys.stderr)
        raise typer.Exit(SOME_FAILED)
