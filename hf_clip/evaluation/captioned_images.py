"""Data sets of images with captions, for retrieval; and of right and wrong captions, for compositionality.

An image may have several captions: a column of lists, the lines of a `.txt` entry, or several rows with one image. Rows
with equal bytes, or with one path, are one image.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..data.benchmark_shards import BenchmarkShards, find_benchmark_shards, image_of
from ..data.columns import CaptionReader, describe_feature, find_caption_column, find_image_column
from ..data.images import NOWHERE, ImagePlaces, ImageRegion, find_image_places
from ..data.sources import folder_of
from .fingerprint import fingerprint_of
from .labelled_images import open_source_of, refuse_columns
from .numbered_row import BOX, CaptionedRowError, NumberedRow, describe_table, numbered_rows

RIGHT_NAMES = ("caption", "true_caption", "positive_caption", "correct_caption", "caption_0")
WRONG_NAMES = ("negative_caption", "false_caption", "wrong_caption", "incorrect_caption", "caption_1")
"""Names of the columns of right and wrong captions, as SugarCrepe, ARO and Winoground have them."""

OPTIONS = "caption_options"
"""ARO's column of all captions, the right one among them: the second one for relations and attributes, the first one
for the tests of order (`dataset_zoo/aro_datasets.py` of mertyg/vision-language-models-are-bows)."""

SEVERAL_WRONG = re.compile(r"hard_text_\d+")
"""Columns of wrong captions, one each, as copies of ARO's tests of order have them."""

TWO_IMAGES = ("image_0", "image_1")
TWO_CAPTIONS = ("caption_0", "caption_1")
"""Winoground's columns: caption 0 belongs to image 0, caption 1 to image 1."""


class CaptionedRow(NamedTuple):
    """A row.   name: for messages   image: undecoded   captions: one or several"""

    name: str
    image: Any
    captions: list[str]


class ChoiceRow(NamedTuple):
    """A row of a test of compositionality.

    With one image the first caption is right, and all others are wrong. With two images caption i belongs to image i.
    """

    name: str
    images: list[Any]
    captions: list[str]


@dataclass(frozen=True)
class CaptionedImages:
    """A data set of images with captions.

    Attributes:
        name: As the user named it.
        split: The split's name.
        rows: A function that reads the rows from the first on.
        count: Number of rows. None if it isn't known.
        places: Where paths in the rows may lead.
        fingerprint: A text that changes with the data. None if it isn't known.
    """

    name: str
    split: str
    rows: Callable[[], Iterator[CaptionedRow]]
    count: int | None = None
    places: ImagePlaces = NOWHERE
    fingerprint: str | None = None


@dataclass(frozen=True)
class Choices:
    """A test of compositionality: images with right and wrong captions.

    Attributes:
        name: As the user named it.
        split: The split's name.
        layout: The columns that were found, in words.
        rows: A function that reads the rows from the first on.
        count: Number of rows. None if it isn't known.
        places: Where paths in the rows may lead.
    """

    name: str
    split: str
    layout: str
    rows: Callable[[], Iterator[ChoiceRow]]
    count: int | None = None
    places: ImagePlaces = NOWHERE


def _open_shards(source: str, shards: BenchmarkShards, split: str | None) -> CaptionedImages:
    if shards.kind != "retrieval":
        raise ValueError(
            f"{source} has labels and no captions (dataset_type.txt: {shards.kind}); evaluate zero-shot on it."
        )
    chosen = shards.find_split(split)

    def rows() -> Iterator[CaptionedRow]:
        for place, (name, entries) in enumerate(shards.rows(chosen)):
            lines = entries.get("txt", b"").decode("utf-8", errors="replace").splitlines()
            captions = [line.strip() for line in lines if line.strip()]
            if not captions:
                raise CaptionedRowError(
                    f"{name} has no captions: its entries end in {', '.join(entries)}; txt is needed.", place
                )
            yield CaptionedRow(name, image_of(name, entries), captions)

    return CaptionedImages(source, chosen, rows, fingerprint=fingerprint_of(source, chosen))


