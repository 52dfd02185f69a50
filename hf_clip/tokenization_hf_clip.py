"""CLIP's tokenizer as transformers has them, exact for every string, and fast.

What makes it fast: a text of printable ASCII without an ampersand needs no repair but lower case; and since no word
crosses white space, the ids of a text are those of its chunks between white space, one after the other, so every
distinct chunk is cut and merged once and then remembered.
"""

import json
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Tokenizer, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy
from transformers.utils import cached_file

from .bpe_hf_clip import (
    END_OF_TEXT,
    END_OF_WORD,
    FIXED_IDS,
    OPENAI_VOCAB_SIZE,
    START_OF_TEXT,
    WORDS,
    PlacedEncoding,
    build_backend,
    byte_alphabet,
    check_vocab_size,
    is_plain,
    merging_backend,
    prepare_text,
    read_merges,
    repair_where_needed,
    words_of,
)
from .configuration_hf_clip import HUB_ARGUMENTS, HubUpload
from .files_hf_clip import TOKENIZER_CHECKS, check_tokenizer_file, find_files, in_one_kind, read_vocabulary

BOUNDARY = "\0end_of_a_text\0"
"""A chunk that no text has: ftfy removes the character zero, and no entity gives it."""

MOST_CHUNKS = 1 << 18
"""Chunks that a tokenizer remembers: some 60 MB at most."""

WORDS_AT_ONCE = 512


