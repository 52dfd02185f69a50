"""Classify uploaded images by labels that a visitor writes.

Invariant: nothing that a visitor writes is ever taken for a path. Labels and templates on a command line may name
files; here they may not, since the files are the server's.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from ..model.open_image import UNREADABLE, UnreadableImageError, open_image, open_raster
from ..search.image_tags import BACKGROUND
from ..zero_shot.template_sets import TEMPLATE_SETS
from .page_model import PageError, PageModel

MOST_IMAGES = 32
MOST_LABELS = 1000
MOST_LETTERS = 100_000
"""Of all labels together."""
MOST_TEMPLATES = 100

MOST_PIXELS = 64_000_000
"""Of an image: 192 MB while it is open."""

SHOWN_SIDE = 320
"""Longer side of an uploaded image in the page, in pixels."""

BYTE_ORDER_MARK = "\ufeff"

OWN = "own"
TEMPLATE_CHOICES = {
    "simple": "a photo of a {}.",
    "{}": "the label alone",
    "imagenet_7": "7 templates, averaged",
    "imagenet_80": "80 templates, averaged (slower for many labels)",
    OWN: "my own templates",
}
"""What the page offers, and how it says so."""


@dataclass(frozen=True)
class LabelledImage:
    """What the page shows of one image.

    Attributes:
        name: Its file's name.
        longer_side: In pixels.
        shown: A small copy as PNG or JPEG.
        scores: Labels with scores, best first. The label None is "none of these".
        problem: Why the image cannot be opened, which has no scores then.
    """

    name: str
    longer_side: int
    shown: bytes
    scores: list[tuple[str | None, float]]
    problem: str | None = None


def is_visible(letter: str) -> bool:
    """Whether a letter is more than a space, a mark of direction, or another that has no form."""
    return letter.isprintable() and not letter.isspace()


def split_labels(text: str) -> list[str]:
    """Read labels: one a line, or with commas between them if all stand in one line.

    Repetitions are dropped, and so is what nobody would see, such as the mark with which a text file of Windows begins.

    Raises:
        PageError: There are none, or too many.
    """
    if len(text) > MOST_LETTERS:
        raise PageError(f"The labels have {len(text):,} letters, and the page takes {MOST_LETTERS:,}: give fewer.")
    text = text.replace(BYTE_ORDER_MARK, "")
    lines = text.strip().splitlines()
    parts = lines if len(lines) > 1 else text.split(",")
    labels = list(dict.fromkeys(label.strip() for label in parts if any(map(is_visible, label))))
    if not labels:
        raise PageError("There are no labels: write some, one on each line or with commas between them.")
    if len(labels) > MOST_LABELS:
        raise PageError(
            f"There are {len(labels):,} labels, and the page takes {MOST_LABELS:,}: give fewer, or use "
            f"`hf-clip classify`, which takes any number."
        )
    return labels


def chosen_templates(choice: str, own: str = "") -> list[str]:
    """The templates of a choice.

    Args:
        choice: A key of `TEMPLATE_CHOICES`.
        own: A template on each line, for "own".

    Raises:
        PageError: A template has no `{}`, or other braces.
    """
    if choice != OWN:
        return list(TEMPLATE_SETS.get(choice, ("{}",)))
    templates = [line.strip() for line in own.splitlines() if line.strip()]
    if not templates:
        raise PageError("There are no templates: write one on each line, such as: a drawing of a {}.")
    if len(templates) > MOST_TEMPLATES:
        raise PageError(f"There are {len(templates):,} templates, and the page takes {MOST_TEMPLATES}: give fewer.")
    for template in templates:
        # Other fields of `str.format` could ask for a text of any length.
        rest = template.replace("{}", "", 1)
        if "{}" not in template or "{" in rest or "}" in rest:
            raise PageError(
                f"The template {template[:80]!r} needs {{}} once, where the label belongs, and no other braces."
            )
    return templates


def open_upload(path: str) -> Image.Image:
    """Open a file that a visitor sent, upright.

    Raises:
        PageError: It is no image, damaged, or too large.
    """
    name = os.path.basename(path)
    try:
        with open_raster(path) as image:
            pixels = image.width * image.height
        if pixels > MOST_PIXELS:
            raise PageError(
                f"{name} has {pixels / 1e6:,.0f} million pixels, and the page takes {MOST_PIXELS / 1e6:.0f}: scale it "
                f"down."
            )
        return open_image(path)
    except PageError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, from which on it does not tell the size
        raise PageError(
            f"{name} has more than the {MOST_PIXELS / 1e6:.0f} million pixels that the page takes: scale it down."
        ) from None
    except (UnreadableImageError, *UNREADABLE):
        raise PageError(f"{name} cannot be opened: it is damaged, or no image. Choose another.") from None


def small_copy(image: Image.Image, side: int = SHOWN_SIDE) -> bytes:
    """A copy to show: JPEG, or PNG for what is small or transparent."""
    copy = image.convert("RGBA" if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info else "RGB")
    is_exact = max(copy.size) <= 64 or copy.mode == "RGBA"
    copy.thumbnail((side, side))
    file = BytesIO()
    copy.save(file, "PNG") if is_exact else copy.save(file, "JPEG", quality=80)
    return file.getvalue()


def label_images(
    page: PageModel,
    paths: Sequence[str] | None,
    labels: str,
    choice: str = "simple",
    own: str = "",
    with_none: bool = True,
) -> list[LabelledImage]:
    """Classify uploaded images.

    Args:
        page: The model.
        paths: Files that a visitor sent.
        labels: The labels, see `split_labels`.
        choice: Of the templates, a key of `TEMPLATE_CHOICES`.
        own: The visitor's templates.
        with_none: Whether an image may show none of the labels.

    Returns:
        One for each image. Of several, one that cannot be opened has a problem in place of scores.

    Raises:
        PageError: Nothing or too much was given, or a single image that cannot be opened.
        ValueError: A label cannot be tokenized, or is too long.
    """
    if not paths:
        raise PageError("There is no image: drop one, or choose a file.")
    if len(paths) > MOST_IMAGES:
        raise PageError(
            f"There are {len(paths)} images, and the page takes {MOST_IMAGES} at once: give fewer, or use "
            f"`hf-clip classify`, which takes whole folders."
        )
    classifier = page.classifier(split_labels(labels), chosen_templates(choice, own), BACKGROUND if with_none else ())
    found = []
    for path in paths:
        try:
            image = open_upload(path)
        except PageError as error:
            if len(paths) == 1:
                raise
            found.append(LabelledImage(os.path.basename(path), 0, b"", [], str(error)))
            continue
        ranked: list[dict[str, Any]] = classifier.classify([image])[0]
        scores = [(entry["label"], entry["score"]) for entry in ranked]
        found.append(LabelledImage(os.path.basename(path), max(image.size), small_copy(image), scores))
    return found


__all__ = [
    "LabelledImage",
    "chosen_templates",
    "label_images",
    "open_upload",
    "small_copy",
    "split_labels",
]
