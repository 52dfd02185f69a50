"""The settings of one call of the tokenizer: ids become rows with padding.

Dimensions: T texts, L text length, A ids of all texts together.
"""

from dataclasses import dataclass

import numpy as np

from .words import PlacedEncoding, Word, WordEncoder

MOST_COPIED = 128
"""Width from which on masks are computed row by row. Below, those of all lengths are few, and copied."""


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers of several ranges, one range after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


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
        cut = lengths - kept
        if cut.any():
            first = np.cumsum(lengths) - lengths + (0 if self.truncation_side == "left" else kept)
            ids = np.delete(ids, _ranges(first, cut))
        whole = kept + self.special
        width = self.width(int(whole.max(initial=self.special)))
        start = width - whole if self.padding_side == "left" else np.zeros_like(whole)
        rows = np.full((len(lengths), width), self.pad_id, dtype=np.int64)
        places, begin = rows.reshape(-1), start + width * np.arange(len(lengths))  # the same memory in one row
        places[_ranges(begin + self.special // 2, kept)] = ids
        if self.special:
            places[begin] = self.start_id
            places[begin + whole - 1] = self.end_id
        columns = np.arange(width)
        # Of each length one row, from which all are copied; where texts are long, each row is computed.
        known = np.arange(width + 1) if width < MOST_COPIED else whole
        is_left = self.padding_side == "left"
        mask = (columns >= width - known[:, None] if is_left else columns < known[:, None]).astype(np.int64)
        mask = np.take(mask, whole, axis=0) if width < MOST_COPIED else mask
        return {"input_ids": rows, "attention_mask": mask}

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
