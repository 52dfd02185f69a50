"""The complete way to ids: texts are split into words, which `tokenizers` encodes with offsets and all other fields.

Added tokens are found by `tokenizers` itself, so by its rules. A token with `normalized=False` is looked for in the
text as it was given, a token with `normalized=True` in the repaired text. Each part between two added tokens is split
into words by itself.

The objects here never change after they are made, so threads can share them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import regex
from tokenizers import AddedToken, Encoding, Tokenizer, models, pre_tokenizers

from .bpe import END_OF_TEXT, START_OF_TEXT, WORDS, WORDS_OF_PLAIN_TEXT
from .repair_text import TextError, prepare_text

Word = tuple[str, int, int]
"""A word, and where it begins and ends in the prepared text, in characters."""


def added_tokens_of(backend: Tokenizer) -> dict[int, AddedToken]:
    """Return the added tokens by their ids, without start and end of text."""
    tokens = backend.get_added_tokens_decoder()
    return {number: token for number, token in tokens.items() if token.content not in (START_OF_TEXT, END_OF_TEXT)}


def describe_token(numbered: tuple[int, AddedToken]) -> tuple[Any, ...]:
    """Return an added token's id, content and flags. `tokenizers` treats tokens as equal even if their flags differ."""
    number, token = numbered
    flags = (token.single_word, token.lstrip, token.rstrip, token.normalized, token.special)
    return number, token.content, *flags


def merging_backend(backend: Tokenizer, words: Iterable[str] = (), first: int = 0) -> Tokenizer:
    """Make a tokenizer that merges words which were split before.

    Args:
        backend: The tokenizer whose merges are used. Its added tokens are left out.
        words: Further tokens.
        first: Id of the first further token; the others follow it.

    Returns:
        The tokenizer.
    """
    merging = Tokenizer(backend.model)  # shared: to read it again would take a hundred times as long
    for token in backend.get_added_tokens_decoder().values():
        if token.content in (START_OF_TEXT, END_OF_TEXT):
            (merging.add_special_tokens if token.special else merging.add_tokens)([token])
    if words:
        unused = first - merging.get_vocab_size()
        merging.add_tokens([AddedToken(f"\0unused {number}\0", normalized=False) for number in range(unused)])
        merging.add_tokens([AddedToken(word, normalized=False) for word in words])
    merging.post_processor, merging.decoder = backend.post_processor, backend.decoder
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return merging


def fold_spaces(text: str) -> tuple[str, Callable[[int], int]]:
    """Replace white space by single spaces.

    Returns:
        The text, and a function from a place in it to the place in the given text.
    """
    if not regex.search(r"\s\s|[^\S ]", text):
        return text, lambda place: place
    places = [match.start() for match in regex.finditer(r"\s+|\S", text)] + [len(text)]
    return regex.sub(r"\s+", " ", text), places.__getitem__


def prepare_between(text: str) -> str:
    """Prepare the part of a text between two tokens, and keep white space at its ends, which tokens may contain."""
    part = prepare_text(text)
    before = " " if text[:1].isspace() and not part[:1].isspace() else ""
    return before + part + (" " if text[-1:].isspace() and not part[-1:].isspace() else "")


class TokenFinder:
    """Finds added tokens in a text, by their flags. If several begin at one place, the longest is taken.

    Start and end of text are looked for too, so that no added token is found within one of them. They are not returned:
    the expression for words finds them by OpenAI's rules.
    """

    def __init__(self, tokens: list[tuple[str, int, AddedToken]], with_published: bool, split_special_tokens: bool):
        """Make a finder.

        Args:
            tokens: For each token the text to look for, the token's id, and the token with its flags.
            with_published: Whether to look for start and end of text too.
            split_special_tokens: Whether special tokens are ordinary text.
        """
        self.unknown = "\0" * (1 + max((len(text) for text, _, _ in tokens), default=0))
        self.finder = Tokenizer(models.WordLevel({self.unknown: 0}, unk_token=self.unknown))
        numbers: dict[str, int] = {}  # if several tokens have the same text, the first one counts
        wanted: dict[bool, list[AddedToken]] = {True: [], False: []}
        for text, number, token in sorted(tokens, key=lambda item: not item[2].special):
            if text not in numbers:
                numbers[text] = number
                flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
                wanted[token.special].append(AddedToken(text, normalized=False, **flags))
        self.finder.add_special_tokens(wanted[True])
        self.finder.add_tokens(wanted[False])
        self.ids: dict[int, int] = dict(enumerate(numbers.values(), start=1))
        if self.ids and with_published:
            published = [AddedToken(token, normalized=False) for token in (START_OF_TEXT, END_OF_TEXT)]
            self.finder.add_special_tokens(published)
        self.finder.encode_special_tokens = split_special_tokens

    def split(self, text: str) -> list[tuple[int, int, int | None]]:
        """Split a text into parts: for each its begin, its end, and the id if it is an added token, else None."""
        if not self.ids:
            return [(0, len(text), None)]
        if regex.search(r"\p{Cs}", text):  # lone surrogates, which Rust's strings cannot hold
            text = regex.sub(r"\p{Cs}", "\ufffd", text)
        try:
            found = self.finder.encode(text, add_special_tokens=False)
        except BaseException as error:  # a panic of Rust, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise TextError(
                "its added tokens overlap in white space, which one has and another takes with lstrip or rstrip"
            ) from None
        parts: list[tuple[int, int, int | None]] = []
        for number, (start, end) in zip(found.ids, found.offsets, strict=True):
            token = self.ids.get(number)
            if token is None and parts and parts[-1][2] is None:
                start = parts.pop()[0]
            parts.append((start, end, token))
        return parts


