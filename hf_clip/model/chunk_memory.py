"""The fast way to ids: each chunk of text between white space is tokenized once, and its ids are remembered.

No word contains white space. The ids of a text are therefore the ids of its chunks, one after the other.

The ids of a chunk are remembered as bytes, and those of many texts are joined as bytes, which takes no arithmetic.

Threads read the memory without a lock, since a chunk and its ids are added in one step. Only one thread adds chunks
at a time. A fork waits for it, so that the memory of the child process is complete and its lock is free.

Dimensions: T texts, A ids of all texts together, V vocabulary.
"""

import os
from itertools import chain, pairwise
from threading import RLock

import numpy as np
from tokenizers import Tokenizer

from .bpe import END_OF_TEXT, END_OF_WORD, START_OF_TEXT, WORDS
from .freed_memory import return_freed_memory
from .repair_text import is_plain, prepare_each, repair_where_needed

BOUNDARY = "\0end_of_a_text\0"
"""Separates texts. No text contains it: ftfy removes the character U+0000, and no html entity stands for it."""

MOST_CHUNKS = 1 << 18
"""Largest number of chunks that a tokenizer remembers, which take at most about 60 MB."""

MOST_CHARACTERS = 1 << 23
"""Largest number of characters of all chunks together. Long chunks, such as URLs, would otherwise take much memory."""

WORDS_AT_ONCE = 512

TEXTS_AT_ONCE = 32
"""Number of texts that are searched together for characters that need repair."""

NO_ID = -1

LEARNING = RLock()  # reentrant: a finalizer may fork within `learn`, on the thread that holds it
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LEARNING.acquire, after_in_parent=LEARNING.release, after_in_child=LEARNING.release)


class KnownChunks:
    """The remembered chunks. When there are too many, they are all forgotten together.

    Attributes:
        ids: From each chunk to its ids, the bytes of int32. The boundary between texts has the id -1.
        characters: Number of characters of all chunks.
    """

    def __init__(self) -> None:
        self.ids = {BOUNDARY: np.int32(NO_ID).tobytes()}
        self.characters = 0


def repair_each(texts: list[str]) -> list[str]:
    """Repair those texts that need repair. Raises TextError with the place of one that cannot be repaired."""
    repaired: list[str] = []
    try:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[start : start + TEXTS_AT_ONCE]
            repaired += some if is_plain("".join(some)) else map(repair_where_needed, some)
    except Exception:
        return prepare_each(repair_where_needed, texts)
    return repaired


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
        del vocab
        return_freed_memory()  # the names of all tokens
        self.forget()

    def forget(self) -> None:
        """Forget all chunks."""
        self.known = KnownChunks()

    def ids_of(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Find the ids of texts as they were given.

        Args:
            texts: T texts, repaired or not.

        Returns:
            The ids of all texts one after the other, without special tokens (A,), and the number of ids of each (T,),
            both of whole numbers.

        Raises:
            TextError: A text cannot be tokenized. Its `index` is the text's place.
        """
        if not texts:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if not is_plain("".join(texts)):
            texts = repair_each(texts)
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
            joined = b"".join(map(known.ids.__getitem__, chunks))
        except KeyError:
            with LEARNING:
                known = self.learn(set(chunks))
            joined = b"".join(map(known.ids.__getitem__, chunks))
        ids = np.frombuffer(joined, dtype=np.int32)
        is_boundary = ids == NO_ID
        ends = np.append(np.flatnonzero(is_boundary), len(ids))
        return ids[~is_boundary], np.diff(ends, prepend=-1) - 1

    def learn(self, chunks: set[str]) -> KnownChunks:
        """Tokenize and remember chunks that are not known yet. If there are too many, all old ones are forgotten."""
        known = self.known
        new = list(chunks - known.ids.keys())
        characters = sum(map(len, new))
        if len(known.ids) + len(new) > MOST_CHUNKS or known.characters + characters > MOST_CHARACTERS:
            known = self.known = KnownChunks()
            new = list(chunks - known.ids.keys())
            characters = sum(map(len, new))
        words = [WORDS.findall(chunk) for chunk in new]
        new_ids, counts = self.merge(list(chain.from_iterable(words)))
        chunk_of_word = np.repeat(np.arange(len(new)), np.fromiter(map(len, words), np.int64, len(new)))
        new_lengths = np.bincount(chunk_of_word, weights=counts, minlength=len(new)).astype(np.int64)
        known.characters += characters
        joined = new_ids.astype(np.int32).tobytes()
        ends = (np.cumsum(new_lengths) * np.dtype(np.int32).itemsize).tolist()
        known.ids.update(zip(new, (joined[start:end] for start, end in pairwise([0, *ends])), strict=True))
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
