"""`hf-clip index`: bring an index of images up to date with folders."""

import os
from typing import Annotated, Any

import typer

from .image_results import end_by_problems
from .program import Dtype
from .shared_options import (
    INDEX_HELP,
    MODEL_HELP,
    BatchSizeOption,
    CaptionColumnOption,
    ExactOption,
    ImageColumnOption,
    ImageFoldersOption,
    SplitOption,
    ThreadsOption,
)


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
            help=f"{MODEL_HELP} Needed once: the index remembers it.",
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            "--into",
            "--index",
            help=INDEX_HELP,
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
    from ..search.index_table import default_index
    from ..search.late_index import LateIndex
    from ..search.updatable_index import holds_an_index, without_an_empty_index
    from ..training.data.image_stream import is_data_set

    place = os.path.expanduser(into or default_index())
    embedded = [folder for folder in folders or () if holds_embeddings(folder)]
    others = [folder for folder in folders or () if folder not in embedded]
    scans = {folder: scan_folder(folder) for folder in others if not is_data_set(os.path.expanduser(folder))}
    if not holds_an_index(place):
        for found in scans.values():
            refuse_to_empty(found)
        if embedded and model is None:
            model = model_of_embeddings(embedded[0])
    with without_an_empty_index(place):
        updated = LateIndex(place, model=model, dtype=dtype.value, exact=exact, takes_embeddings=bool(embedded))
        known = updated.folders
        if not folders and not known and not (approximate and updated.is_open):
            raise ValueError(f"The index {place} knows no folder yet: name one, such as hf-clip index ~/Pictures.")
        how: dict[str, Any] = {
            "batch_size": batch_size,
            "keep_missing": keep_missing,
            "threads": threads,
            "progress": None,
        }
        columns: dict[str, Any] = {"split": split, "image_column": image_column, "caption_column": caption_column}
        columns |= {"image_folders": image_folders or ()}
        problems: dict[str, str] = {}
        for folder in embedded:
            put = updated.open().add_embeddings(folder, progress=None)
            problems |= put.problems
            print(f"{folder}: {put.describe()}", flush=True)
        for folder in others if folders else known:
            if is_data_set(os.path.expanduser(folder)):
                changes = updated.add_data_set(folder, **columns, **how)
            else:
                changes = updated.add(scans.get(folder) or scan_folder(folder), **how)
            problems |= changes.problems
            print(f"{folder}: {changes.describe()}", flush=True)
        print(f"{updated.images:,} images in {place}", flush=True)
        if approximate:
            from ..search.image_index import ImageIndex

            print(f"approximate scan: {ImageIndex.open(place, model=model).build_approximate_scan().describe()}")
    end_by_problems(problems.items(), len(problems), errors, "files")
