"""Wrong captions of rows: which columns hold them, and what a row has of them.

They are read as captions are, and a row may have none. All that it has go into the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...data.columns import CaptionReader, MissingTextError, UnusableRowError, find_caption_column

FLAG = "negative_caption_column"


def without_columns(features: Mapping[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """The columns of a source among which those of images and of captions are looked for."""
    return {name: feature for name, feature in features.items() if name not in named}


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
