"""CLIP's byte-level BPE tokenizer on the `tokenizers` library, exact for every string.

OpenAI's tokenizer does this to a text:

1. repair: ftfy, html entities unescaped twice, white space folded, lower case;
2. cut into words by one regular expression, which never crosses white space;
3. encode each word as bytes and merge them by rank.

Steps 1 and 2 are done with the very same libraries, ftfy and regex; step 3 is Rust's. What makes it fast: a text of
printable ASCII without an ampersand needs no repair but lower case (`is_plain`); and since no word crosses white
space, the ids of a text are those of its chunks between white space, one after the other, so every distinct chunk is
cut and merged once and then remembered.

tokenizer.json describes all three steps too, as closely as Rust can, for those who load it without this class.
"""

import gzip
import html
import json
import unicodedata
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import regex
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BatchEncoding
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend

try:
    import ftfy
except ImportError:  # texts in plain ASCII need no repair
    ftfy = None

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
END_OF_WORD = "</w>"

FIXED_IDS = 2 * 256 + 2
"""Every byte, every byte that ends a word, and the two special tokens."""

OPENAI_VOCAB_SIZE = 49408
"""The published vocabulary file lists more merges than there are ids for; the rest is ignored."""

# Contractions, letters, single digits, everything else but spaces. The original matches in any case; texts
# arrive lower-cased, and the one other letter that folds to these is the long s.
WORD_PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""

WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
"""The published expression."""

_UNUSUAL_ASCII = bytes([*range(9), 11, 12, *range(14, 32), 127]) + b"&"
"""What repair may change in ASCII: control characters, but for tab and line ends, and entities."""

BOUNDARY = "\0end_of_a_text\0"
"""A chunk that no text has: ftfy removes the character zero, and no entity gives it."""

MOST_CHUNKS = 1 << 18
"""Chunks that a tokenizer remembers: some 60 MB at most."""


STRAIGHT_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})
WITHOUT_DASHES = str.maketrans({"–": None, "—": None, "…": None})


def is_plain(text: str) -> bool:
    """Whether repair_text would do nothing to a text but fold white space and lower its case."""
    return text.isascii() and len(text.encode().translate(None, _UNUSUAL_ASCII)) == len(text)


def repair_text(text: str) -> str:
    """What OpenAI's tokenizer does to a text before it cuts words: ftfy, html entities twice, spaces, lower case."""
    if ftfy is None:
        raise ImportError(f"Tokenizing {text[:40]!r} needs ftfy, which repairs Unicode text: pip install ftfy")
    repaired = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", repaired).strip().lower()


def repair_where_needed(text: str) -> str:
    """A text that gives the words of repair_text(text) when it is lowered; most texts need little or nothing.

    Curly quotes are straightened here, for ftfy takes a hundred times as long. It does nothing else to a text whose
    characters beyond plain ones are curly quotes, dashes and ellipses: in no single-byte encoding do these give valid
    UTF-8, so that such a text can't be mojibake.
    """
    if is_plain(text):
        return text
    straight = text.translate(STRAIGHT_QUOTES)
    return straight if is_plain(straight.translate(WITHOUT_DASHES)) else repair_text(text)


def prepare_text(text: str) -> str:
    """The text that is cut into words. Unless it had to be repaired, its characters stay in their places."""
    return repair_where_needed(text).lower()


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of OpenAI's ids.

    Bytes that print as themselves come first, in order; the others follow as U+0100 and up (as in GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]