def captioned_table(
    table: Any,
    *,
    name: str = "the data set",
    split: str = "",
    image_column: str | None = None,
    caption_column: str | None = None,
    places: ImagePlaces = NOWHERE,
) -> CaptionedImages:
    """Find images and captions in a table or stream of `datasets`.

    Args:
        table: A `datasets.Dataset` or `IterableDataset`.
        name: Its name, for messages and results.
        split: Name of its split, for results.
        image_column: The column of images. None: the only one that can be it.
        caption_column: The column of captions, or a template over the columns. None: the only one that can be it.
        places: Where paths in the rows may lead.

    Raises:
        ValueError: It has no rows, or a column is missing or ambiguous.
    """
    table, features, count = describe_table(name, split, table)
    images = find_image_column(name, features, image_column)
    texts = find_caption_column(name, features, caption_column, images)
    reader = CaptionReader(name, texts, features)

    def rows() -> Iterator[CaptionedRow]:
        for row in numbered_rows(name, table):
            try:
                captions = [caption for caption in reader(row.values) if caption]
            except ValueError as error:
                raise row.refuse(f"cannot be used: {error}; leave it out.") from error
            yield CaptionedRow(row.title, row.field(images), captions)

    return CaptionedImages(name, split, rows, count, places)


def open_captioned(
    source: Any,
    split: str | None = None,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_folders: Sequence[str] = (),
) -> CaptionedImages:
    """Open a data set of images with captions.

    Args:
        source: What the trainer opens; a data set in the layout of `clip-benchmark/wds_*`; or from Python a
            `datasets.Dataset` or `IterableDataset`. A `CaptionedImages` is returned as it is.
        split: Name of the split. None: the only one, or `test`, or `validation`.
        image_column: The column of images. None: the only one that can be it.
        caption_column: The column of captions, or a template over the columns. None: the only one that can be it.
        image_folders: Folders besides the source's own that paths in its rows may lead to.

    Returns:
        The data set, whose rows are read as a stream.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: A split or a column is missing, or the split is empty.
    """
    if isinstance(source, CaptionedImages):
        return source
    columns: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column}
    if hasattr(source, "features") and hasattr(source, "select_columns"):
        return captioned_table(source, split=split or "", **columns)
    source = str(source)
    if (shards := find_benchmark_shards(source)) is not None:
        refuse_columns(source, columns)
        return _open_shards(source, shards, split)
    chosen, table = open_source_of(source, split)
    places = find_image_places(source, folder_of(source), image_folders)
    found = captioned_table(table, name=source, split=chosen, places=places, **columns)
    return replace(found, fingerprint=fingerprint_of(source, chosen))


def _find_text(name: str, features: Mapping[str, Any], given: str | None, usual: Sequence[str], what: str) -> str:
    if given is not None and given not in features:
        raise ValueError(f"{name} has no column {given!r}; its columns are {', '.join(features)}.")
    found = [given] if given else [column for column in usual if column in features]
    if not found:
        raise ValueError(
            f"{name}: no column looks like the {what} captions ({', '.join(usual)}); its columns are "
            f"{', '.join(features)}. Name one with --{what}-column."
        )
    _check_texts(name, features, found[0])
    return found[0]


def _check_texts(name: str, features: Mapping[str, Any], column: str) -> None:
    if describe_feature(features[column]) not in ("text", "texts") and features[column] is not None:
        raise ValueError(f"{name}: the column {column!r} holds {features[column]}, but texts are needed.")


def _captions_of(
    name: str, features: Mapping[str, Any], right: str | None, wrong: str | None, right_index: int | None
) -> tuple[str, Callable[[NumberedRow], list[str]]]:
    """Return what the captions are, in words, and a function from a row to its captions, the right one first."""
    if right_index is not None and (right or wrong):
        raise ValueError(
            f"--right-index is {right_index}, a place in the column {OPTIONS}: leave --right-column and --wrong-column "
            f"out."
        )
    if right_index is not None or (right is None and wrong is None and OPTIONS in features):
        if OPTIONS not in features:
            raise ValueError(
                f"--right-index is {right_index}, but {name} has no column {OPTIONS}; its columns are "
                f"{', '.join(features)}."
            )
        if right_index is None or right_index < 0:
            raise ValueError(
                f"{name} has {OPTIONS}, and not which of them is right: name its place with --right-index. In ARO it "
                f"is 1 for relations and attributes, and 0 for the tests of order."
            )
        place: int = right_index
        _check_texts(name, features, OPTIONS)

        def of_options(row: NumberedRow) -> list[str]:
            texts = row.texts(OPTIONS)
            if not place < len(texts) or len(texts) < 2:
                raise row.refuse(
                    f"has {len(texts)} {OPTIONS}, but a wrong one and one at place {place}, counted from 0, are "
                    f"needed; change --right-index, or leave the row out."
                )
            return [texts[place], *texts[:place], *texts[place + 1 :]]

        return f"{OPTIONS}, of which {place} is right", of_options
    first = _find_text(name, features, right, RIGHT_NAMES, "right")
    several = [] if wrong else [column for column in features if SEVERAL_WRONG.fullmatch(column)]
    others = several or [_find_text(name, features, wrong, WRONG_NAMES, "wrong")]

    def of_columns(row: NumberedRow) -> list[str]:
        found = row.texts(first)
        if len(found) != 1:
            raise row.refuse(f"has {len(found)} right captions, but one is needed; leave it out.")
        return found + [text for column in others for text in row.texts(column)]

    return f"{first} and {', '.join(others)}", of_columns


