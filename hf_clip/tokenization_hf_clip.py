"""CLIP's byte-level BPE tokenizer on the `tokenizers` library.

OpenAI's tokenizer repairs a text (ftfy, then html entities), folds white space, lower-cases, cuts words with
one regular expression and merges bytes within each word. Cutting and merging happen in Rust for every text.
The repair and Python's own lower-casing are done first for texts that may need them; a text of printable
ASCII without an ampersand can't need them, and never leaves Rust.

The backend is wholly described by tokenizer.json, which this class therefore reads as it stands.
"""

import gzip
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BatchEncoding
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

_MAY_NEED_REPAIR = re.compile(r"[^\t\n\r\x20-\x7e]|&")


def repair_text(text: str) -> str:
    """What OpenAI's tokenizer does to a text before it cuts words: ftfy, html entities twice, spaces, lower case."""
    if ftfy is None:
        raise ImportError(f"Tokenizing {text[:40]!r} needs ftfy, which repairs Unicode text: pip install ftfy")
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", repaired.strip()).strip().lower()


def _repair_where_needed(text: Any) -> Any:
    """Apply repair_text within a text, or a (nested) list of texts, and leave everything else alone."""
    if isinstance(text, str):
        return repair_text(text) if _MAY_NEED_REPAIR.search(text) else text
    if isinstance(text, (list, tuple)):
        return type(text)(_repair_where_needed(item) for item in text)
    return text


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of OpenAI's ids.

    Bytes that print as themselves come first, in order; the others follow as U+0100 and up (as in GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]


def build_backend(merges: list[tuple[str, str]]) -> Tokenizer:
    """The Rust tokenizer for a list of merges.

    Ids: 256 bytes, 256 bytes that end a word, one per merge, then start and end of text.
    """
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, START_OF_TEXT, END_OF_TEXT])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD))
    quotes = [("[‘’]", "'"), ("[“”]", '"')]
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            *(normalizers.Replace(Regex(curly), straight) for curly, straight in quotes),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " "), decoders.Strip(" ", 0, 1)]
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


class HfClipTokenizer(TokenizersBackend):
    """CLIP's tokenizer: ids equal OpenAI's, in batches, padded to the longest text by default.

    Calling it returns `input_ids` and `attention_mask`, each (B, L) with `return_tensors`, else lists. Padding
    stands on the right and repeats the end of text. A text longer than `model_max_length` (77) is an error
    unless `truncation=True`, which keeps the end-of-text token. Offsets refer to the repaired text.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"

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
        alphabet = byte_alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=alphabet,
            end_of_word_suffix=END_OF_WORD,
            show_progress=False,
        )
        backend.train_from_iterator((_repair_where_needed(text) for text in texts), trainer)
        learned = json.loads(backend.to_str())["model"]["merges"]
        merges = [(left, right) for left, right in learned]
        return cls.from_merges(merges[: vocab_size - FIXED_IDS], model_max_length)

    def __call__(self, text: Any = None, *args: Any, padding: Any = True, **kwargs: Any) -> BatchEncoding:
        return super().__call__(text, *args, padding=padding, **kwargs)

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        if isinstance(text, (list, tuple)) and len(text) == 0:
            raise ValueError("HfClipTokenizer got an empty list of texts; pass at least one text.")
        encoded = super()._encode_plus(_repair_where_needed(text), _repair_where_needed(text_pair), **kwargs)
        if getattr(kwargs.get("truncation_strategy"), "value", "do_not_truncate") == "do_not_truncate":
            self._refuse_too_long(encoded)
        return encoded

    def _eventual_warn_about_too_long_sequence(self, *args: Any, **kwargs: Any) -> None:
        """Too long a text is an error here, below; stock tokenizers warn and let the model fail."""

    def _refuse_too_long(self, encoded: BatchEncoding) -> None:
        for index, encoding in enumerate(encoded.encodings or []):
            if len(encoding) > self.model_max_length and sum(encoding.attention_mask) > self.model_max_length:
                raise ValueError(
                    f"Text {index} has {sum(encoding.attention_mask)} tokens, start and end included, but the model "
                    f"takes {self.model_max_length}. Shorten it, or pass truncation=True, which keeps the end of the "
                    f"text marked."
                )


__all__ = ["HfClipTokenizer"]