LIGATURES = {"ĳ": "ij", "Ĳ": "IJ", "ŉ": "ʼn", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj"}
LIGATURES |= {"Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz"}
LIGATURES |= {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
"""What ftfy takes apart; some are not what NFKC would make of them."""


def build_normalizer() -> normalizers.Normalizer:
    """As much of `repair_text` as Rust can say, for those who load tokenizer.json without this class.

    Not in it: html entities, mojibake, the final sigma and special tokens in capitals or within other symbols, which
    need a program; and half-width katakana, which would cost every text another hundred replacements.
    """
    wide = [chr(code) for code in (*range(0xFF01, 0xFF61), *range(0xFFE0, 0xFFE7))]
    widths = {character: unicodedata.normalize("NFKC", character) for character in wide} | {"\u3000": " "}
    control = r"[\x{0}-\x{8}\x{B}\x{E}-\x{1F}\x{7F}\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]"
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\x{1B}\[((?:\d|;)*)([a-zA-Z])"), ""),  # colours of a terminal
            *(normalizers.Replace(old, new) for old, new in (LIGATURES | widths).items() if old != new),
            normalizers.Replace(Regex("[ʼ‘-‛]"), "'"),
            normalizers.Replace(Regex("[“-‟]"), '"'),
            normalizers.Replace(Regex(control), ""),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )


def build_backend(merges: list[tuple[str, str]]) -> Tokenizer:
    """The Rust tokenizer for a list of merges.

    Ids: 256 bytes, 256 bytes that end a word, one per merge, then start and end of text.
    """
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, START_OF_TEXT, END_OF_TEXT])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD))
    backend.normalizer = build_normalizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Not `decoders.Strip`, which ends the program where there is nothing to strip.
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex(END_OF_WORD + r"\z"), ""), decoders.Replace(END_OF_WORD, " ")]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (START_OF_TEXT, END_OF_TEXT)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START_OF_TEXT} $A {END_OF_TEXT}",
        special_tokens=[(token, vocab[token]) for token in (START_OF_TEXT, END_OF_TEXT)],
    )
    return backend


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < FIXED_IDS:
        raise ValueError(f"vocab_size is {vocab_size}, but bytes and special tokens alone take {FIXED_IDS} ids.")


def read_merges(path: str | Path, vocab_size: int = OPENAI_VOCAB_SIZE) -> list[tuple[str, str]]:
    """Read as many merges as make up `vocab_size` ids from a `bpe_simple_vocab_16e6.txt.gz` or a `merges.txt`.

    Both hold a header line and then a pair of symbols a line; the file may be compressed.
    """
    check_vocab_size(vocab_size)
    path, count = Path(path), vocab_size - FIXED_IDS
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no vocabulary file {path}. Needed is OpenAI's bpe_simple_vocab_16e6.txt.gz; "
            f"`pip install openai-clip` brings it."
        )
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable vocabulary file ({error}); take a fresh copy of it.") from error
    pairs = [tuple(line.split()) for line in lines[1 : count + 1]]
    if len(pairs) < count or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"{path} doesn't fit {vocab_size} ids: a header and at least {count} lines with two symbols each are "
            f"needed, but it has {len(lines)} lines. Take OpenAI's bpe_simple_vocab_16e6.txt.gz."
        )
    merges = [(left, right) for left, right in pairs]
    known = set(byte_alphabet()) | {byte + END_OF_WORD for byte in byte_alphabet()}
    for number, (left, right) in enumerate(merges, start=2):
        if left not in known or right not in known or left + right in known:
            raise ValueError(
                f"{path}, line {number}: {left!r} and {right!r} don't make a new token of CLIP's, whose symbols are "
                f"bytes, the last of a word marked {END_OF_WORD}. Take OpenAI's bpe_simple_vocab_16e6.txt.gz."
            )
        known.add(left + right)
    if merges and not any(right.endswith(END_OF_WORD) for _, right in merges):
        raise ValueError(
            f"{path} marks no end of a word with {END_OF_WORD}, as CLIP's vocabulary does; it is another model's. Take "
            f"OpenAI's bpe_simple_vocab_16e6.txt.gz."
        )
    return merges


def merging_backend(backend: Tokenizer) -> Tokenizer:
    """The part of a backend that merges: for words that were cut before."""
    merging = Tokenizer.from_str(backend.to_str())
    merging.normalizer = None
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merging.no_truncation()
    merging.no_padding()
    return merging


WORDS_AT_ONCE = 512


class ChunkMemory:
    """The ids of every chunk between white space that was met so far.

    numbers: chunk → its number, the boundary between texts being 0
    ids (N,), starts (C,), lengths (C,): all ids one after the other, and where each chunk's stand among them
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
        self.numbers = {BOUNDARY: 0}
        self.ids = np.zeros(0, dtype=np.int64)
        self.starts = self.lengths = np.zeros(1, dtype=np.int64)

    def look_up(self, chunks: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts given as chunks with boundaries between them (N,), and how many each text has (B,)."""
        try:
            numbers = np.fromiter(map(self.numbers.__getitem__, chunks), np.int64, len(chunks))
        except KeyError:
            self.learn(set(chunks))
            numbers = np.fromiter(map(self.numbers.__getitem__, chunks), np.int64, len(chunks))
        counts = self.lengths[numbers]  # ids of each chunk; none of a boundary
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        ids = self.ids[np.repeat(self.starts[numbers] - (ends - counts), counts) + np.arange(total)]
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