def choices_table(
    table: Any,
    *,
    name: str = "the data set",
    split: str = "",
    image_column: str | None = None,
    right_column: str | None = None,
    wrong_column: str | None = None,
    right_index: int | None = None,
    places: ImagePlaces = NOWHERE,
) -> Choices:
    """Find images with right and wrong captions in a table or stream of `datasets`.

    An image with ARO's columns `bbox_x`, `bbox_y`, `bbox_w` and `bbox_h` is cropped to that box, as ARO does.

    Args:
        table: With `image_0`, `image_1`, `caption_0` and `caption_1`, as Winoground has it; or with an image, a right
            caption and one or several wrong ones, as ARO and SugarCrepe have it.
        name: Its name, for messages and results.
        split: Name of its split, for results.
        image_column: The column of images. None: the only one that can be it.
        right_column: The column of right captions. None: the first that is there of `RIGHT_NAMES`.
        wrong_column: The column of wrong captions. None: the first that is there of `WRONG_NAMES`, or all of
            `hard_text_1`, `hard_text_2` and so on.
        right_index: Where right and wrong captions stand in one column `caption_options`: the place of the right one,
            from 0.
        places: Where paths in the rows may lead.

    Raises:
        ValueError: It has no rows, a column is missing, or an option has no effect on it.
    """
    table, features, count = describe_table(name, split, table)
    if image_column is None and set(TWO_IMAGES + TWO_CAPTIONS) <= set(features):
        if right_column or wrong_column or right_index is not None:
            raise ValueError(
                f"{name} has {', '.join(TWO_IMAGES + TWO_CAPTIONS)}, of which each caption is right for one image: "
                f"leave --right-column, --wrong-column and --right-index out, or name one image by --image-column."
            )

        def pairs() -> Iterator[ChoiceRow]:
            for row in numbered_rows(name, table):
                captions = [text for column in TWO_CAPTIONS for text in row.texts(column)]
                yield ChoiceRow(row.title, [row.values[column] for column in TWO_IMAGES], captions)

        return Choices(name, split, "two images and two captions", pairs, count, places)
    images = find_image_column(name, features, image_column)
    described, captions_of = _captions_of(name, features, right_column, wrong_column, right_index)
    is_cropped = set(BOX) <= set(features)

    def rows() -> Iterator[ChoiceRow]:
        for row in numbered_rows(name, table):
            image = row.field(images)
            yield ChoiceRow(row.title, [ImageRegion(image, row.box()) if is_cropped else image], captions_of(row))

    image = "the box of an image" if is_cropped else "an image"
    return Choices(name, split, f"{image}, {described}", rows, count, places)


def open_choices(
    source: Any,
    split: str | None = None,
    *,
    image_column: str | None = None,
    right_column: str | None = None,
    wrong_column: str | None = None,
    right_index: int | None = None,
    image_folders: Sequence[str] = (),
) -> Choices:
    """Open a test of compositionality.

    Args:
        source: What the trainer opens, or from Python a `datasets.Dataset` or `IterableDataset`. A `Choices` is
            returned as it is.
        split: Name of the split. None: the only one, or `test`, or `validation`.
        image_column: The column of images. None: the only one that can be it, or `image_0` and `image_1`.
        right_column: The column of right captions. None: `caption`, `true_caption` and the like.
        wrong_column: The column of wrong captions. None: `negative_caption`, `false_caption` and the like.
        right_index: Where all captions stand in one column `caption_options`: the place of the right one, from 0.
        image_folders: Folders besides the source's own that paths in its rows may lead to.

    Returns:
        The test, whose rows are read as a stream.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: A split or a column is missing, or the split is empty.
    """
    if isinstance(source, Choices):
        return source
    columns: dict[str, Any] = {"image_column": image_column, "right_column": right_column, "wrong_column": wrong_column}
    columns["right_index"] = right_index
    if hasattr(source, "features") and hasattr(source, "select_columns"):
        return choices_table(source, split=split or "", **columns)
    source = str(source)
    chosen, table = open_source_of(source, split)
    places = find_image_places(source, folder_of(source), image_folders)
    return choices_table(table, name=source, split=chosen, places=places, **columns)