class ChunkMemory:
    """The ids of every chunk between white space that was met so far.

    numbers: chunk → its number, the boundary between texts being 0
    ids (N,), starts (C,), lengths (C,): all ids one after the other, and where each chunk's stand among them
    ends_word (V,): whether a token is the last of its word, which its name tells
    """

    def __init__(self, merger: Tokenizer):
        self.merger = merger
        self.lock = Lock()
        vocab = merger.get_vocab()
        self.ends_word = np.zeros(max(vocab.values()) + 1, dtype=bool)
        for token, number in vocab.items():
            self.ends_word[number] = token.endswith(END_OF_WORD) or token in (START_OF_TEXT, END_OF_TEXT)
        self.forget()

    def forget(self) -> None:
        self.numbers = {BOUNDARY: 0}
        self.ids = np.zeros(0, dtype=np.int64)
        self.starts = self.lengths = np.zeros(1, dtype=np.int64)

    def look_up(self, chunks: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts given as chunks with boundaries between them (N,), and how many each text has (B,)."""
        with self.lock:  # another thread may learn, or forget
            try:
                numbers = np.fromiter(map(self.numbers.__getitem__, chunks), np.int64, len(chunks))
            except KeyError:
                self.learn(set(chunks))
                numbers = np.fromiter(map(self.numbers.__getitem__, chunks), np.int64, len(chunks))
            known_ids, starts, lengths = self.ids, self.starts, self.lengths
        counts = lengths[numbers]  # ids of each chunk; none of a boundary
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        ids = known_ids[np.repeat(starts[numbers] - (ends - counts), counts) + np.arange(total)]
        texts_end = np.append(ends[numbers == 0], total)
        return ids, np.diff(texts_end, prepend=0)

    def learn(self, chunks: set[str]) -> None:
        """Cut and merge the chunks that are not known yet; when there are too many, the old ones are forgotten."""
        if len(self.numbers) + len(chunks) > MOST_CHUNKS:
            self.forget()
        new = list(chunks - self.numbers.keys())
        words = [WORDS.findall(chunk) for chunk in new]
        ids, counts = self.merge(list(chain.from_iterable(words)))
        chunk_of_word = np.repeat(np.arange(len(new)), np.fromiter(map(len, words), np.int64, len(new)))
        lengths = np.bincount(chunk_of_word, weights=counts, minlength=len(new)).astype(np.int64)
        self.starts = np.append(self.starts, len(self.ids) + np.cumsum(lengths) - lengths)
        self.lengths = np.append(self.lengths, lengths)
        self.ids = np.append(self.ids, ids)
        self.numbers.update(zip(new, range(len(self.numbers), len(self.starts)), strict=True))

    def merge(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of words one after the other (N,), and how many each word has (W,).

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


def check_texts(text: Any) -> list[str]:
    """A text, or a list or tuple of texts, as a list; anything else is refused with its place."""
    if isinstance(text, str):
        return [text]
    if not isinstance(text, (list, tuple)):
        raise ValueError(f"HfClipTokenizer got {type(text).__name__}, but a text or a list of texts is needed.")
    if len(text) == 0:
        raise ValueError("HfClipTokenizer got an empty list of texts; pass at least one text.")
    for index, item in enumerate(text):
        if not isinstance(item, str):
            raise ValueError(f"Text {index} is a {type(item).__name__}, but a list of texts is needed: {item!r:.60}.")
    return list(text)


def as_lists(rows: dict[str, np.ndarray], padded: bool) -> dict[str, list[list[int]]]:
    """Rows of ids and masks (B, L) as lists; without padding, if there shall be none."""
    ids, mask = rows["input_ids"], rows["attention_mask"]
    if padded:
        return {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    flat, lengths = ids[mask == 1].tolist(), mask.sum(axis=1).tolist()
    ends = list(accumulate(lengths))
    return {
        "input_ids": [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)],
        "attention_mask": [[1] * length for length in lengths],
    }


def read_backend(source: Any, hub: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of a repository without tokenizer.json, from its vocab.json and merges.txt; None if it has none.

    Raises ValueError for another model's vocabulary.
    """
    names = ("tokenizer.json", "vocab.json", "merges.txt")
    try:
        whole, *found = [cached_file(source, n, _raise_exceptions_for_missing_entries=False, **hub) for n in names]
    except OSError:
        return None
    if whole is not None or None in found:
        return None
    vocab = read_vocabulary(found[0])
    backend = build_backend(read_merges(found[1], len(vocab)))
    if backend.get_vocab() != vocab:
        raise ValueError(f"The vocab.json of {source} numbers its tokens otherwise than CLIP's tokenizer does.")
    return backend


class EncodedTexts(BatchEncoding):
    """Ids and masks at once; `tokenizers`' encodings, which few ask for and which take long, when first asked for."""

    def __init__(self, data: dict[str, Any], encodings: Any, tensor_type: Any = None):
        super().__init__(data, tensor_type=tensor_type, n_sequences=1)
        self._encodings = encodings

    @property
    def _encodings(self) -> list[PlacedEncoding]:
        if callable(self.__dict__["made_encodings"]):
            self.__dict__["made_encodings"] = self.__dict__["made_encodings"]()
        return self.__dict__["made_encodings"]

    @_encodings.setter
    def _encodings(self, encodings: Any) -> None:
        self.__dict__["made_encodings"] = encodings

    @property
    def is_fast(self) -> bool:
        return True


# diffusers finds out how to load a component by looking for this base class, under this name, in its module.
class HfClipTokenizer(HubUpload, PreTrainedTokenizerFast):
    """CLIP's tokenizer: ids equal OpenAI's, in batches, padded to the longest text by default.

    Calling it returns `input_ids` and `attention_mask`, each (B, L) with `return_tensors`, else lists together with
    `tokenizers`' encodings. Padding stands on the right and repeats the end of text. A text longer than
    `model_max_length` (77) is an error unless `truncation=True`, which keeps the end-of-text token. Offsets refer to
    the text as it is cut: a plain one as it was given, any other as it was repaired (`prepare_text`).
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"
    _word_tokenizer: tuple[Any, PreTrainedTokenizerFast] | None = None
    _memory: ChunkMemory | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers; repositories that have vocab.json and merges.txt alone too."""
        source = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        for path in find_files(source, TOKENIZER_CHECKS, hub):
            TOKENIZER_CHECKS.get(path.name, check_tokenizer_file)(path)
        try:
            with in_one_kind(source):
                return super().from_pretrained(source, *args, **kwargs)
        except (OSError, ValueError):
            backend = None if "tokenizer_object" in kwargs else read_backend(source, hub)
            if backend is None:
                raise
        with in_one_kind(source):
            return super().from_pretrained(source, *args, tokenizer_object=backend, **kwargs)

    @classmethod
    def from_merges(cls, merges: list[tuple[str, str]], model_max_length: int = 77) -> "HfClipTokenizer":
        """Build a tokenizer from BPE merges, most frequent first, in OpenAI's order of ids."""
        return cls(
            tokenizer_object=build_backend(merges),
            bos_token=START_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            unk_token=END_OF_TEXT,
            model_max_length=model_max_length,
            clean_up_tokenization_spaces=False,
        )

    @classmethod
    def from_vocabulary_file(
        cls, path: str | Path, vocab_size: int = OPENAI_VOCAB_SIZE, model_max_length: int = 77
    ) -> "HfClipTokenizer":
        """Build OpenAI's tokenizer from its published vocabulary file, `bpe_simple_vocab_16e6.txt.gz`.

        Raises FileNotFoundError or ValueError when the file is missing or is something else.
        """
        return cls.from_merges(read_merges(path, vocab_size), model_max_length)

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, model_max_length: int = 77
    ) -> "HfClipTokenizer":
        """Learn a vocabulary of at most `vocab_size` ids, of which bytes and special tokens take 514."""
        check_vocab_size(vocab_size)
        backend = build_backend([])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=byte_alphabet(),
            end_of_word_suffix=END_OF_WORD,
            show_progress=False,
        )
        backend.train_from_iterator((prepare_text(text) for text in texts), trainer)
        learned = json.loads(backend.to_str())["model"]["merges"]
        merges = [(left, right) for left, right in learned]
        return cls.from_merges(merges[: vocab_size - FIXED_IDS], model_max_length)

    def __call__(self, text: Any = None, *args: Any, padding: Any = True, **kwargs: Any) -> BatchEncoding:
        return super().__call__(text, *args, padding=padding, **kwargs)

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """What every call of a tokenizer comes down to in transformers."""
        if text_pair is not None:
            raise ValueError(
                "HfClipTokenizer got a pair of texts, but CLIP reads single ones; join them, or pass a list."
            )
        if is_split_into_words:
            raise ValueError("HfClipTokenizer cuts words itself; pass whole texts, without is_split_into_words=True.")
        texts = check_texts(text)
        padded = padding_strategy != PaddingStrategy.DO_NOT_PAD
        truncated = truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE

        def encode_by_words(**more: Any) -> BatchEncoding:
            return self._encode_by_words(
                texts,
                truncated=truncated,
                add_special_tokens=add_special_tokens,
                padding_strategy=padding_strategy,
                truncation_strategy=truncation_strategy,
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side or self.padding_side,
                return_attention_mask=return_attention_mask,
                **more,
            )

        asks_for_more = any(value for name, value in kwargs.items() if name not in ("verbose", "stride"))
        if asks_for_more or self._added_tokens() or (return_tensors is not None and not padded):
            encoded = encode_by_words(**kwargs)
            data, encodings = encoded.data, encoded.encodings or []
        else:
            ids, lengths = self._ids_of(texts)
            self._refuse_too_long(lengths, truncated, add_special_tokens)
            special = 2 if add_special_tokens else 0
            limit = (max_length or self.model_max_length) if truncated else None
            to_length = (max_length or self.model_max_length) if padding_strategy == PaddingStrategy.MAX_LENGTH else 0
            on_left = (padding_side or self.padding_side) == "left"
            data = self._arrange(ids, lengths, special, limit, to_length, pad_to_multiple_of or 1, on_left)
            if return_tensors is None:
                data = as_lists(data, padded)
            elif return_tensors == "pt":
                import torch

                data = {name: torch.from_numpy(values) for name, values in data.items()}  # which copies nothing
            if return_attention_mask is False:
                del data["attention_mask"]
            encodings = lambda: encode_by_words().encodings  # noqa: E731
        if isinstance(text, str) and return_tensors is None and "overflow_to_sample_mapping" not in data:
            data = {name: value[0] for name, value in data.items()}
        return EncodedTexts(data, encodings, tensor_type=return_tensors)

    def _encode_by_words(
        self, texts: list[str], truncated: bool, add_special_tokens: bool, **kwargs: Any
    ) -> BatchEncoding:
        """Lists and encodings, as a stock tokenizer makes them of words; slower, and for everything it can be asked."""
        added = self._added_tokens()
        words = [words_of(item, added) for item in texts]
        encoded = self._by_words()._encode_plus(
            [[word for word, _ in row] for row in words],
            add_special_tokens=add_special_tokens,
            is_split_into_words=True,
            **kwargs,
        )
        lengths = np.array([sum(encoding.attention_mask) for encoding in encoded.encodings or []])
        self._refuse_too_long(lengths - 2 * add_special_tokens, truncated, add_special_tokens)
        texts_of_rows = encoded.get("overflow_to_sample_mapping", range(len(texts)))
        placed = [
            PlacedEncoding(encoding, words[row])
            for row, encoding in zip(texts_of_rows, encoded.encodings or [], strict=True)
        ]
        if "offset_mapping" in encoded:
            encoded["offset_mapping"] = [encoding.offsets for encoding in placed]
        return EncodedTexts(encoded.data, placed)

    def _added_tokens(self) -> list[str]:
        """Tokens that were added to the published ones, longest first."""
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        return sorted(added - {START_OF_TEXT, END_OF_TEXT}, key=len, reverse=True)

    def _by_words(self) -> PreTrainedTokenizerFast:
        """A stock tokenizer for texts that have been cut into words: it merges, truncates, pads and converts."""
        state = (self._tokenizer.get_vocab_size(), self.pad_token, self.truncation_side, self.model_max_length)
        if self._word_tokenizer is None or self._word_tokenizer[0] != state:
            inner = PreTrainedTokenizerFast(
                tokenizer_object=merging_backend(self._tokenizer),
                pad_token=self.pad_token,
                truncation_side=self.truncation_side,
                model_input_names=self.model_input_names,
            )
            self._word_tokenizer = (state, inner)
        return self._word_tokenizer[1]

    def _ids_of(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after the other and without special tokens (N,), and how many each has (B,)."""
        if not is_plain("".join(texts)):
            texts = list(map(repair_where_needed, texts))
        # Lower case stays as it is when lowered again, and repaired text has no white space but single spaces.
        chunks = f" {BOUNDARY} ".join(texts).lower().split()
        memory = self._memory
        if memory is None:
            memory = self._memory = ChunkMemory(merging_backend(self._tokenizer))
        return memory.look_up(chunks)

    def _arrange(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        special: int,
        limit: int | None,
        to_length: int,
        multiple: int,
        on_left: bool,
    ) -> dict[str, np.ndarray]:
        """Lay texts out in rows: ids (N,) and lengths (B,) → input_ids and attention_mask, (B, L).

        special: 2 with start and end of text, else 0.   limit: tokens to keep of each, those included
        """
        if None in (self.bos_token_id, self.eos_token_id, self.pad_token_id):
            raise ValueError(
                f"HfClipTokenizer has bos_token {self.bos_token!r}, eos_token {self.eos_token!r} and pad_token "
                f"{self.pad_token!r}, but needs all three: they mark start and end of a text and fill up shorter ones. "
                f"Load it without setting them to None."
            )
        kept = lengths if limit is None else np.minimum(lengths, max(limit - special, 0))
        if (kept < lengths).any():
            place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # within its text
            first = lengths - kept if self.truncation_side == "left" else np.zeros_like(lengths)
            ids = ids[(place >= np.repeat(first, lengths)) & (place < np.repeat(first + kept, lengths))]
        whole = kept + special
        width = max(int(whole.max()), to_length)
        width = -(-width // multiple) * multiple
        start = (width - whole if on_left else np.zeros_like(whole))[:, None]  # (B, 1)
        columns = np.arange(width)
        mask = (columns >= start) & (columns < start + whole[:, None])  # (B, L)
        rows = np.full((len(lengths), width), self.pad_token_id, dtype=np.int64)
        body = mask
        if special:
            ends = start + whole[:, None] - 1
            body = mask & (columns > start) & (columns < ends)
            np.put_along_axis(rows, start, self.bos_token_id, axis=1)
            np.put_along_axis(rows, ends, self.eos_token_id, axis=1)
        rows[body] = ids
        return {"input_ids": rows, "attention_mask": mask.astype(np.int64)}

    def _refuse_too_long(self, lengths: np.ndarray, truncated: bool, add_special_tokens: bool) -> None:
        """Stock tokenizers warn here, and the model fails. Without special tokens, texts are being measured."""
        if not truncated and add_special_tokens and (longest := int(lengths.max()) + 2) > self.model_max_length:
            raise ValueError(
                f"Text {int(lengths.argmax())} has {longest} tokens, start and end included, but the model takes "
                f"{self.model_max_length}. Shorten it, or pass truncation=True, which keeps the end of the text marked."
            )

    def _eventual_warn_about_too_long_sequence(self, *args: Any, **kwargs: Any) -> None:
        """Too long a text is an error here, above."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_word_tokenizer": None, "_memory": None}


__all__ = ["HfClipTokenizer"]
