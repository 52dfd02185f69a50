"""Search the page's index by what a visitor writes and uploads.

Invariant: a visitor sees thumbnails of the index and larger copies of its images, and no other file. What is written is
taken for a text even if it reads as a path.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..model.open_image import UNREADABLE, UnreadableImageError, open_image, open_raster
from ..search.image_index import ImageIndex, SearchResult
from ..search.index_table import shown_path
from ..search.query import AUTO, MINUS_WEIGHT, QueryPart, parse_query
from .page_labels import MOST_PIXELS, open_upload, small_copy
from .page_model import PageError, PageModel

MOST_RESULTS = 100
MOST_LETTERS = 2000

LARGE_SIDE = 768
"""Longer side of the selected image in the page, in pixels."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        title: What was looked for, in words.
        results: Best first.
    """

    title: str
    results: list[SearchResult]


def text_parts(text: str) -> list[QueryPart]:
    """Read a query of texts: one text, or an expression such as `2:"a beach" - "people"`.

    Raises:
        QueryError: An expression cannot be read.
        PageError: It is too long.
    """
    if len(text) > MOST_LETTERS:
        raise PageError(f"The query has {len(text):,} letters, and the page takes {MOST_LETTERS:,}: write less.")
    return parse_query(text, only_texts=True)  # a visitor is not told which files and folders there are


def query_parts(text: str = "", image: str | None = None, minus: str = "") -> tuple[list[QueryPart], str]:
    """The parts of a query, and how the page says what it looks for.

    Args:
        text: What a visitor wrote.
        image: A file that was sent.
        minus: What is subtracted.

    Raises:
        PageError: There is nothing to look for, or the image cannot be opened.
        QueryError: An expression cannot be read.
    """
    parts, said = [], []
    if text.strip():
        parts += text_parts(text)
        said.append(text.strip())
    if image is not None:
        open_upload(image)  # it is said in the page's own words what is wrong with it
        parts.append(QueryPart("image", image))
        said.append(os.path.basename(image))
    if not parts:
        raise PageError("There is nothing to look for: write a text, such as a dog on a beach, or drop an image.")
    title = " + ".join(said)
    if minus.strip():
        parts += [replace(part, weight=-MINUS_WEIGHT * part.weight) for part in text_parts(minus)]
        title += f" − {minus.strip()}"
    if not any(part.weight > 0 for part in parts):
        raise PageError("The query only subtracts: write what to look for, too.")
    return parts, title


def index_of(page: PageModel) -> ImageIndex:
    """The page's index. Raises PageError if it has none."""
    if (index := page.index) is None:
        raise PageError("This page has no index to search: start it with --index.")
    return index


def find_images(
    page: PageModel, parts: Sequence[QueryPart], title: str, top: int = 20, only_fitting: bool = True
) -> Found:
    """Search the index.

    Args:
        page: The model and its index.
        parts: Of the query, see `query_parts`.
        title: What is looked for, in words.
        top: Largest number of results.
        only_fitting: Whether results end where images no longer fit the query, see `ResultCutoff`.

    Raises:
        PageError: The page has no index, or the index no images.
        QueryError: The query cannot be used.
    """
    index = index_of(page)
    if len(index) == 0:
        raise PageError(f"The index {index.tables.place} has no images yet: `hf-clip index FOLDER` adds some.")
    cutoff = AUTO if only_fitting else None
    return Found(title, index.search(list(parts), top=max(1, min(int(top), MOST_RESULTS)), cutoff=cutoff))


def find_like(page: PageModel, result: SearchResult, top: int = 20, only_fitting: bool = True) -> Found:
    """Find the images of the index that are most like one of it, which is the first; see `find_images`.

    Raises:
        PageError: The index was made anew, and the image is another one there, or none.
    """
    known = index_of(page).tables.rows(["path_bytes"], f"id = {result.id}")["path_bytes"].to_pylist()
    if known != [os.fsencode(result.path)]:
        raise PageError("The index has changed since this search, and the image is no longer there: search again.")
    return find_images(page, [QueryPart("id", str(result.id))], f"more like {name_of(result)}", top, only_fitting)


def name_of(result: SearchResult) -> str:
    """What people know an image by: its caption, or the name of its file."""
    return result.caption or shown_path(os.path.basename(result.path.rstrip(os.sep)))


def large_copy(result: SearchResult) -> bytes:
    """A larger copy of an image of the index, or its thumbnail where the file is gone or a row of a data set."""
    if not os.path.isfile(result.path):
        return result.thumbnail
    try:
        with open_raster(result.path) as image:
            if image.width * image.height > MOST_PIXELS:
                return result.thumbnail
        return small_copy(open_image(result.path, draft=LARGE_SIDE // 2), LARGE_SIDE)
    except (UnreadableImageError, *UNREADABLE):
        return result.thumbnail


__all__ = ["Found", "find_images", "find_like", "large_copy", "name_of", "query_parts", "text_parts"]
