"""Texts in batches of about one length, as token ids, whatever encodes them.

Texts are tokenized some thousands at a time and sorted by length. A batch then holds texts of about one length and
needs little padding. Padding stands to the right of each text.

Dimensions: B batch, T texts, L text length.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..model.repair_text import TextError

TEXTS_AT_ONCE = 4096
"""Number of texts that are tokenized and sorted together. Only the ids of this many texts are in memory at once."""


class TextTooLongError(ValueError):
    """A text has more tokens than the text tower takes.

    Attributes:
        index: Place of the text among the given texts, from 0. For a prompt: place of its label, where the background
            labels are counted after the labels.
        length: Number of tokens in the text, with start and end.
        limit: Number of tokens that the text tower takes.
        text: The text.
        is_prompt: Whether the text was made of a label and a template.
    """

    def __init__(self, text: str, index: int, length: int, limit: int):
        super().__init__(text, index, length, limit)
        self.text, self.index, self.length, self.limit = text, index, length, limit
        self.is_prompt = False

    def __str__(self) -> str:
        if self.is_prompt:
            name, advice = f"The prompt {self.text[:200]!r}", "Shorten the label or the template."
        else:
            name = f"texts[{self.index}] ({self.text[:80]!r})"
            advice = "Shorten it, or pass truncation=True, which keeps the end of the text marked."
        return f"{name} has {self.length} tokens, start and end included, but the model takes {self.limit}. {advice}"


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1.")


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in lists of `size`; the last list may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def tokenize(
    tokenizer: Any, limit: int, texts: list[str], settings: dict[str, Any], first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize texts and pad them on the right.

    Args:
        tokenizer: HfClipTokenizer, or another of its kind.
        limit: Number of tokens that the text tower takes.
        texts: B texts.
        settings: Arguments for the tokenizer, e.g. `{"truncation": True}`.
        first: Place of the first text among all texts of the caller. Errors count from it.

    Returns:
        The ids (B, L) and the length of each text in tokens (B,), both int64.

    Raises:
        TextError: A text cannot be tokenized.
        TextTooLongError: A text is too long, and the settings do not ask for truncation.
    """
    for place, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise ValueError(f"texts[{place}] is {text!r:.60}, a {type(text).__name__}, but a text is needed.")
    limit = min(tokenizer.model_max_length, limit)
    settings = settings | {"padding": True, "padding_side": "right", "return_tensors": "np"}
    is_cut = settings.get("truncation") not in (None, False, "do_not_truncate")
    if not is_cut:
        settings |= {"truncation": True, "max_length": limit + 1}  # one token more than fits shows a long text
    try:
        tokens = tokenizer(texts, **settings)
    except TextError as error:
        if error.index is not None:
            error.text, error.index = texts[error.index], first + error.index
        raise
    lengths = tokens["attention_mask"].sum(axis=1)
    if not is_cut and (too_long := lengths > limit).any():
        row = int(too_long.argmax())
        length = 2 + len(tokenizer([texts[row]], add_special_tokens=False, padding=False)["input_ids"][0])
        raise TextTooLongError(texts[row], first + row, length, limit)
    return tokens["input_ids"], lengths


def check_texts(tokenizer: Any, limit: int, texts: Iterable[str], total: int, settings: dict[str, Any]) -> None:
    """Tokenize all texts once before any is encoded, so that a bad text is an error now and not after hours.

    Does nothing for up to `TEXTS_AT_ONCE` texts: `text_batches` tokenizes those before it yields any.
    """
    if total <= TEXTS_AT_ONCE:
        return
    first = 0
    for chunk in in_batches(texts, TEXTS_AT_ONCE):
        tokenize(tokenizer, limit, chunk, settings, first)
        first += len(chunk)


def text_batches(
    tokenizer: Any, limit: int, texts: Iterable[str], *, batch_size: int, settings: dict[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokenize texts and put those of about one length into a batch, shorter ones first.

    At most `TEXTS_AT_ONCE` texts are in memory at a time.

    Yields:
        For each batch the places of its texts (B,), and their ids (B, L), both int64.
    """
    first = 0
    for chunk in in_batches(texts, TEXTS_AT_ONCE):
        ids, lengths = tokenize(tokenizer, limit, chunk, settings, first)
        order = lengths.argsort(kind="stable")
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows + first, ids[rows, : int(lengths[rows].max())]
        first += len(chunk)
