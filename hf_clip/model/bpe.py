"""CLIP's byte-level BPE: the expression that finds words, the vocabulary, and the Rust tokenizer that merges bytes.

OpenAI's tokenizer treats a text in three steps:

1. Repair it with ftfy, unescape html entities twice, fold white space, and lower its case.
2. Split it into words with a regular expression, which never matches across white space.
3. Encode each word as bytes and merge them in the order of the vocabulary.

Step 1 is done by `repair_text` with ftfy, the library that OpenAI uses. Step 2 is done with the same expression and the
same library, `regex`. Step 3 is done by the library `tokenizers`, which is written in Rust.

The backend that is made here is saved as tokenizer.json. It describes all three steps as closely as `tokenizers` can,
for programs that load this file without `HfClipTokenizer`.
"""

import gzip
import unicodedata
from pathlib import Path

import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .variants import OPENAI_VOCAB_SIZE

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
END_OF_WORD = "</w>"

FIXED_IDS = 2 * 256 + 2
"""Number of ids without merges: 256 bytes, 256 bytes that end a word, and the two special tokens."""

_SPECIAL_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|"
_PLAIN_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

WORDS = regex.compile(_SPECIAL_WORDS + _PLAIN_WORDS, regex.IGNORECASE)
"""OpenAI's expression for words: special tokens, contractions, letters, single digits, other symbols except spaces."""

WORDS_OF_PLAIN_TEXT = regex.compile(_PLAIN_WORDS, regex.IGNORECASE)
"""The same expression for `split_special_tokens=True`, where special tokens within a text are ordinary text."""

RUST_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""
"""The same expression for Rust. Texts are lower-cased before; of other letters only the long s equals one of these."""


def byte_alphabet() -> list[str]:
    """List the 256 printable characters that stand for bytes, in the order of OpenAI's ids, as in GPT-2.

    Printable bytes come first and stand for themselves. The others follow, as the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]


LIGATURES = {"ĳ": "ij", "Ĳ": "IJ", "ŉ": "ʼn", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj"}
LIGATURES |= {"Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz"}
LIGATURES |= {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
"""Ligatures that ftfy replaces by letters. NFKC would replace some of them otherwise."""


def build_normalizer() -> normalizers.Normalizer:
    """Make the part of `repair_text` that `tokenizers` can express, for programs that load tokenizer.json alone.

    It leaves out html entities, mojibake, the final sigma, and special tokens in capitals or within other symbols, for
    which replacements are not enough. It also leaves out half-width katakana, which would need another hundred
    replacements in every text.
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
    """Make the Rust tokenizer for a list of merges.

    Ids are in OpenAI's order: 256 bytes, 256 bytes that end a word, one id per merge, start of text, end of text.
    """
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, START_OF_TEXT, END_OF_TEXT])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD))
    backend.normalizer = build_normalizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(RUST_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Not `decoders.Strip`, which crashes if there is nothing to strip.
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
    """Raise ValueError for fewer ids than bytes and special tokens take."""
    if vocab_size < FIXED_IDS:
        raise ValueError(f"vocab_size is {vocab_size}, but bytes and special tokens alone take {FIXED_IDS} ids.")


def read_merges(path: str | Path, vocab_size: int = OPENAI_VOCAB_SIZE) -> list[tuple[str, str]]:
    """Read merges from OpenAI's `bpe_simple_vocab_16e6.txt.gz` or from a `merges.txt`.

    Args:
        path: A file with a header line, followed by one pair of symbols per line. It may be compressed by gzip.
        vocab_size: Number of ids. As many merges are read as are needed for it.

    Returns:
        The merges, in the order in which they are applied.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, too short, or is no vocabulary of CLIP.
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