def offsets_in_text(encoding: Encoding, words: list[tuple[str, int]]) -> list[tuple[int, int]]:
    """Where each token stands in its prepared text; special tokens stand nowhere, at (0, 0)."""
    return [
        (0, 0) if word is None else (words[word][1] + start, words[word][1] + end)
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True)
    ]


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


class EncodedTexts(BatchEncoding):
    """Ids and masks at once; `tokenizers`' encodings, which few ask for and which take long, when first asked for."""

    def __init__(self, data: dict[str, Any], encodings: Any, tensor_type: Any = None):
        super().__init__(data, tensor_type=tensor_type, n_sequences=1)
        self._encodings = encodings

    @property
    def _encodings(self) -> list[Encoding]:
        if callable(self.__dict__["made_encodings"]):
            self.__dict__["made_encodings"] = self.__dict__["made_encodings"]()
        return self.__dict__["made_encodings"]

    @_encodings.setter
    def _encodings(self, encodings: Any) -> None:
        self.__dict__["made_encodings"] = encodings

    @property
    def is_fast(self) -> bool:
        return True


class HfClipTokenizer(TokenizersBackend):
    """CLIP's tokenizer: ids equal OpenAI's, in batches, padded to the longest text by default.

    Calling it returns `input_ids` and `attention_mask`, each (B, L) with `return_tensors`, else lists together with
    `tokenizers`' encodings. Padding stands on the right and repeats the end of text. A text longer than
    `model_max_length` (77) is an error unless `truncation=True`, which keeps the end-of-text token. Offsets refer to
    the text as it is cut: a plain one as it was given, any other as it was repaired (`prepare_text`).
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"
    _word_tokenizer: tuple[Any, TokenizersBackend] | None = None
    _memory: ChunkMemory | None = None

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
        words = [self._words_of(item) for item in texts]
        encoded = self._by_words()._encode_plus(
            [[word for word, _ in row] for row in words],
            add_special_tokens=add_special_tokens,
            is_split_into_words=True,
            **kwargs,
        )
        lengths = np.array([sum(encoding.attention_mask) for encoding in encoded.encodings or []])
        self._refuse_too_long(lengths - 2 * add_special_tokens, truncated, add_special_tokens)
        if "offset_mapping" in encoded:
            texts_of_rows = encoded.get("overflow_to_sample_mapping", range(len(texts)))
            encoded["offset_mapping"] = [
                offsets_in_text(encoding, words[row])
                for row, encoding in zip(texts_of_rows, encoded.encodings or [], strict=True)
            ]
        return encoded

    def _added_tokens(self) -> list[str]:
        """Tokens that were added to the published ones, longest first."""
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        return sorted(added - {START_OF_TEXT, END_OF_TEXT}, key=len, reverse=True)

    def _words_of(self, text: str) -> list[tuple[str, int]]:
        """The words of a text and where each begins in the prepared text; added tokens are words of their own."""
        if not (added := self._added_tokens()):
            return [(match[0], match.start()) for match in WORDS.finditer(prepare_text(text))]
        words: list[tuple[str, int]] = []
        place = 0
        for part in regex.split(f"({'|'.join(map(regex.escape, added))})", text):
            if part in added:
                words.append((part, place))
            else:
                part = prepare_text(part)
                words += [(match[0], place + match.start()) for match in WORDS.finditer(part)]
            place += len(part)
        return words

    def _by_words(self) -> TokenizersBackend:
        """A stock tokenizer for texts that have been cut into words: it merges, truncates, pads and converts."""
        state = (self._tokenizer.get_vocab_size(), self.pad_token, self.truncation_side, self.model_max_length)
        if self._word_tokenizer is None or self._word_tokenizer[0] != state:
            inner = TokenizersBackend(
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
        if self._memory is None:
            self._memory = ChunkMemory(merging_backend(self._tokenizer))
        return self._memory.look_up(chunks)

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
