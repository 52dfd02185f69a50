"""The fast way to ids: each chunk of text between white space is tokenized once, and its ids are remembered.

No word contains white space. The ids of a text are therefore the ids of its chunks, one after the other.

Threads read the memory without a lock. This is safe because a new chunk is written to `tables` first and to `numbers`
afterwards: a chunk that is found in `numbers` is always in `tables`. Only one thread adds chunks at a time. A fork
waits for it, so that the memory of the child process is complete and its lock is free.

Dimensions: T texts, A ids of all texts together, F remembered chunks, V vocabulary.
"""

import os
from itertools import chain
from threading import RLock

import numpy as np
from tokenizers import Tokenizer

from .bpe import END_OF_TEXT, END_OF_WORD, START_OF_TEXT, WORDS
from .repair_text import is_plain, prepare_each, repair_where_needed

BOUNDARY = "\0end_of_a_text\0"
"""Separates texts. No text contains it: ftfy removes the character U+0000, and no html entity stands for it."""

MOST_CHUNKS = 1 << 18
"""Largest number of chunks that a tokenizer remembers, which take at most about 60 MB."""

MOST_CHARACTERS = 1 << 23
"""Largest number of characters of all chunks together. Long chunks, such as URLs, would otherwise take much memory."""

WORDS_AT_ONCE = 512

LEARNING = RLock()  # reentrant: a finalizer may fork within `learn`, on the thread that holds it
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LEARNING.acquire, after_in_parent=LEARNING.release, after_in_child=LEARNING.release)


class KnownChunks:
    """The remembered chunks. When there are too many, they are all forgotten together.

    Attributes:
        numbers: From each chunk to its number. The boundary between texts has number 0.
        characters: Number of characters of all chunks.
        tables: Three arrays: the ids of all chunks one after the other; the place of each chunk's first id among them
            (F,); and the number of its ids (F,).
    """

    def __init__(self) -> None:
        self.numbers = {BOUNDARY: 0}
        self.characters = 0
        nothing = np.zeros(1, dtype=np.int64)
        self.tables = (np.zeros(0, dtype=np.int64), nothing, nothing)


class ChunkMemory:
    """Finds the ids of texts, and remembers those of each chunk.

    Args:
        merger: The Rust tokenizer that merges single words.

    Attributes:
        ends_word: (V,) bool: whether a token is the last one of a word, which its name shows.
    """

    def __init__(self, merger: Tokenizer):
        self.merger = merger
        vocab = merger.get_vocab()
        self.ends_word = np.zeros(max(vocab.values()) + 1, dtype=bool)
        self.ends_word[[number for token, number in vocab.items() if token.endswith(END_OF_WORD)]] = True
        self.ends_word[[vocab[token] for token in (START_OF_TEXT, END_OF_TEXT) if token in vocab]] = True
        self.forget()

    def forget(self) -> None:
        """Forget all chunks."""
        self.known = KnownChunks()

    def ids_of(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Find the ids of texts as they were given.

        Args:
            texts: T texts, repaired or not.

        Returns:
            The ids of all texts one after the other, without special tokens (A,), and the number of ids of each (T,).

        Raises:
            TextError: A text cannot be tokenized. Its `index` is the text's place.
        """
        if not texts:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if not is_plain("".join(texts)):
            texts = prepare_each(repair_where_needed, texts)
        # To lower a repaired text again changes nothing, and its only white space is single spaces.
        return self.look_up(f" {BOUNDARY} ".join(texts).lower().split())

    def look_up(self, chunks: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Find the ids of texts.

        Args:
            chunks: The chunks of all texts, with `BOUNDARY` between two texts.

        Returns:
            The ids of all texts one after the other (A,), and the number of ids of each text (T,).
        """
        known = self.known
        try:
            numbers = np.fromiter(map(known.numbers.__getitem__, chunks), np.int64, len(chunks))
        except KeyError:
            with LEARNING:
                known = self.learn(set(chunks))
            numbers = np.fromiter(map(known.numbers.__getitem__, chunks), np.int64, len(chunks))
        known_ids, starts, lengths = known.tables
        counts = lengths[numbers]  # ids of each chunk; none of a boundary
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        ids = known_ids[np.repeat(starts[numbers] - (ends - counts), counts) + np.arange(total)]
        texts_end = np.append(ends[numbers == 0], total)
        return ids, np.diff(texts_end, prepend=0)

    def learn(self, chunks: set[str]) -> KnownChunks:
        """Tokenize and remember chunks that are not known yet. If there are too many, all old ones are forgotten."""
        known = self.known
        new = list(chunks - known.numbers.keys())
        characters = sum(map(len, new))
        if len(known.numbers) + len(new) > MOST_CHUNKS or known.characters + characters > MOST_CHARACTERS:
            known = self.known = KnownChunks()
            new = list(chunks - known.numbers.keys())
            characters = sum(map(len, new))
        words = [WORDS.findall(chunk) for chunk in new]
        new_ids, counts = self.merge(list(chain.from_iterable(words)))
        chunk_of_word = np.repeat(np.arange(len(new)), np.fromiter(map(len, words), np.int64, len(new)))
        new_lengths = np.bincount(chunk_of_word, weights=counts, minlength=len(new)).astype(np.int64)
        ids, starts, lengths = known.tables
        new_starts = len(ids) + np.cumsum(new_lengths) - new_lengths
        known.characters += characters
        known.tables = (
            np.append(ids, new_ids),
            np.append(starts, new_starts),
            np.append(lengths, new_lengths),
        )
        known.numbers.update(zip(new, range(len(starts), len(starts) + len(new)), strict=True))
        return known

    def merge(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Merge words: returns their ids one after the other (A,), and the number of ids of each word.

        Many words are sent to Rust as one text, because each text costs more there than a word does.
        """
        texts = [words[start : start + WORDS_AT_ONCE] for start in range(0, len(words), WORDS_AT_ONCE)]
        encodings = self.merger.encode_batch_fast(texts, is_pretokenized=True, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64)
        counts = np.diff(np.flatnonzero(self.ends_word[ids]), prepend=-1)
        if len(counts) != len(words):  # the vocabulary was trained on texts that contain the mark itself
            encodings = self.merger.encode_batch_fast(
                [[word] for word in words], is_pretokenized=True, add_special_tokens=False
            )
            counts = np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
        return ids, counts
