"""`hf-clip tag`: the labels that fit each image, as a table or as keywords in sidecars."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .image_results import end_by_failures, put_results
from .loaded_model import load_placed, place_model
from .program import Dtype
from .shared_options import (
    IMAGES_HELP,
    MODEL_HELP,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    ImageColumnOption,
    ImageFoldersOption,
    LabelsOption,
    OfflineOption,
    OutputOption,
    SplitOption,
    TemplatesOption,
    read_given_templates,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..zero_shot.files import Classified


class Scores(str, Enum):
    """What a label's score is."""

    background = "background"
    sigmoid = "sigmoid"
    cosine = "cosine"


def check_choices(
    images: Any, index: str | None, model: str | None, labels: str | None, classifier: str | None
) -> None:
    """Refuse options that leave out what is needed, or say it twice."""
    if bool(images) == (index is not None):
        raise ValueError("Images come from folders, files or a data set, or from an index: give one or --index.")
    if model is None and index is None:
        raise ValueError("A model is needed to encode images: give --model, or --index, which remembers its model.")
    if (labels is None) == (classifier is None):
        raise ValueError("Tags come from labels or from a saved classifier: give --labels or --classifier.")


def check_unused(
    index: str | None,
    filter: str | None,
    classifier: str | None,
    templates: list[str] | None,
    scores: Scores | None,
    background: str | None,
) -> None:
    """Refuse options that the others leave without effect."""
    if filter is not None and index is None:
        raise ValueError("--filter is a condition on the columns of an index: give --index too.")
    if classifier is not None and (templates or background is not None or scores is not None):
        raise ValueError("A saved classifier has its scores, templates and background: leave those options out.")
    if background is not None and scores not in (None, Scores.background):
        raise ValueError(f"--background is for background scores, and --scores is {scores.value}: leave one out.")


def check_index(index: str, filter: str | None) -> None:
    """Say what is wrong with an index or a condition on it before torch is imported."""
    from ..search.index_table import IndexTables

    tables = IndexTables.open(os.path.expanduser(index))
    if filter is not None:
        tables.check_condition(filter)


@contextmanager
def tag_table(path: str) -> "Iterator[Callable[[Classified], Any]]":
    """What writes a result into the table."""
    from ..search.image_tags import TAG_COLUMNS, tag_row
    from ..zero_shot.tables import name_in_table, row_writer

    with row_writer(path, TAG_COLUMNS) as write:
        yield lambda result: write(tag_row(result, name_in_table(result)))


