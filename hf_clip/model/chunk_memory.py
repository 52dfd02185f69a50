"""The quick way to ids: what stands between white space is cut and merged once, and then remembered.

No word crosses white space, so the ids of a text are those of its chunks between white space, one after the other.

Threads read the memory without a lock: what they found in `numbers` is in `tables`, which is written first. One thread
learns at a time, and a fork waits for it, so that the child finds the memory whole and nobody at it.

Dimensions: T texts, A ids of all texts, F chunks, V vocabulary.
"""

import os
from itertools import chain
from threading import RLock

import numpy as np
from tokenizers import Tokenizer

from .bpe import END_OF_TEXT, END_OF_WORD, START_OF_TEXT, WORDS

BOUNDARY = "\0end_of_a_text\0"
"""A chunk that no text has: ftfy removes the character zero, and no entity gives it."""

MOST_CHUNKS = 1 << 18
"""Chunks that a tokenizer remembers: some 60 MB at most."""

MOST_CHARACTERS = 1 << 23
"""Characters of all these chunks together, of which long ones such as addresses have many."""

WORDS_AT_ONCE = 512

LEARNING = RLock()  # a fork within `learn` itself, by a finalizer, must not wait for itself
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LEARNING.acquire, after_in_parent=LEARNING.release, after_in_child=LEARNING.release)


class KnownChunks:
    """What is remembered until it is forgotten as a whole.

    numbers: chunk → its number, the boundary between texts being 0
    tables:  ids (A,), starts (F,), lengths (F,): all ids one after the other, and where each chunk's stand among them
    """

    def __init__(self) -> None:
        self.numbers = {BOUNDARY: 0}
        self.characters = 0
        nothing = np.zeros(1, dtype=np.int64)
        self.tables = (np.zeros(0, dtype=np.int64), nothing, nothing)


class ChunkMemory:
    """The ids of every chunk between white space that was met so far.

    ends_word (V,): whether a token is the last of its word, which its name tells
    """

    def __init__(self, merger: Tokenizer):
        self.merger = merger
        vocab = merger.get_vocab()
        self.ends_word = np.zeros(max(vocab.values()) + 1, dtype=bool)
        for token, number in vocab.items():
            self.ends_word[number] = token.endswith(END_OF_WORD) or token in (START_OF_TEXT, END_OF_TEXT)
        self.forget()

    def forget(self) -> None:
        self.known = KnownChunks()

    def look_up(self, chunks: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts given as chunks with boundaries between them (A,), and how many each text has (T,)."""
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
        """Cut and merge the chunks that are not known yet; when there are too many, the old ones are forgotten."""
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
        """The ids of words one after the other (A,), and how many each word has (words,).

        Many words go to Rust as one text: what a text costs there beyond its words is more than a word does.
        """
        texts = [words[start : start + WORDS_AT_ONCE] for start in range(0, len(words), WORDS_AT_ONCE)]
        encodings = self.merger.encode_batch_fast(texts, is_pretokenized=True, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64)
        counts = np.diff(np.flatnonzero(self.ends_word[ids]), prepend=-1)
        if len(counts) != len(words):  # a vocabulary learned from texts that spell the mark out
            encodings = self.merger.encode_batch_fast(
                [[word] for word in words], is_pretokenized=True, add_special_tokens=False
            )
            counts = np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
        return ids, counts
