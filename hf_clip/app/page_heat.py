"""Look inside an image: where a text is, and what the image tower attends to.

Dimensions: T texts, Y × X cells.
"""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..zero_shot.attention_rollout import attention_rollout
from ..zero_shot.heat_overlay import overlay
from ..zero_shot.relevance import relevance_map
from ..zero_shot.text_batches import TextTooLongError
from .page_labels import open_upload, small_copy
from .page_model import PageError, PageModel

MOST_TEXTS = 6
VIEW_SIDE = 448
"""Longer side of an image that is shown below a map, in pixels."""

DETAILS = {"as trained": 1, "twice as fine": 2, "four times as fine": 4}
"""How many times as many cells a map has along each side."""


@dataclass(frozen=True)
class HeatMap:
    """A map over an image.

    Attributes:
        title: The text, or what the map is of.
        shown: The image with the map over it.
        note: What the colours stand for.
    """

    title: str
    shown: bytes
    note: str


def split_texts(text: str) -> list[str]:
    """Read texts, one a line. Raises PageError if there are too many."""
    texts = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(texts) > MOST_TEXTS:
        raise PageError(f"There are {len(texts)} texts, and the page shows {MOST_TEXTS} maps: give fewer.")
    return texts


def view_of(image: Image.Image, side: int = VIEW_SIDE) -> Image.Image:
    """An image at a size to look at. Small ones are enlarged with sharp pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def look_inside(page: PageModel, path: str | None, texts: str, detail: str = "as trained") -> list[HeatMap]:
    """Draw a map of each text over an image, and one of what the image tower attends to, behind the image itself.

    The texts' maps share their colours, so that a text that is nowhere in the image has none.

    Args:
        page: The model.
        path: A file that a visitor sent.
        texts: A text on each line. Without one, only the attention is shown.
        detail: A key of `DETAILS`.

    Raises:
        PageError: There is no image, it cannot be opened, or there are too many texts, or too long ones.
        ValueError: A text cannot be tokenized.
    """
    if path is None:
        raise PageError("There is no image: drop one, or choose a file.")
    looked_for = split_texts(texts)
    image = open_upload(path)
    size = page.model.config.vision_config.image_size * DETAILS.get(detail, 1)
    how: dict[str, Any] = {"processor": page.processor, "image_size": size}
    view = view_of(image)
    found = [HeatMap("the image", small_copy(view, VIEW_SIDE), "the model sees what is not dark in the maps")]
    view = view.convert("L")  # so that all colours are the map's
    if looked_for:
        try:
            maps = relevance_map(page.model, page.processor, image, looked_for, image_size=size).cpu()
        except TextTooLongError as error:
            raise PageError(
                f"The text {error.text[:80]!r} has {error.length:,} tokens, start and end included, but the model "
                f"takes {error.limit}: shorten it."
            ) from None
        low, high = float(maps.min()), float(maps.max())
        for text, heat in zip(looked_for, maps, strict=True):
            drawn = overlay(view, heat, **how, low=low, high=high)
            note = f"similarity {heat.min():.2f} to {heat.max():.2f}; the lightest colour is {high:.2f}"
            found.append(HeatMap(text, small_copy(drawn, VIEW_SIDE), note.replace("-", "−")))
    shares = attention_rollout(page.model, page.processor, image, image_size=size).cpu()
    cells = f"{shares.shape[0]} × {shares.shape[1]} cells"
    is_vit = hasattr(page.model.vision_model, "encoder")
    title = "attention, through all layers" if is_vit else "attention of the pool"
    note = f"where the image's feature comes from, whatever the text; {cells}"
    found.append(HeatMap(title, small_copy(overlay(view, shares, **how), VIEW_SIDE), note))
    return found


__all__ = ["DETAILS", "HeatMap", "look_inside", "split_texts"]
