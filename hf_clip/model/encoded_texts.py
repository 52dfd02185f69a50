"""The output of the tokenizer: lists, columns, and the encodings of the library `tokenizers`.

Dimensions: T texts, L text length.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import numpy as np
from transformers import BatchEncoding

from .words import PlacedEncoding

COLUMNS: dict[str, Callable[[PlacedEncoding], Any]] = {
    "input_ids": lambda encoding: encoding.ids,
    "token_type_ids": lambda encoding: encoding.type_ids,
    "attention_mask": lambda encoding: encoding.attention_mask,
    "special_tokens_mask": lambda encoding: encoding.special_tokens_mask,
    "offset_mapping": lambda encoding: encoding.offsets,
    "length": len,
}
"""Fields of the output, and how each is read from an encoding, in the order of transformers."""


def as_lists(rows: dict[str, np.ndarray], padded: bool) -> dict[str, list[list[int]]]:
    """Convert ids and masks (T, L) to lists. Padding is removed if `padded` is False."""
    ids, mask = rows["input_ids"], rows["attention_mask"]
    if padded:
        return {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    flat, lengths = ids[mask == 1].tolist(), mask.sum(axis=1).tolist()
    ends = list(accumulate(lengths))
    return {
        "input_ids": [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)],
        "attention_mask": [[1] * length for length in lengths],
    }


def as_columns(parts: list[list[PlacedEncoding]], extras: Iterable[str], with_overflow: bool) -> dict[str, list[Any]]:
    """Convert encodings to the lists that a call returns, with one row per encoding."""
    rows = [(text, encoding) for text, several in enumerate(parts) for encoding in several]
    columns = {name: [COLUMNS[name](encoding) for _, encoding in rows] for name in COLUMNS if name in extras}
    return columns | ({"overflow_to_sample_mapping": [text for text, _ in rows]} if with_overflow else {})


def without_texts(extras: Iterable[str], rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the further fields for an empty list of texts: arrays without rows."""
    shape = rows["input_ids"].shape
    shapes = {"length": shape[:1], "offset_mapping": (*shape, 2)}
    return {name: np.zeros(shapes.get(name, shape), dtype=np.int64) for name in extras}


class EncodedTexts(BatchEncoding):
    """The output of a call. Ids and masks are there at once; the slow encodings are made when first asked for."""

    def __init__(self, data: dict[str, Any], encodings: Any, tensor_type: Any = None):
        super().__init__(data, tensor_type=tensor_type, n_sequences=1)
        self._encodings = encodings

    @property
    def _encodings(self) -> list[PlacedEncoding]:
        encodings = self.__dict__["made_encodings"]
        if callable(encodings):  # two threads may both make them, with the same result
            encodings = self.__dict__["made_encodings"] = encodings()
        return encodings

    @_encodings.setter
    def _encodings(self, encodings: Any) -> None:
        self.__dict__["made_encodings"] = encodings

    @property
    def is_fast(self) -> bool:
        return True
