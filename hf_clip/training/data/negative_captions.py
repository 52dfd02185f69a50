"""Wrong captions of rows: which columns hold them, and what a row has of them.

They are read as captions are, and a row may have none. All that it has go into the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...data.columns import (
    CAPTION_NAMES,
    CaptionReader,
    MissingTextError,
    UnusableRowError,
    describe_feature,
    find_caption_column,
    find_image_column,
)

FLAG = "negative_caption_column"


def without_columns(features: Mapping[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """The columns of a source among which those of images and of captions are looked for."""
    return {name: feature for name, feature in features.items() if name not in named}


def check_taken(
    source: str,
    features: Mapping[str, Any],
    named: Sequence[str],
    image_column: str | None,
    caption_column: str | None,
) -> None:
    """Refuse columns of wrong captions that rather hold the images or the captions, where these are not named.

    Another column would be taken for the captions then, and that of the images would not be found.

    Args:
        source: Its name.
        features: Its columns.
        named: Those of wrong captions.
        image_column, caption_column: As they are named, if they are.

    Raises:
        ValueError: There is such a column.
    """
    if image_column is None and named:
        try:
            found = find_image_column(source, features, None)
        except ValueError:  # there is a choice, or nothing, which is said of the other columns
            found = None
        if found in named:
            raise ValueError(
                f"{source}: --{FLAG} is {found!r}, which is the column that looks like the images; name a column of "
                f"texts, or name the images' own with --image_column."
            )
    for name in named if caption_column is None else ():
        kind = describe_feature(features.get(name))
        if kind in ("text", "texts") and name.lower() in CAPTION_NAMES:
            raise ValueError(
                f"{source}: --{FLAG} is {name!r}, by whose name it holds the captions themselves; name another column, "
                f"or name that of the captions with --caption_column."
            )


def check_templates(readers: Sequence[CaptionReader], image_column: str) -> None:
    """Raise ValueError for a template that makes texts of the column of images: of their bytes or their paths."""
    for reader in readers:
        if reader.is_template and image_column in reader.columns:
            raise ValueError(
                f"The template {reader.column!r} makes texts of {image_column!r}, which holds the images; name columns "
                f"of texts or labels in it."
            )


def negative_readers(
    source: str, features: Mapping[str, Any], named: Sequence[str], image_column: str, caption_column: str
) -> list[CaptionReader]:
    """Find the columns of a source that are named as wrong captions.

    Args:
        source: Its name.
        features: Its columns.
        named: Columns of texts or of lists of texts, or templates.
        image_column: Of its images.
        caption_column: Of its captions, or their template.

    Raises:
        ValueError: There is no such column, or it holds something else.
    """
    if caption_column in named:
        raise ValueError(
            f"{source}: --{FLAG} is {caption_column!r}, which holds the captions themselves; name a column of wrong "
            f"ones. `hf-clip mine-negatives` makes one."
        )
    columns = [find_caption_column(source, features, name, image_column, FLAG) for name in named]
    return [CaptionReader(source, column, features) for column in columns]


def read_negatives(readers: Sequence[CaptionReader], stored: Mapping[str, Any]) -> list[str]:
    """A row's wrong captions, of which there may be none.

    Raises:
        UnusableRowError: A template cannot be filled by what stands in the row.
    """
    found: list[str] = []
    for reader in readers:
        try:
            found += [text for text in reader(stored) if text]
        except MissingTextError:
            continue
        except UnusableRowError as error:
            raise UnusableRowError(f"of its negative captions: {error}") from error
    return list(dict.fromkeys(found))
