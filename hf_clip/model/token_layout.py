"""The output of the tokenizer: ids in rows with padding, and the encodings of the library `tokenizers`.

Dimensions: T texts, L text length, A ids of all texts together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from transformers import BatchEncoding

from .words import PlacedEncoding, Word, WordEncoder

COLUMNS: dict[str, Callable[[PlacedEncoding], Any]] = {
    "input_ids": lambda encoding: encoding.ids,
    "token_type_ids": lambda encoding: encoding.type_ids,
    "attention_mask": lambda encoding: encoding.attention_mask,
    "special_tokens_mask": lambda encoding: encoding.special_tokens_mask,
    "offset_mapping": lambda encoding: encoding.offsets,
    "length": len,
}
"""Fields of the output, and how each is read from an encoding, in the order of transformers."""


@dataclass(frozen=True)
class Layout:
    """The settings of one call: how ids become rows.

    Attributes:
        add_special_tokens: Whether start and end are added to each text.
        limit: Number of tokens to keep of each text, with start and end. None: all.
        truncation_side: Side on which tokens are cut, "left" or "right".
        is_padded: Whether rows are padded to one length.
        to_length: Least length of a padded row.
        multiple: The length of a padded row is a multiple of this.
        padding_side: Side on which padding is added, "left" or "right".
        start_id: Id of the start of text.
        end_id: Id of the end of text.
        pad_id: Id of the padding.
        pad_token: Token of the padding.
    """

    add_special_tokens: bool
    limit: int | None
    truncation_side: str
    is_padded: bool
    to_length: int
    multiple: int
    padding_side: str
    start_id: int
    end_id: int
    pad_id: int
    pad_token: str

    @property
    def special(self) -> int:
        """Number of special tokens per text."""
        return 2 if self.add_special_tokens else 0

    def width(self, longest: int) -> int:
        """Compute the length of a padded row from that of the longest text."""
        return -(-max(longest, self.to_length) // self.multiple) * self.multiple

    def arrange(self, ids: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Arrange ids in rows.

        Args:
            ids: (A,) ids of all texts one after the other, without special tokens.
            lengths: (T,) number of ids of each text.

        Returns:
            `input_ids` (T, L) and `attention_mask` (T, L), int64. Without texts, L is the length of an empty text.
        """
        kept = lengths if self.limit is None else np.minimum(lengths, max(self.limit - self.special, 0))
        if (kept < lengths).any():
            place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # within its text
            first = lengths - kept if self.truncation_side == "left" else np.zeros_like(lengths)
            ids = ids[(place >= np.repeat(first, lengths)) & (place < np.repeat(first + kept, lengths))]
        whole = kept + self.special
        width = self.width(int(whole.max(initial=self.special)))
        start = (width - whole if self.padding_side == "left" else np.zeros_like(whole))[:, None]  # (T, 1)
        columns = np.arange(width)
        mask = (columns >= start) & (columns < start + whole[:, None])  # (T, L)
        rows = np.full((len(lengths), width), self.pad_id, dtype=np.int64)
        body = mask
        if self.special:
            ends = start + whole[:, None] - 1
            body = mask & (columns > start) & (columns < ends)
            np.put_along_axis(rows, start, self.start_id, axis=1)
            np.put_along_axis(rows, ends, self.end_id, axis=1)
        rows[body] = ids
        return {"input_ids": rows, "attention_mask": mask.astype(np.int64)}

    def encode(self, encoder: WordEncoder, rows: list[list[Word]], stride: int = 0) -> list[list[PlacedEncoding]]:
        """Encode texts that are split into words.

        Args:
            encoder: The encoder.
            rows: The words of each text.
            stride: Number of tokens that each overflowing part repeats from the part before it.

        Returns:
            For each text its encoding up to `limit`, followed by the encodings of the overflowing parts.
        """
        encodings = encoder.encode(rows, self.add_special_tokens, self.limit, stride, self.truncation_side)
        if self.is_padded:
            width = self.width(max(map(len, encodings), default=self.special))
            for encoding in encodings:
                encoding.pad(width, direction=self.padding_side, pad_id=self.pad_id, pad_token=self.pad_token)
        return [
            [PlacedEncoding(part, words, encoder) for part in (encoding, *encoding.overflowing)]
            for encoding, words in zip(encodings, rows, strict=True)
        ]


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
