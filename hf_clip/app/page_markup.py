"""The parts of a page that are made anew for each answer, as HTML. All that a visitor or a file says is escaped."""

import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import Any

from ..model.checked_files import LONGEST_MESSAGE, one_line
from ..search.image_index import SearchResult
from ..search.index_table import shown_path
from ..search.indexed_image import TINY_SIDE
from ..search.result_output import BLANK, thumbnail_of
from .page_heat import HeatMap
from .page_labels import LabelledImage
from .page_queries import Found, name_of

SHOWN_SCORES = 10
"""Labels of an image that are shown at once; the others are folded."""

NONE_OF_THESE = "none of these"


def image_source(content: bytes) -> str:
    """An image as an address that holds it. Of an empty one nothing is shown, not even a sign that it is missing."""
    if not content:
        return BLANK
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def image_tag(content: bytes, alt: str, kind: str = "") -> str:
    """An image with its description, which may be empty for one that is described beside it."""
    return f'<img class="{kind}" src="{image_source(content)}" alt="{escape(alt)}">'


def problem(error: BaseException | str) -> str:
    """One line that says what is wrong, which a screen reader says at once."""
    return f'<p class="problem" role="alert">{escape(one_line(error, LONGEST_MESSAGE))}</p>'


def hint(text: str) -> str:
    """A quiet line, such as what an empty part of the page is for."""
    return f'<p class="hint">{escape(text)}</p>'


def bar(label: str | None, score: float, threshold: float, is_best: bool) -> str:
    """A label, a bar as long as its score, and the score."""
    name = NONE_OF_THESE if label is None else label
    kinds = ["bar", *(["none"] if label is None else []), *(["best"] if is_best else [])]
    kinds += ["below"] if score < threshold else []
    width = 100 * min(max(score, 0.0), 1.0)
    return (
        f'<li class="{" ".join(kinds)}" data-score="{score:.6f}"><span class="label">{escape(name)}</span>'
        f'<span class="track" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'
        f'<span class="score">{score:.3f}</span></li>'
    )


def label_cards(images: Sequence[LabelledImage], threshold: float) -> str:
    """A card for each image: the image, its name, and the bars of its labels, or why it cannot be opened."""
    cards = []
    for image in images:
        if image.problem is not None:
            cards.append(
                f'<article class="card"><div><h3>{escape(image.name)}</h3>{problem(image.problem)}</div></article>'
            )
            continue
        bars = [bar(label, score, threshold, is_best=place == 0) for place, (label, score) in enumerate(image.scores)]
        rest = bars[SHOWN_SCORES:]
        more = f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
        kind = "pixels" if image.longer_side <= TINY_SIDE else ""
        cards.append(
            f'<article class="card">{image_tag(image.shown, "", kind)}<div><h3>{escape(image.name)}</h3>'
            f'<ul class="bars">{"".join(bars[:SHOWN_SCORES])}</ul>{more}</div></article>'
        )
    return f'<div class="cards" style="--threshold:{100 * threshold:.1f}%">{"".join(cards)}</div>'


def count_of(number: int, what: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def share_of(result: SearchResult, best: float) -> float:
    """A result's score as a part of the best one's, which the cutoff is compared with. A cutoff of 0 hides nothing."""
    return max(result.score / best, 0.0) if best > 0 else 1.0


def _hit(place: int, result: SearchResult, best: float, cutoff: float) -> str:
    """A thumbnail as a button, with its score and the number of its near duplicates."""
    name, copies = name_of(result), len(result.duplicates)
    said = f"{name}, score {result.score:.3f}" + (f", {count_of(copies, 'near duplicate')}" if copies else "")
    badge = f'<span class="copies" title="{count_of(copies, "near duplicate")}">+{copies}</span>' if copies else ""
    kind = "pixels" if max(result.width, result.height) <= TINY_SIDE else ""
    share = share_of(result, best)
    return (
        f'<li data-share="{share:.6f}"{" hidden" if share < cutoff else ""}><button type="button" '
        f'data-place="{place}" aria-pressed="false" aria-label="{escape(said)}">'
        f'{image_tag(thumbnail_of(result), "", kind)}{badge}<span class="score">{result.score:.3f}</span>'
        f'<span class="name">{escape(name)}</span></button></li>'
    )


def result_grid(found: Found, cutoff: float = 0.0) -> str:
    """Thumbnails as buttons, best first.

    Args:
        found: What a search found.
        cutoff: Share of the best score below which an image is hidden, from 0 to 1.
    """
    if not found.results:
        return hint(f"No image of the index fits {found.title}. Without “Only images that fit”, the nearest are shown.")
    best = found.results[0].score
    hits = [_hit(place, result, best, cutoff) for place, result in enumerate(found.results)]
    hidden = sum(share_of(result, best) < cutoff for result in found.results)
    left_out = f", {hidden} hidden" if hidden else ""
    return (
        f'<h3 class="found" role="status">{count_of(len(hits), "image")} for {escape(found.title)}'
        f'<span class="left-out">{left_out}</span></h3><ul class="hits">{"".join(hits)}</ul>'
    )


def _metadata(result: SearchResult) -> list[tuple[str, str]]:
    """Other columns of a data set's row, where they are short."""
    try:
        columns = json.loads(result.metadata or "{}")
    except ValueError:
        return []
    return [(str(name), one_line(value, 200)) for name, value in columns.items() if not isinstance(value, (list, dict))]


def selected_image(result: SearchResult, shown: bytes) -> str:
    """The selected image, and what the index knows of it."""
    facts: list[tuple[str, Any]] = [("File", shown_path(result.path))]
    facts += [("Size", f"{result.width} × {result.height}")] if result.width else []
    facts += [("Caption", result.caption)] if result.caption else []
    facts += _metadata(result)
    facts += [("Score", f"{result.score:.4f}"), ("Number in the index", str(result.id))]
    copies = [shown_path(path) for path in result.duplicates]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts)
    if copies:
        listed = "".join(f"<li>{escape(path)}</li>" for path in copies)
        rows += f"<dt>{count_of(len(copies), 'near duplicate')}</dt><dd><ul>{listed}</ul></dd>"
    kind = "pixels" if max(result.width, result.height) <= TINY_SIDE else ""
    return f'<section class="chosen">{image_tag(shown, name_of(result), kind)}<dl>{rows}</dl></section>'


def how_to_index(model: str) -> str:
    """What the search tab says where there is no index."""
    command = f"hf-clip index FOLDER --model {model} --into my-index"
    start = f"hf-clip app {model} --index my-index"
    return (
        "<p>This page has no index. These two lines make one of a folder of your images, and open the page with it:</p>"
        f'<pre class="command"><code>{escape(command)}\n{escape(start)}</code></pre>'
    )


def heat_cards(maps: Sequence[HeatMap]) -> str:
    """A figure for each map."""
    figures = [
        f"<figure>{image_tag(each.shown, f'Map: {each.title}')}<figcaption>{escape(each.title)}"
        f"<small>{escape(each.note)}</small></figcaption></figure>"
        for each in maps
    ]
    return f'<div class="maps">{"".join(figures)}</div>'


__all__ = ["heat_cards", "how_to_index", "label_cards", "problem", "result_grid", "selected_image"]
