"""The dialect of Immich's machine-learning service: `POST /predict`, a form with `entries` and an image or a text.

    entries  {"clip": {"visual": {"modelName": "ViT-B-32__openai"}}}
    image    the file, for "visual"; or
    text     the text, for "textual"

The answer holds the embedding as a JSON text of its own, `{"clip": "[0.1,…]"}`, and for an image its size.

Immich names the model that it is set to. Its name is no name of ours, and is not compared with the served model's; but
if it is one of OpenAI's whose embeddings have another width, Immich's database could not take ours, and the request is
refused. The other tasks of Immich's service are not done here.
"""

import re
from typing import Any

import numpy as np
from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import to_json

from ..model.variants import VARIANTS
from .encoder import Encoded, ImageItem, Item, TextItem
from .json_values import check_values
from .request_error import RequestError

MOST_VALUES = 1000
"""Values in `entries`, of which one is used."""

TASK, VISUAL, TEXTUAL = "clip", "visual", "textual"


class ImmichEntry(BaseModel):
    """A model that Immich asks for.

    Attributes:
        modelName: Its name in Immich.
        options: Such as a language; they have no effect.
    """

    modelName: str  # noqa: N815 — Immich's spelling
    options: dict[str, Any] | None = None


class Entries(RootModel[dict[str, dict[str, ImmichEntry]]]):
    """Task → kind of model → model."""


def read_entries(text: str | bytes | None) -> tuple[str, str]:
    """Read the field `entries`.

    Returns:
        The kind of model, "visual" or "textual", and its name in Immich.

    Raises:
        RequestError: It is missing or malformed, or asks for another task than CLIP's.
    """
    if text is None:
        raise RequestError(422, "The field entries is missing.", param="entries")
    check_values(text.encode() if isinstance(text, str) else text, MOST_VALUES)
    try:
        entries = Entries.model_validate_json(text).root
    except ValidationError:
        raise RequestError(422, "Invalid request format: entries must be {task: {kind: {modelName}}}.") from None
    if others := sorted(entries.keys() - {TASK}):
        raise RequestError(
            400,
            f"This server does the task clip of Immich, and not {', '.join(others)[:80]}: give Immich the address of "
            f"its own service too, or turn these tasks off.",
        )
    kinds = entries.get(TASK, {})
    if kinds.keys() not in ({VISUAL}, {TEXTUAL}):
        raise RequestError(422, "Invalid request format: entries must ask for one of clip.visual and clip.textual.")
    return next((kind, entry.modelName) for kind, entry in kinds.items())


def check_width(name: str, width: int) -> None:
    """Raise RequestError if Immich is set to one of OpenAI's models with embeddings of another width."""
    known = {re.sub(r"[/@]", "-", key).removesuffix("px"): found.embed_dim for key, found in VARIANTS.items()}
    expected = known.get(name.removesuffix("__openai")) if name.endswith("__openai") else None
    if expected not in (None, width):
        raise RequestError(
            400,
            f"Immich is set to {name[:40]}, whose embeddings have {expected} numbers, but those of the served model "
            f"have {width}: choose a model with {width} in Immich's settings.",
        )


def item_of_form(kind: str, form: dict[str, str | bytes]) -> Item:
    """What to encode for a form.

    Raises:
        RequestError: It has no image or text, or not the one that fits.
    """
    image, text = form.get("image"), form.get("text")
    if image is None and text is None:
        raise RequestError(400, "Either image or text must be provided")
    if kind == VISUAL:
        if not isinstance(image, bytes):
            raise RequestError(400, "clip.visual needs the field image, with the file.", param="image")
        return ImageItem(image, "image")
    if image is not None or not isinstance(text, str):
        raise RequestError(400, "clip.textual needs the field text.", param="text")
    return TextItem(text, "text")


def as_json_text(row: np.ndarray) -> str:
    """A feature as the JSON text that Immich hands on to its database."""
    return to_json(row.tolist()).decode("ascii")


def predicted(encoded: Encoded) -> dict[str, Any]:
    """The body of the answer."""
    answer: dict[str, Any] = {TASK: as_json_text(encoded.features[0])}
    if encoded.sizes:
        width, height = encoded.sizes[0]
        answer |= {"imageHeight": height, "imageWidth": width}
    return answer


__all__ = ["check_width", "item_of_form", "predicted", "read_entries"]