class WordEncoder:
    """Splits texts into words and encodes them, with the added tokens that a backend has when this is made.

    Args:
        backend: The Rust tokenizer.
        split_special_tokens: Whether special tokens within a text are ordinary text.
    """

    def __init__(self, backend: Tokenizer, split_special_tokens: bool = False):
        added = sorted(added_tokens_of(backend).items())
        raw = [(token.content, number, token) for number, token in added if not token.normalized]
        normalized = [(fold_spaces(prepare_text(t.content))[0], number, t) for number, t in added if t.normalized]
        self.raw = TokenFinder(raw, True, split_special_tokens)
        normalized = [token for token in normalized if token[0]]
        self.normalized = TokenFinder(normalized, not split_special_tokens, split_special_tokens)
        self.contents = {number: token.content for number, token in added}
        self.pattern = WORDS_OF_PLAIN_TEXT if split_special_tokens else WORDS
        # An added token is merged under the name of a word that no text contains. Under its own name it would be found
        # even where its flags forbid it. The ids of these words lie above all others; `true_ids` maps them back.
        first = max([backend.get_vocab_size(), *(number + 1 for number in self.contents)])
        self.words = {number: f"\0added {number}\0" for number in self.contents}
        self.merger = merging_backend(backend, self.words.values(), first)
        self.true_ids = {self.merger.token_to_id(word): number for number, word in self.words.items()}

    def words_of(self, text: str) -> list[Word]:
        """Split a text into words, with their places in the prepared text. An added token is a word of its own."""
        words: list[Word] = []
        place = 0
        for start, end, token in self.raw.split(text):
            if token is None:
                part = prepare_between(text[start:end])
                words += [(word, place + first, place + last) for word, first, last in self._words_of_prepared(part)]
                place += len(part)
            else:
                words.append((self.words[token], place, place + end - start))
                place += end - start
        return words

    def _words_of_prepared(self, text: str) -> list[Word]:
        if not self.normalized.ids:
            return [(match[0], *match.span()) for match in self.pattern.finditer(text)]
        words: list[Word] = []
        folded, place = fold_spaces(text)
        for start, end, token in self.normalized.split(folded):
            if token is None:
                found = self.pattern.finditer(folded[start:end])
                words += [
                    (match[0], place(start + match.start()), place(start + match.end() - 1) + 1) for match in found
                ]
            else:
                words.append((self.words[token], place(start), place(end)))
        return words

    def encode(
        self, rows: list[list[Word]], add_special_tokens: bool, limit: int | None, stride: int, direction: str
    ) -> list[Encoding]:
        """Encode texts that are split into words.

        Args:
            rows: The words of each text.
            add_special_tokens: Whether to add start and end.
            limit: Number of tokens to keep of each text, with start and end; the others overflow. None: all.
            stride: Number of tokens that each overflowing part repeats from the part before it.
            direction: Side on which tokens are cut, "left" or "right".

        Returns:
            One encoding per text.
        """
        texts = [[word for word, _, _ in row] for row in rows]
        encodings = self.merger.encode_batch(texts, is_pretokenized=True, add_special_tokens=False)
        special = self.merger.num_special_tokens_to_add(False) if add_special_tokens else 0
        if limit is not None:
            kept = max(limit - special, 0)
            if stride and stride >= kept:
                raise ValueError(f"stride is {stride}, but must be below the {kept} tokens that are kept of a text.")
            for encoding in encodings:
                encoding.truncate(kept, stride=stride, direction=direction)
        return [self.merger.post_process(encoding, None, add_special_tokens) for encoding in encodings]


class PlacedEncoding:
    """An encoding whose offsets count from the beginning of the prepared text.

    `tokenizers` counts them from the beginning of each word, since it gets single words. Start and end of text, which
    stand nowhere in the text, have the offsets (0, 0). Added tokens have their own names and ids.
    """

    def __init__(self, encoding: Encoding, words: list[Word], encoder: WordEncoder):
        self.encoding = encoding
        self.ids: list[int] = encoding.ids
        self.tokens: list[str] = encoding.tokens
        self.spans = [(start, end) for _, start, end in words]
        starts = [start for start, _ in self.spans]
        self.offsets = [
            (0, 0) if word is None else (starts[word] + start, starts[word] + end)
            for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True)
        ]
        if encoder.true_ids:
            for place, (number, word) in enumerate(zip(encoding.ids, encoding.word_ids, strict=True)):
                if word is not None and (true_id := encoder.true_ids.get(number)) is not None:
                    self.ids[place], self.tokens[place] = true_id, encoder.contents[true_id]
                    self.offsets[place] = self.spans[word]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle asks for these names of this object, not of the encoding
            raise AttributeError(name)
        return getattr(self.encoding, name)

    def __len__(self) -> int:
        return len(self.encoding)

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        return None if self.encoding.token_to_chars(token) is None else self.offsets[token]

    def char_to_token(self, char: int, sequence: int = 0) -> int | None:
        return next((token for token, (start, end) in enumerate(self.offsets) if start <= char < end), None)

    def word_to_chars(self, word: int, sequence: int = 0) -> tuple[int, int] | None:
        return None if self.encoding.word_to_chars(word, sequence) is None else self.spans[word]

    def char_to_word(self, char: int, sequence: int = 0) -> int | None:
        token = self.char_to_token(char)
        return None if token is None else self.encoding.word_ids[token]
