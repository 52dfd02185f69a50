"""Queries: texts, images and images of the index, each with a weight, which are added up to one direction.

torch is imported by the functions that encode, so that a query that cannot be read is refused before that.

On a command line a query is written in one of two ways, which mean the same::

    "a red car" ./like-this.jpg --minus snow
    '"a red car" + ./like-this.jpg - "snow"'
    '2:"a beach" + ./b.jpg - 0.5:"people"'

Dimensions: D embedding.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.fetch import is_web_address
from ..zero_shot.files import is_image_name
from ..zero_shot.prompts import read_templates

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..zero_shot.plain_text_tower import PlainTextTower

TEMPLATES = ("a photo of {}.", "a picture of {}.", "an image of {}.", "{}", "a good photo of {}.", "a close-up of {}.")
"""What a short noun is put into. Their mean is steadier than any of them (Radford et al. 2021, section 3.1.4)."""

MOST_WORDS_OF_A_NOUN = 4

MINUS_WEIGHT = 0.5
"""Weight of what is subtracted with `--minus`: enough to push it down without changing what is searched."""


AUTO = "auto"
"""The cutoff that an index judges by itself."""


class QueryError(ValueError):
    """A query cannot be read, or has nothing in it."""


@dataclass(frozen=True)
class QueryPart:
    """A part of a query.

    Attributes:
        kind: "text", "image" (a path or an address), or "id" (an image of the index).
        value: The text, the path, or the number.
        weight: Below 0 for what is subtracted.
    """

    kind: str
    value: str
    weight: float = 1.0


PART = re.compile(
    r"\s*(?P<sign>[+-])?\s*(?:(?P<weight>\d+(?:\.\d+)?):)?(?:\"(?P<quoted>[^\"]*)\"|(?P<bare>(?:\\\s|[^\s\"])+))"
)


def parse_queries(words: Sequence[str], minus: Sequence[str] = (), more_like: Sequence[int] = ()) -> list[QueryPart]:
    """Read the words of a command line.

    Args:
        words: Each is a text, the path or address of an image, or an expression with quotation marks.
        minus: The same, subtracted.
        more_like: Ids of images of the index, added.

    Raises:
        QueryError: There is nothing to look for, or an expression cannot be read.
    """
    parts = [part for word in words for part in parse_query(word)]
    parts += [QueryPart("id", str(number)) for number in more_like]
    for word in minus:
        parts += [QueryPart(part.kind, part.value, -MINUS_WEIGHT * part.weight) for part in parse_query(word)]
    if not parts:
        raise QueryError('There is nothing to look for: give a text, such as "a dog on a beach", or an image.')
    if not any(part.weight > 0 for part in parts):
        raise QueryError("The query only subtracts: give a text or an image to look for, too.")
    return parts


def parse_query(text: str, only_texts: bool = False) -> list[QueryPart]:
    """Read one text, path, or expression. The name of a file that is there is a path, whatever it holds.

    Args:
        text: What was written.
        only_texts: Whether all parts are texts. No file is looked for then.

    Raises:
        QueryError: It is empty, or an expression that cannot be read.
    """
    if not text.strip():
        raise QueryError('A query is empty: give a text, such as "a dog on a beach", or an image.')
    is_file = not only_texts and os.path.isfile(os.path.expanduser(text.strip()))
    if '"' not in text or is_file:
        return [QueryPart("text", text.strip()) if only_texts else _part_of(text.strip(), 1.0)]
    parts: list[QueryPart] = []
    place = 0
    while place < len(text.rstrip()):
        found = PART.match(text, place)
        value = "" if found is None else found["quoted"] or found["bare"] or ""
        if found is None or not value.strip() or (parts and found["sign"] is None):
            raise QueryError(
                f"The query {text!r} cannot be read from {text[place:].strip()[:40]!r} on: write parts with + or - "
                f'between them, texts in quotation marks, and "\\ " for a space of a path, such as '
                f'2:"a beach" + ./my\\ photo.jpg - "people".'
            )
        weight = float(found["weight"] or 1) * (-1 if found["sign"] == "-" else 1)
        is_text = only_texts or found["quoted"] is not None
        parts.append(QueryPart("text", value, weight) if is_text else _part_of(re.sub(r"\\(\s)", r"\1", value), weight))
        place = found.end()
    return parts


def _part_of(word: str, weight: float) -> QueryPart:
    """A word without quotation marks: an image, or a text."""
    if os.sep in word and os.path.isdir(os.path.expanduser(word)):
        raise QueryError(f"{word} is a folder, but a query is a text or an image: name an image in it.")
    if os.sep in word and os.path.exists(place := os.path.expanduser(word)) and not os.path.isfile(place):
        raise QueryError(f"{word} is a pipe or a device, which may never end, but an image is needed: name its file.")
    is_path = os.path.isfile(os.path.expanduser(word)) or is_web_address(word)
    looks_like_one = is_image_name(word) and (os.sep in word or " " not in word)
    return QueryPart("image" if is_path or looks_like_one else "text", word, weight)


def is_short_noun(text: str) -> bool:
    """Whether a text reads as the name of a thing, which templates help, and not as a sentence."""
    words = text.split()
    return 0 < len(words) <= MOST_WORDS_OF_A_NOUN and text.strip()[-1].isalnum() and not text.strip()[0].isupper()


def encode_text_query(model: Any, processor: Any, text: str, templates: Any = None) -> "Tensor":
    """Encode one text, (D,) of length one. A short noun is put into templates.

    Args:
        model: HfClipModel.
        processor: Its processor.
        text: The text.
        templates: As for `ZeroShotClassifier`. None: `TEMPLATES` for short nouns, and else the text alone.
    """
    from torch.nn.functional import normalize

    from ..zero_shot.features import encode_texts

    prompts = _prompts_of(text, templates)
    return normalize(encode_texts(model, processor, prompts, truncation=True).mean(dim=0), dim=0).cpu()


def _prompts_of(text: str, templates: Any) -> list[str]:
    if templates is None:
        templates = TEMPLATES if is_short_noun(text) else ("{}",)
    functions, _ = read_templates(templates)
    return [function(text) for function in functions]


def encode_parts(
    model: Any, processor: Any, parts: Sequence[QueryPart], of_ids: Any, templates: Any = None
) -> "Tensor":
    """Encode each part of a query.

    Args:
        model: HfClipModel.
        processor: Its processor.
        parts: Its parts, as `parse_queries` returned them.
        of_ids: Function from a list of ids to their embeddings.
        templates: As for `encode_text_query`.

    Returns:
        (parts, D) float32, of length one.

    Raises:
        QueryError: An id is not in the index.
        UnreadableImageError: An image cannot be opened.
    """
    import torch
    from torch.nn.functional import normalize

    from ..zero_shot.features import encode_images

    found = []
    for part in parts:
        if part.kind == "text":
            found.append(encode_text_query(model, processor, part.value, templates))
        elif part.kind == "image":
            source = part.value if is_web_address(part.value) else os.path.expanduser(part.value)
            found.append(encode_images(model, processor, source)[0].cpu())
        else:
            found.append(normalize(_of_id(part, of_ids), dim=0))
    return torch.stack(found)


def encode_plain_parts(
    tower: "PlainTextTower | None", parts: Sequence[QueryPart], of_ids: Any, templates: Any = None
) -> "np.ndarray":
    """Encode each part of a query of texts and images of the index, without torch.

    Args:
        tower: The text tower. May be None if no part is a text.
        parts: Its parts, as `parse_queries` returned them.
        of_ids: Function from a list of ids to their embeddings.
        templates: As for `encode_text_query`.

    Returns:
        (parts, D) float32, of length one.

    Raises:
        QueryError: An id is not in the index.
    """
    import numpy as np

    found = []
    for part in parts:
        if part.kind == "text" and tower is not None:
            vector = tower.encode(_prompts_of(part.value, templates)).mean(axis=0)
        else:
            vector = np.asarray(_of_id(part, of_ids))
        found.append(vector / np.maximum(np.linalg.norm(vector), np.float32(1e-12)))
    return np.stack(found)


def _of_id(part: QueryPart, of_ids: Any) -> Any:
    try:
        return of_ids([int(part.value)])[0]
    except KeyError:
        raise QueryError(f"The index has no image with the id {part.value}; a search shows ids.") from None


def combine_parts(vectors: Any, weights: Sequence[float], sample: Any) -> Any:
    """Add the parts of a query up to one direction.

    Similarities of a text with images and of an image with images have different means and spreads, since texts and
    images lie apart (Liang et al. 2022, "Mind the gap"). What is added are therefore similarities in units of their
    spread over images of the index. This is linear in an image's embedding, so that it is one direction again.

    Args:
        vectors: (parts, D), of length one; a tensor or an array.
        weights: A weight for each part.
        sample: (images, D) embeddings of images of the index; a tensor or an array.

    Returns:
        (D,) float32, of length one; of the kind of `vectors`.

    Raises:
        QueryError: The parts cancel one another.
    """
    import numpy as np

    if len(vectors) == 1 and weights[0] > 0:
        return vectors[0]
    if not isinstance(vectors, np.ndarray):
        import torch

        wide = sample.float().numpy() if isinstance(sample, torch.Tensor) else sample
        return torch.from_numpy(combine_parts(vectors.numpy(), weights, wide))
    scores = np.asarray(sample, dtype=np.float32) @ vectors.T  # (images, parts)
    spread = scores.std(axis=0, ddof=1, dtype=np.float64).clip(min=1e-6) if len(scores) > 1 else np.ones(len(vectors))
    scaled = vectors * (np.asarray(weights) / spread).astype(np.float32)[:, None]
    total = scaled.sum(axis=0)
    length = float(np.linalg.norm(total))
    if not math.isfinite(length) or length < 1e-3 * float(np.linalg.norm(scaled, axis=1).max()):
        raise QueryError("The parts of the query cancel one another: give them other weights.")
    return total / np.float32(length)


def read_cutoff(word: str) -> str | float | None:
    """Read the cutoff of a command line: auto, off (None), or a score.

    Raises:
        ValueError: It is none of these.
    """
    if word.strip().lower() in ("auto", "off"):
        return AUTO if word.strip().lower() == "auto" else None
    try:
        score = float(word)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(
            f"The cutoff is {word!r}, but must be auto, off, or a score (cosine similarity), such as 0.25."
        )
    return score


__all__ = [
    "AUTO",
    "TEMPLATES",
    "QueryError",
    "QueryPart",
    "combine_parts",
    "encode_parts",
    "encode_plain_parts",
    "encode_text_query",
    "is_short_noun",
    "parse_queries",
    "parse_query",
    "read_cutoff",
]