def tag(
    images: Annotated[
        list[str] | None, typer.Argument(help=IMAGES_HELP, metavar="FOLDER|DATASET...", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} An index remembers its own.", show_default=False)
    ] = None,
    labels: LabelsOption = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="Instead of labels a file that `ZeroShotClassifier.save` wrote, with its labels, its calibration and "
            "its thresholds.",
            metavar="FILE",
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Tag the images of this index, from their embeddings. No image is opened.")
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option(help="With --index, a condition on its columns, such as \"path LIKE '%2023%'\"."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="The least score of a tag. By default 0.5; the classifier's own thresholds with --classifier.",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[
        Scores | None,
        typer.Option(
            help="background: a label against what an image shows otherwise. sigmoid: its probability by itself. "
            "cosine: the similarity. By default sigmoid for models that were trained so, else background.",
            show_default=False,
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            help="Labels of what an image shows otherwise, given as --labels are; by default thing, place, pattern, "
            "surface, something else.",
            metavar="A,B,C|FILE",
            show_default=False,
        ),
    ] = None,
    templates: TemplatesOption = None,
    top_k: Annotated[
        int | None, typer.Option(help="Most tags of an image; by default all that pass.", min=1, show_default=False)
    ] = None,
    output: OutputOption = None,
    write_xmp: Annotated[
        bool,
        typer.Option(
            "--write-xmp",
            help="Add the tags to the keywords of a sidecar beside each image, photo.jpg.xmp, which is made if it is "
            "missing. Images are not changed.",
        ),
    ] = False,
    image_column: ImageColumnOption = None,
    split: SplitOption = None,
    image_folders: ImageFoldersOption = None,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    offline: OfflineOption = False,
) -> None:
    """Give images all labels whose score reaches a threshold: several, one, or none.

    A table has a row for each image: `image`, its path or its number in the data set; `tags` and `scores`, best first,
    joined by "; "; and `error`. The table appears when it is whole.

    Exit status: 0, all images were tagged; 2, some could not be opened or given a sidecar; 1, there is no result.

    Examples:

        hf-clip tag photos/ --model clip-vit-b32/ --labels "dog,beach,snow" --output tags.csv

        hf-clip tag photos/ --model clip-vit-b32/ --labels labels.txt --write-xmp

        hf-clip tag --index photos-index --labels labels.txt --top-k 3
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for `datasets`, which is not imported yet
    check_choices(images, index, model, labels, classifier)
    check_unused(index, filter, classifier, templates, scores, background)
    if index is not None:
        check_index(index, filter)
    from ..search.image_tags import check_keywords, check_scores, write_sidecars
    from ..zero_shot.pipeline import check_device
    from ..zero_shot.prompts import parse_labels, read_labels
    from ..zero_shot.tables import check_table

    check_device(device)
    names = read_labels(parse_labels(labels)) if labels is not None else None
    check_keywords(names or ())
    if scores is not None:
        check_scores(scores.value, threshold)
    others = None if background is None else read_labels(parse_labels(background))
    given = read_given_templates(templates)
    if output is not None:
        check_table(output)

    how: dict[str, Any] = {"threshold": threshold, "classifier": classifier, "labels": names, "templates": given}
    how |= {"background": others, "scores": None if scores is None else scores.value}
    where = {"device": device, "dtype": dtype.value, "offline": offline}
    if index is not None:
        results, total, width = _results_of_index(index, model, filter, top_k, how, where)
    else:
        columns: dict[str, Any] = {"split": split, "image_column": image_column, "image_folders": image_folders or ()}
        results, total, width = _results_of_images(images, model, columns, top_k, batch_size, how, where, write_xmp)
    done, failed = put_results(
        write_sidecars(results) if write_xmp else results,
        None if output is None else tag_table(output),
        total=total,
        name_width=width,
    )
    if output is not None:
        count = done - failed
        print(f"{output}: the tags of {count:,} image{'s' * (count != 1)}")
    end_by_failures(done, failed, "tagged")


def _make_tagger(model: Any, processor: Any, classifier: str | None, labels: Any, templates: Any, **how: Any) -> Any:
    from ..search.image_tags import ImageTagger

    if classifier is not None:
        return ImageTagger.load(classifier, model, processor, threshold=how["threshold"])
    return ImageTagger(model, processor, labels, templates, **how)


def _results_of_index(
    place: str, model: str | None, condition: str | None, top_k: int | None, how: dict[str, Any], where: dict[str, Any]
) -> "tuple[Iterator[Classified], int | None, int]":
    from ..search.image_index import ImageIndex
    from ..search.image_tags import tag_index

    index = ImageIndex.open(place, model=model, make=False)
    tagger = _make_tagger(place_model(index.model, where["device"], where["dtype"]), index.processor, **how)
    return tag_index(tagger, index, top_k=top_k, where=condition), None if condition else len(index), 0


def _results_of_images(
    images: Any,
    model: Any,
    columns: dict[str, Any],
    top_k: int | None,
    batch_size: int,
    how: dict[str, Any],
    where: dict[str, Any],
    needs_files: bool,
) -> "tuple[Iterator[Classified], int | None, int]":
    from ..search.indexed_image import register_formats
    from ..training.data.image_stream import find_image_items, is_data_set
    from ..zero_shot.files import classify_stream

    if needs_files and (columns["split"] or columns["image_column"] or any(map(is_data_set, images))):
        raise ValueError("Sidecars stand beside image files, which a data set has none of: name folders or files.")
    register_formats()
    found = find_image_items(images, **columns)
    loaded, processor = load_placed(model, **where)
    tagger = _make_tagger(loaded, processor, **how)
    results = classify_stream(tagger, found.items, top_k=top_k, batch_size=batch_size, opener=found.opener)
    return results, found.total, found.longest_name
