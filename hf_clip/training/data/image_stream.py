"""Images alone, wherever a user has them: folders and files, or a column of a data set.

Each comes with its name, which is its path, or its number in a data set. It is opened by whoever takes it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...data.columns import column_of, field_of, find_image_column
from ...data.images import ImagePlaces, find_image_places, image_content, open_content
from ...data.sources import describe_columns, folder_of, leave_undecoded, open_source, readable
from ...model.checked_files import one_line
from ...model.fetch import is_web_address
from ...model.open_image import open_image
from ...zero_shot.files import find_images, is_image_name

SAVED = ("dataset_dict.json", "state.json")
"""What a folder holds that `save_to_disk` of `datasets` wrote."""

LONGEST_SHOWN = 60


@dataclass(frozen=True)
class ImageItems:
    """Images to be opened.

    Attributes:
        items: Names, and what `opener` opens; they can be gone through once.
        opener: Opens one. Raises ValueError where that is no image.
        total: How many there are, or None where nobody knows.
        longest_name: The characters of the longest name, 60 at most.
    """

    items: Iterable[tuple[str, Any]]
    opener: Callable[[Any], Any]
    total: int | None
    longest_name: int


def is_data_set(place: str) -> bool:
    """Whether a place is a data set, and not an image or a folder of images.

    What is not there is a data set on the Hub, unless it is named as an image or begins as a path.
    """
    if is_web_address(place):
        return False
    if os.path.isdir(place):
        return any(os.path.isfile(os.path.join(place, name)) for name in SAVED)
    if folder_of(place) is not None:  # a data file, or a pattern of such
        return True
    return not os.path.exists(place) and not is_image_name(place) and not place.startswith((".", "/", "~"))


def find_image_items(
    places: Sequence[str],
    *,
    split: str | None = None,
    image_column: str | None = None,
    image_folders: Sequence[str] = (),
) -> ImageItems:
    """Find the images of folders, files and addresses, or of one data set.

    Args:
        places: What the user named.
        split: A data set's split; None is "train".
        image_column: The column of a data set that holds the images; None: the only one that can be it.
        image_folders: Folders outside of the data set's own whose images its rows may name.

    Raises:
        FileNotFoundError: A folder has no images, or there is no such data set.
        ValueError: The data set has no such split or column, or it is named together with other places.
    """
    is_forced = split is not None or image_column is not None
    sets = list(places) if is_forced else [place for place in places if is_data_set(place)]
    if not sets:
        names = find_images(places)
        longest = max(map(len, names))
        return ImageItems(((name, name) for name in names), open_image, len(names), min(longest, LONGEST_SHOWN))
    if len(places) > 1:
        raise ValueError(
            f"{sets[0]} is a data set, of which one can be read at a time, and nothing else beside it: name it alone."
        )
    table = _open_data_set(sets[0], split)
    features = describe_columns(table)
    column = find_image_column(sets[0], features, image_column)
    table = leave_undecoded(table, [column_of(column, features)])
    where = find_image_places(sets[0], folder_of(sets[0]), image_folders)
    counts = getattr(table.info, "splits", None) or {}
    total = counts[str(table.split)].num_examples if str(table.split) in counts else None
    items, opener = _rows(sets[0], table, column), partial(_open_stored, places=where)
    return ImageItems(items, opener, total, len(str(total or 10**6)))


def _open_data_set(place: str, split: str | None) -> Any:
    try:
        return open_source(place, split or "train", streaming=True)
    except FileNotFoundError as error:
        if os.path.exists(place):
            raise
        reason = one_line(error.__cause__ or error)
        raise FileNotFoundError(
            f"There is no folder or file {place!r}, and no data set of that name ({reason}). Name a folder of images, "
            f"image files or web addresses, or one data set."
        ) from error


def _rows(source: str, table: Any, column: str) -> Iterator[tuple[str, Any]]:
    """Each row's number and image. A file that is damaged further on is an error of one line, too."""
    with readable(source):
        for number, row in enumerate(table):
            yield str(number), field_of(row, column)


def _open_stored(stored: Any, places: ImagePlaces) -> Any:
    return open_content(image_content(stored, places))


__all__ = ["ImageItems", "find_image_items", "is_data_set"]
