"""CLIP's tokenizer for transformers. Its ids equal those of OpenAI's tokenizer for every string.

Two things make it fast. A text of printable ASCII without an ampersand needs no repair except lower case. And the ids
of each chunk between white space are remembered (`ChunkMemory`). Calls that ask for more than ids and masks, or use
added tokens, take the slower way through `WordEncoder`.

Several threads may share a tokenizer. A call changes only the remembered chunks and encoders, which are no part of the
tokenizer's state: they are neither saved nor hashed.

Dimensions: T texts, L text length, A ids of all texts together.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy
from transformers.utils import logging

from .bpe import (
    END_OF_TEXT,
    END_OF_WORD,
    FIXED_IDS,
    START_OF_TEXT,
    build_backend,
    byte_alphabet,
    check_vocab_size,
    read_merges,
)
from .checked_files import TOKENIZER_CHECKS, check_tokenizer_file, find_file, find_files, in_one_kind, read_vocabulary
from .chunk_memory import ChunkMemory
from .encoded_texts import EncodedTexts, as_columns, as_lists, without_texts
from .freed_memory import return_freed_memory
from .hub_repository import HUB_ARGUMENTS, HubUpload, refuse_checkpoint_file
from .repair_text import TextError, prepare_each, prepare_one, prepare_text
from .token_layout import Layout
from .variants import OPENAI_VOCAB_SIZE
from .words import WordEncoder, describe_token

logger = logging.get_logger(__name__)

EXTRAS = {
    "return_token_type_ids": "token_type_ids",
    "return_special_tokens_mask": "special_tokens_mask",
    "return_offsets_mapping": "offset_mapping",
    "return_length": "length",
}
"""Arguments that ask for further fields besides ids and mask, and the names of these fields."""


def check_texts(text: Any) -> list[str]:
    """Return texts as a list.

    Args:
        text: A text, or an ordered container of texts, such as a column of NumPy, pandas, Arrow or `datasets`. An
            iterator is consumed.

    Returns:
        The texts.

    Raises:
        TextError: An item is no text. Its `index` is the item's place.
        ValueError: `text` is no container of texts.
    """
    if isinstance(text, str):
        return [text]
    items = text.to_pylist() if hasattr(text, "to_pylist") else text  # Arrow's own items are no strings
    if isinstance(items, (bytes, bytearray, Mapping, set, frozenset)) or not isinstance(items, Iterable):
        raise ValueError(f"HfClipTokenizer got {type(text).__name__}, but a text or a list of texts is needed.")
    if (dimensions := getattr(items, "ndim", 1)) != 1:
        raise ValueError(
            f"HfClipTokenizer got {type(text).__name__} of {dimensions} dimensions, but one column of texts is needed."
        )
    texts = list(items)
    if set(map(type, texts)) == {str}:  # several times as fast as looking at each
        return texts
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise TextError(f"is a {type(item).__name__}, but a list of texts is needed: {item!r:.60}.", index)
    return texts


def read_backend(source: Any, hub: dict[str, Any]) -> Tokenizer | None:
    """Make the tokenizer of a repository that has vocab.json and merges.txt but no tokenizer.json.

    Args:
        source: A folder, or the name of a repository.
        hub: The Hub's arguments of `from_pretrained`.

    Returns:
        The tokenizer, or None if the repository has other files.

    Raises:
        ValueError: The vocabulary is that of another model.
    """
    names = ("tokenizer.json", "vocab.json", "merges.txt")
    try:
        whole, table, merges = [find_file(source, name, hub) for name in names]
    except OSError:
        return None
    if whole is not None or table is None or merges is None:
        return None
    vocab = read_vocabulary(table)
    backend = build_backend(read_merges(merges, len(vocab)))
    if backend.get_vocab() != vocab:
        raise ValueError(f"The vocab.json of {source} numbers its tokens otherwise than CLIP's tokenizer does.")
    return backend


Loaded = TypeVar("Loaded", bound="HfClipTokenizer")


# diffusers looks for this base class, under this name, in a component's module to find out how to load it.
class HfClipTokenizer(HubUpload, PreTrainedTokenizerFast):
    """CLIP's tokenizer, with the ids of OpenAI's tokenizer for every string.

    A call returns `input_ids` and `attention_mask`: arrays or tensors (T, L) with `return_tensors`, otherwise lists. It
    takes the arguments of any tokenizer of transformers. These are its defaults and its own rules:

    - Texts are padded to the longest one of the call, on the right, with the end-of-text token.
    - A text of more than `model_max_length` tokens (77) is not cut, and a warning is given; the model will refuse it.
      With `truncation=True` it is cut, and its last token is the end of text.
    - Offsets count characters of the text in which words are found. For plain ASCII that is the text as it was given,
      otherwise the repaired text.
    - For an empty list of texts the arrays are (0, L).

    Make a tokenizer with `from_pretrained`, `from_vocabulary_file`, `from_merges` or `train_from_iterator`.

    Example::

        tokenizer = HfClipTokenizer.from_pretrained("org/clip-vit-b32")
        tokenizer(["a cat", "a photo of a dog"], return_tensors="pt")["input_ids"].shape  # (2, 7)
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"
    # The memory and the encoders are no part of the tokenizer's state: `datasets` hashes `__dict__`, without slots.
    __slots__ = ("_encoders", "_has_warned", "_memory")
    _encoders: dict[bool, tuple[Any, WordEncoder]]
    _has_warned: bool
    _memory: ChunkMemory | None

    def __new__(cls, *args: Any, **kwargs: Any) -> "HfClipTokenizer":
        tokenizer = super().__new__(cls)
        for name, value in (("_encoders", {}), ("_has_warned", False), ("_memory", None)):
            object.__setattr__(tokenizer, name, value)  # `__setattr__` of transformers works only after `__init__`
        return tokenizer

    @classmethod
    def from_pretrained(cls: type[Loaded], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Loaded:
        """Load a tokenizer from a folder or from a repository on the Hub.

        Args:
            pretrained_model_name_or_path: A folder, or the name of a repository, such as "org/clip-vit-b32". It has a
                tokenizer.json, or vocab.json and merges.txt.
            *args: As for any tokenizer of transformers.
            **kwargs: As for any tokenizer of transformers: `revision`, `subfolder`, `token`, …

        Returns:
            The tokenizer.

        Raises:
            OSError: There is no such folder or repository.
            ValueError: A file is damaged, holds another model's vocabulary, or the path is that of a checkpoint file.
        """
        source = pretrained_model_name_or_path
        refuse_checkpoint_file(source)
        for name in kwargs:
            if callable(getattr(cls, name, None)):  # as transformers has it; below it would look like a damaged file
                raise AttributeError(f"{name} conflicts with the method {name} in {cls.__name__}; leave it out.")
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        for path in find_files(source, TOKENIZER_CHECKS, hub):
            TOKENIZER_CHECKS.get(path.name, check_tokenizer_file)(path)
        try:
            try:
                with in_one_kind(source):
                    return super().from_pretrained(source, *args, **kwargs)
            except (OSError, ValueError):
                backend = None if "tokenizer_object" in kwargs else read_backend(source, hub)
                if backend is None:
                    raise
            with in_one_kind(source):
                return super().from_pretrained(source, *args, tokenizer_object=backend, **kwargs)
        finally:
            return_freed_memory()

    @classmethod
    def from_merges(cls, merges: list[tuple[str, str]], model_max_length: int = 77) -> "HfClipTokenizer":
        """Make a tokenizer from BPE merges.

        Args:
            merges: Pairs of symbols to merge, in the order in which they are merged. Ids follow OpenAI's order: 256
                bytes, 256 bytes that end a word, one id per merge, start of text, end of text.
            model_max_length: Length of the longest text in tokens, with start and end.

        Returns:
            The tokenizer.
        """
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
        """Make OpenAI's tokenizer from its published vocabulary file, `bpe_simple_vocab_16e6.txt.gz`.

        Args:
            path: The file. The package `openai-clip` contains it.
            vocab_size: Number of ids, of which bytes and special tokens take 514.
            model_max_length: Length of the longest text in tokens, with start and end.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or is no vocabulary of CLIP.
        """
        return cls.from_merges(read_merges(path, vocab_size), model_max_length)

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, model_max_length: int = 77
    ) -> "HfClipTokenizer":
        """Train a tokenizer: learn BPE merges from texts.

        Args:
            texts: The texts. They are repaired and lower-cased, as in a call.
            vocab_size: Largest number of ids, of which bytes and special tokens take 514.
            model_max_length: Length of the longest text in tokens, with start and end.

        Returns:
            The tokenizer.

        Raises:
            TextError: A text cannot be tokenized. A ValueError; its `index` is the text's place.
            ValueError: `vocab_size` is below 514.

        Example::

            tokenizer = HfClipTokenizer.train_from_iterator(["a red car", "a blue car"], vocab_size=530)
        """
        check_vocab_size(vocab_size)
        backend = build_backend([])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=byte_alphabet(),
            end_of_word_suffix=END_OF_WORD,
            show_progress=False,
        )
        prepared = (prepare_one(prepare_text, text, index) for index, text in enumerate(texts))
        backend.train_from_iterator(prepared, trainer)
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
        """Tokenize a text or a list of texts. All calls of a tokenizer in transformers end here."""
        if text_pair is not None:
            raise ValueError(
                "HfClipTokenizer got a pair of texts, but CLIP reads single ones; join them, or pass a list."
            )
        if is_split_into_words:
            raise ValueError("HfClipTokenizer cuts words itself; pass whole texts, without is_split_into_words=True.")
        if getattr(text, "ndim", 1) == 0:
            text = text.item()  # a NumPy array that holds a single text
        texts = check_texts(text)
        is_truncated = truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE
        layout = Layout(
            add_special_tokens=add_special_tokens,
            limit=(max_length or self.model_max_length) if is_truncated else None,
            truncation_side=self.truncation_side,
            is_padded=padding_strategy != PaddingStrategy.DO_NOT_PAD,
            to_length=(max_length or self.model_max_length) if padding_strategy == PaddingStrategy.MAX_LENGTH else 0,
            multiple=pad_to_multiple_of or 1,
            padding_side=padding_side or self.padding_side,
            **self._special_tokens(),
        )
        split, with_overflow = (bool(kwargs.get(f"{n}_tokens")) for n in ("split_special", "return_overflowing"))
        extras = [name for argument, name in EXTRAS.items() if kwargs.get(argument)]
        encoder = self._encoder(split)
        by_encodings = extras or with_overflow or split or encoder.contents
        data: dict[str, Any]
        encodings: Any
        if texts and (by_encodings or (return_tensors is not None and not layout.is_padded)):
            parts = layout.encode(encoder, prepare_each(encoder.words_of, texts), kwargs.get("stride") or 0)
            lengths = np.array([sum(first.attention_mask) for first, *_ in parts])
            parts = parts if with_overflow else [part[:1] for part in parts]
            data = as_columns(parts, {"input_ids", "attention_mask", *extras}, with_overflow)
            encodings = list(chain.from_iterable(parts))
        else:
            ids, lengths = self._ids_of(texts, encoder)
            data = layout.arrange(ids, lengths)
            lengths = lengths + layout.special
            if not texts:
                data |= without_texts(extras, data)
            if return_tensors is None:
                data = as_lists(data, layout.is_padded) if texts else {name: [] for name in data}
            elif return_tensors == "pt":
                import torch

                data = {name: torch.from_numpy(values) for name, values in data.items()}  # without a copy
            encodings = lambda: [first for first, *_ in layout.encode(encoder, list(map(encoder.words_of, texts)))]  # noqa: E731
        if return_attention_mask is False:
            del data["attention_mask"]
        if add_special_tokens and not is_truncated and kwargs.get("verbose", True):
            self._warn_of_too_long(lengths)
        if isinstance(text, str) and return_tensors is None and not with_overflow:
            data = {name: value[0] if isinstance(value[0], list) else value for name, value in data.items()}
        return EncodedTexts(data, encodings, tensor_type=return_tensors)

    def _special_tokens(self) -> dict[str, Any]:
        if None in (self.bos_token_id, self.eos_token_id, self.pad_token_id):
            raise ValueError(
                f"HfClipTokenizer has bos_token {self.bos_token!r}, eos_token {self.eos_token!r} and pad_token "
                f"{self.pad_token!r}, but needs all three: they mark start and end of a text and fill up shorter ones. "
                f"Load it without setting them to None."
            )
        ids = {"start_id": self.bos_token_id, "end_id": self.eos_token_id, "pad_id": self.pad_token_id}
        return ids | {"pad_token": self.pad_token}

    def _encoder(self, split_special_tokens: bool) -> WordEncoder:
        """Return the encoder for the present added tokens. It is made anew only when these have changed."""
        tokens = tuple(map(describe_token, self.backend_tokenizer.get_added_tokens_decoder().items()))
        known_tokens, encoder = self._encoders.get(split_special_tokens, (None, None))
        if encoder is None or known_tokens != tokens:
            encoder = WordEncoder(self.backend_tokenizer, split_special_tokens)
            self._encoders[split_special_tokens] = (tokens, encoder)
        return encoder

    def _ids_of(self, texts: list[str], encoder: WordEncoder) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts one after the other, without special tokens (A,), and each text's number (T,)."""
        memory = self._memory
        if memory is None:
            memory = self._memory = ChunkMemory(encoder.merger)
        return memory.ids_of(texts)

    def _warn_of_too_long(self, lengths: np.ndarray) -> None:
        """Warn once of texts that are too long, as stock tokenizers do.

        `lengths` (T,) counts the tokens of each text, with start and end.
        """
        if lengths.max(initial=0) > self.model_max_length and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"Text {int(lengths.argmax())} has {int(lengths.max())} tokens, start and end included, but the model "
                f"takes {self.model_max_length} and refuses more. Shorten it, or pass truncation=True, which keeps the "
                f"end of the text marked."
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


__all__ = ["HfClipTokenizer"]
