"""Results of a search for people and programs: lines of a terminal, JSON, a page, a sheet of thumbnails, copies."""

import html
import json
import os
import shutil
import unicodedata
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from ..checkpoints.whole_file import whole_file
from ..model.fetch import is_web_address
from ..model.open_image import UnreadableImageError, open_image
from .approximate_note import ApproximateScan
from .image_index import SearchResult
from .index_table import file_in_the_way, printable, shown_path
from .indexed_image import THUMBNAIL_SIDE, make_thumbnail

CELL, MARGIN, CAPTION_HEIGHT, COLUMNS = 160, 8, 30, 6
"""Of a sheet, in pixels and cells."""

FONTS = ("DejaVuSans.ttf", "Arial.ttf", "Arial Unicode.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf")
"""Of the system, for names of files on a sheet. The first that is there is taken."""

BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
"""An image of one transparent pixel."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 1rem; background: #fafafa; color: #222 }}
ul {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem; padding: 0 }}
li {{ list-style: none }}
a {{ color: inherit; text-decoration: none }}
img {{ width: 100%; height: 160px; object-fit: contain; background: #eee; border-radius: 6px }}
img.tiny {{ display: block; border-radius: 0; image-rendering: pixelated }}
small {{ display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }}
</style>
<h1>{title}</h1>
<ul>
{items}
</ul>
</html>
"""


def file_address(path: str) -> str:
    """A file:// address, which browsers and terminals open."""
    return "file://" + quote(os.fsencode(path))


def format_lines(results: Sequence[SearchResult], links: bool) -> list[str]:
    """A line for each result: score, id, path, and how many near duplicates it stands for.

    Args:
        results: Best first.
        links: Whether paths are links that a terminal opens (OSC 8).
    """
    width = max((len(str(result.id)) for result in results), default=0)
    lines = []
    for result in results:
        path = printable(result.path)
        shown = f"\x1b]8;;{file_address(result.path)}\x1b\\{path}\x1b]8;;\x1b\\" if links else path
        copies = len(result.duplicates)
        more = f"  (+{copies} near duplicate{'s' * (copies > 1)})" if copies else ""
        lines.append(f"{result.score:.4f}  {result.id:>{width}}  {shown}{more}")
    return lines


def as_json(results: Sequence[SearchResult], scan: ApproximateScan | None = None) -> str:
    """`{"results": [{"path", "score", "id", "width", "height", "duplicates", …}]}` and `"scan"` if it was not exact."""
    rows: list[dict[str, Any]] = []
    for result in results:
        row = {"path": shown_path(result.path), "score": round(result.score, 6), "id": result.id}
        row |= {"width": result.width, "height": result.height}
        row["duplicates"] = [shown_path(path) for path in result.duplicates]
        row |= {"caption": result.caption} if result.caption is not None else {}
        row |= {"metadata": json.loads(result.metadata)} if result.metadata is not None else {}
        rows.append(row)
    how = {} if scan is None else {"scan": {"kind": "approximate", "recall": scan.recall}}
    return json.dumps({"results": rows} | how, ensure_ascii=False, indent=2)


def thumbnail_of(result: SearchResult) -> bytes:
    """A result's thumbnail. If the index has none, it is made of the image's file; empty if that cannot be opened."""
    if result.thumbnail or not os.path.isfile(result.path):
        return result.thumbnail
    try:
        return make_thumbnail(open_image(result.path, draft=THUMBNAIL_SIDE))
    except UnreadableImageError:
        return b""


