"""Captions of images for people and programs: lines of a terminal, JSON."""

import json
from collections.abc import Iterator, Sequence

from .caption_bank import CaptionedImage
from .index_table import printable, shown_path


def format_captions(images: Sequence[CaptionedImage]) -> Iterator[str]:
    """For each image a line with its name, and one for each caption: score and text, `+` before a composed one."""
    for image in images:
        if image.error is not None:
            yield f"{printable(image.name)}  error: {printable(image.error)}"
            continue
        yield printable(image.name)
        for caption in image.captions:
            yield f"  {caption.score:.4f}  {printable(caption.text)}"
        if image.composed is not None:
            yield f"  {image.composed.score:.4f}  + {printable(image.composed.text)}"


def as_json_text(images: Sequence[CaptionedImage]) -> str:
    """`{"images": [{"path", "captions", "composed", "error"}]}`."""
    rows = [
        {
            "path": shown_path(image.name),
            "captions": [vars(caption) for caption in image.captions],
            "composed": None if image.composed is None else vars(image.composed),
            "error": image.error,
        }
        for image in images
    ]
    return json.dumps({"images": rows}, ensure_ascii=False, indent=2)


__all__ = ["as_json_text", "format_captions"]