def whole_factor(width: int, height: int) -> int:
    """By how much a tiny image is enlarged to be seen: the largest whole factor with which it fits a cell."""
    return max(1, min(CELL // max(width, 1), CELL // max(height, 1)))


def _enlarged_on_page(thumbnail: bytes) -> str:
    """Attributes of a page's image that show a tiny one in whole pixels. Empty for others."""
    if not thumbnail:
        return ""
    with Image.open(BytesIO(thumbnail)) as image:
        width, height = (side * whole_factor(*image.size) for side in image.size)
        if image.size == (width, height):
            return ""
    above, beneath = (CELL - height) // 2, CELL - height - (CELL - height) // 2
    return f' class="tiny" style="width: {width}px; height: {height}px; margin: {above}px auto {beneath}px"'


def write_page(path: str | Path, results: Sequence[SearchResult], title: str) -> None:
    """Write a page with all thumbnails in it, which needs no other file."""
    items = []
    for result in results:
        name = html.escape(shown_path(os.path.basename(result.path)))
        thumbnail = thumbnail_of(result)
        source = f"data:image/jpeg;base64,{b64encode(thumbnail).decode()}" if thumbnail else BLANK
        where = result.path if is_web_address(result.path) else file_address(result.path)
        more = f" (+{len(result.duplicates)})" if result.duplicates else ""
        items.append(
            f'<li><a href="{html.escape(where)}" title="{html.escape(shown_path(result.path))}">'
            f'<img src="{source}" alt="{name}"{_enlarged_on_page(thumbnail)}>'
            f"<small>{result.score:.3f}{more} {name}</small></a></li>"
        )
    with whole_file(path) as unfinished:
        unfinished.write_text(
            PAGE.format(title=html.escape(shown_path(title)), items="\n".join(items)), encoding="utf-8"
        )


def draw_sheet(results: Sequence[SearchResult]) -> Image.Image:
    """A sheet of thumbnails with their scores and the names of their files, in rows."""
    columns = min(COLUMNS, max(1, len(results)))
    rows = -(-len(results) // columns)
    step = CELL + MARGIN
    sheet = Image.new("RGB", (columns * step + MARGIN, rows * (step + CAPTION_HEIGHT) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    font = _font()
    length_of = lambda text: pen.textlength(text, font)  # noqa: E731
    for number, result in enumerate(results):
        left = MARGIN + number % columns * step
        top = MARGIN + number // columns * (step + CAPTION_HEIGHT)
        content = thumbnail_of(result)
        with Image.open(BytesIO(content)) if content else Image.new("RGB", (CELL, CELL), "#eee") as image:
            factor = whole_factor(*image.size)
            thumbnail = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        sheet.paste(thumbnail, (left + (CELL - thumbnail.width) // 2, top + (CELL - thumbnail.height) // 2))
        more = f" +{len(result.duplicates)}" if result.duplicates else ""
        pen.text((left, top + CELL + 1), f"{result.score:.3f}{more}", fill="black", font=font)
        name = _short_name(_drawable(printable(os.path.basename(result.path)), font), length_of)
        pen.text((left, top + CELL + 14), name, fill="#555", font=font)
    return sheet


@cache
def _font() -> Any:
    """A font of the system, or Pillow's own, which has little more than the letters of English."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, 10)
        except OSError:  # there is no such font, or Pillow was built without FreeType
            continue
    return ImageFont.load_default()


def _drawable(name: str, font: Any) -> str:
    """A name in letters that the font has: without their marks if it lacks them, and else as `?`."""
    lacking = bytes(font.getmask("\uffff"))

    def has(letter: str) -> bool:
        return letter.isspace() or bytes(font.getmask(letter)) != lacking

    shown = ""
    for letter in unicodedata.normalize("NFC", name):  # macOS keeps marks apart from their letters
        plain = "ss" if letter == "ß" else unicodedata.normalize("NFKD", letter)[0]
        shown += letter if has(letter) else plain if all(map(has, plain)) else "?"
    return shown


def _short_name(name: str, length_of: Callable[[str], float]) -> str:
    """A name that fits a cell: its middle is left out, since beginning and end tell files apart."""
    kept, short = len(name), name
    while length_of(short) > CELL and kept > 2:
        kept -= 1
        short = f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"
    return short


def write_sheet(path: str | Path, results: Sequence[SearchResult]) -> None:
    """Write a sheet of thumbnails, whose format the file's name tells.

    Raises:
        ValueError: The name does not end as those of images do.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in ("PNG", "JPEG", "WEBP"):
        raise ValueError(
            f"A sheet of thumbnails cannot be written into {path}: name a file ending in .png, .jpg or .webp."
        )
    with whole_file(path) as unfinished:
        draw_sheet(results).save(unfinished, kind)


def copy_results(folder: str | Path, results: Sequence[SearchResult]) -> list[str]:
    """Copy the files of results into a folder, numbered by their rank.

    Returns:
        For each file that could not be copied a line that says why.
    """
    folder = Path(folder)
    if in_the_way := file_in_the_way(folder):
        raise NotADirectoryError(f"Results are copied into a folder, but {in_the_way} is a file: name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    width, failed = len(str(len(results))), []
    for rank, result in enumerate(results, start=1):
        target = folder / f"{rank:0{width}}-{os.path.basename(result.path)}"
        try:
            with whole_file(target) as unfinished:
                shutil.copy2(result.path, unfinished)
        except OSError as error:
            failed.append(f"{printable(result.path)}: {error.strerror or error}")
    return failed


__all__ = [
    "BLANK",
    "as_json",
    "copy_results",
    "draw_sheet",
    "format_lines",
    "thumbnail_of",
    "write_page",
    "write_sheet",
]
