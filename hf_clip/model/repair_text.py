"""Repair a text as OpenAI's tokenizer does before it looks for words, in time that grows linearly with the text.

The text is repaired by ftfy, html entities are unescaped twice, white space is folded, and the case is lowered. Three
parts of this take more than linear time, or fail, on some texts. Each of them is replaced by a way to the same text, or
ends in a clear error:

- ftfy repeats its steps until the text no longer changes, so 16,000 nested entities take 16,000 rounds. Here many
  rounds that only shorten `&amp;amp;amp;` are done at once, and the number of rounds is limited.
- Python's NFC sorts combining marks by insertion, in quadratic time. Here they are sorted before.
- `html.unescape` fails on a number of more than 4,300 digits. Here such a number is shortened before.
"""

import html
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import regex

Prepared = TypeVar("Prepared")

LONG_TEXT = 1000
"""Longest text that ftfy itself repairs, which takes up to a tenth of a second. Longer texts are repaired here."""

ROUNDS = 64
"""Largest number of rounds over a long text. Ordinary texts need up to five."""

_UNUSUAL_ASCII = bytes([*range(9), 11, 12, *range(14, 32), 127]) + b"&"
"""ASCII characters that repair may change: control characters except tab and line ends, and `&` of html entities."""

STRAIGHT_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})
WITHOUT_DASHES = str.maketrans({"–": None, "—": None, "…": None})

_NESTED = re.compile(r"&(?:amp;)+")
_LEADING_ZEROS = re.compile(r"(?<=&#)0+(?=[0-9])")
_TOO_LARGE = re.compile(r"(?<=&#)[1-9][0-9]{7,}")


class TextError(ValueError):
    """A text cannot be tokenized.

    The message is made of the attributes. A caller who knows more of where the text was sets them.

    Attributes:
        problem: What is wrong with the text. It follows the text's name in the message.
        index: Place of the text among the texts, from 0. For a prompt: place of its label. None: not known.
        text: The text, or None where only its place is known.
        is_prompt: Whether the text was made of a label and a template.
    """

    def __init__(self, problem: str, index: int | None = None):
        super().__init__(problem)
        self.problem, self.index = problem, index
        self.text: str | None = None
        self.is_prompt = False

    def __str__(self) -> str:
        if self.text is not None and self.is_prompt:
            return f"The prompt {self.text[:200]!r} {self.problem}"
        if self.text is not None:
            return f"texts[{self.index}] ({self.text[:80]!r}) {self.problem}"
        return self.problem if self.index is None else f"Text {self.index} {self.problem}"


def is_plain(text: str) -> bool:
    """Whether `repair_text` would change nothing in a text except white space and case."""
    return text.isascii() and len(text.encode().translate(None, _UNUSUAL_ASCII)) == len(text)


@cache
def import_ftfy() -> Any:
    """Return ftfy, which is imported when the first text needs repair: texts in plain ASCII need none."""
    try:
        import ftfy
        import ftfy.badness
        import ftfy.chardata
    except ImportError:
        return None
    return ftfy


def repair_text(text: str) -> str:
    """Repair a text as OpenAI's tokenizer does: ftfy, html entities unescaped twice, white space folded, lower case.

    Raises:
        TextError: The repair of a long text takes too many rounds, as that of a hostile text can.
        ImportError: ftfy is not installed.
    """
    if (ftfy := import_ftfy()) is None:
        raise ImportError(f"Tokenizing {text[:40]!r} needs ftfy, which repairs Unicode text: pip install ftfy")
    fixed = ftfy.fix_text(text) if len(text) <= LONG_TEXT else fix_long_text(text)
    repaired = unescape(unescape(fixed)).strip()
    return regex.sub(r"\s+", " ", repaired).strip().lower()


def repair_where_needed(text: str) -> str:
    """Repair a text only if it needs repair. Once lowered, the result has the same words as `repair_text(text)`.

    Most texts are plain and stay as they are. Curly quotes are straightened here, which ftfy would take a hundred times
    as long for. In a text that is plain except for curly quotes, dashes and ellipses ftfy changes nothing else: in no
    single-byte encoding are these characters valid UTF-8, so the text cannot be mojibake.
    """
    if is_plain(text):
        return text
    straight = text.translate(STRAIGHT_QUOTES)
    return straight if is_plain(straight.translate(WITHOUT_DASHES)) else repair_text(text)


def prepare_text(text: str) -> str:
    """Return the text in which words are found. Unless it needs repair, its characters keep their places."""
    return repair_where_needed(text).lower()


def prepare_one(prepare: Callable[[str], Prepared], text: str, index: int) -> Prepared:
    """Return `prepare(text)`. If that fails, raises TextError with the text's place."""
    try:
        return prepare(text)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise TextError(f"cannot be tokenized: {reason}. Leave it out, or clean it.", index) from error


def prepare_each(prepare: Callable[[str], Prepared], texts: list[str]) -> list[Prepared]:
    """Apply `prepare` to each text. If it fails for one of them, raises TextError with that text's place."""
    try:
        return list(map(prepare, texts))
    except Exception:
        return [prepare_one(prepare, text, index) for index, text in enumerate(texts)]


def unescape(text: str) -> str:
    """Compute `html.unescape(text)`. It fails on more than 4,300 digits, so numbers beyond Unicode are shortened."""
    if "&#" in text:
        text = _TOO_LARGE.sub("99999999", _LEADING_ZEROS.sub("", text))
    return html.unescape(text)


class Work:
    """Counts the characters that the repair of a text has processed, and raises TextError beyond a limit."""

    def __init__(self, text: str):
        self.text, self.left = text, ROUNDS * len(text) + 10_000

    def spend(self, characters: int) -> None:
        """Count characters as processed. Raises TextError once the limit is exceeded."""
        self.left -= characters
        if self.left < 0:
            raise TextError(
                f"its {len(self.text):,} characters, {self.text[:40]!r}…, still change after {ROUNDS} rounds of "
                f"repair, as html entities or mojibake in many layers do"
            )


def fix_long_text(text: str) -> str:
    """Compute `ftfy.fix_text(text)`, line by line as ftfy does."""
    config, work = import_ftfy().TextFixerConfig(explain=False), Work(text)
    fixed, place = [], 0
    while place < len(text):
        end = text.find("\n", place) + 1 or len(text)
        line = text[place : min(end, place + config.max_decode_length)]
        if "<" in line:  # ftfy takes the rest of the text for HTML and keeps its entities
            config = config._replace(unescape_html=False)
        fixed.append(fix_line(line, config, work))
        place += len(line)
    return "".join(fixed)


def fix_line(line: str, config: Any, work: Work) -> str:
    """Compute `ftfy.fix_text_segment(line, config)`: repeat its steps until nothing changes."""
    ftfy = import_ftfy()
    rest = config._replace(unescape_html=False, fix_encoding=False, normalization=None)
    fixed = line
    while True:
        work.spend(len(fixed))
        before = fixed
        if config.unescape_html:
            fixed = ftfy.fixes.unescape_html(fixed)
        fixed = _fix_encoding(fixed, work)
        fixed = ftfy.fix_text_segment(fixed, rest)  # a single round: a second one would change nothing
        fixed = unicodedata.normalize("NFC", sort_marks(fixed))
        if fixed == before:
            return fixed
        if config.unescape_html and fixed == _unnest(before, 1):
            # Only nested entities became shorter in this round. The next rounds will do the same until one of them
            # ends, since no step looks beyond an entity. All these rounds are done at once.
            fixed = _unnest(fixed, max(0, min(map(_layers, _NESTED.findall(fixed)), default=0) - 2))


def _layers(nested: str) -> int:
    return nested.count("amp;")


def _unnest(text: str, layers: int) -> str:
    """Remove layers from every `&amp;amp;amp;…`."""
    return _NESTED.sub(lambda nested: nested[0][: len(nested[0]) - len("amp;") * layers], text) if layers else text


def _fix_encoding(text: str, work: Work) -> str:
    """Compute `ftfy.fix_encoding(text)`, and count every step as work."""
    while True:
        work.spend(len(text))
        before, text = text, _fix_encoding_once(text, work)
        if text == before:
            return text


def _fix_encoding_once(text: str, work: Work) -> str:
    """Do one step of `ftfy.fix_encoding`. Mojibake within other text is decoded here, and counted as work too."""
    ftfy = import_ftfy()
    is_bad = ftfy.badness.is_bad
    config = ftfy.TextFixerConfig(explain=False, decode_inconsistent_utf8=False)
    fixed, plan = ftfy._fix_encoding_one_step_and_explain(text, config)
    if not is_bad(text) or any(step[0] == "decode" and step[1].startswith("utf-8") for step in plan or ()):
        return fixed

    def undo(match: re.Match[str]) -> str:
        part = match[0]
        return _fix_encoding(part, work) if len(part) < len(text) and is_bad(part) else part

    undone = ftfy.chardata.UTF8_DETECTOR_RE.sub(undo, text)
    return fixed if undone == text else undone


def sort_marks(text: str) -> str:
    """Return a text with the same NFC, whose combining marks are decomposed and in the order of NFC."""
    if text.isascii():
        return text
    characters = {character: unicodedata.normalize("NFD", character) for character in set(text)}
    marks = {mark for parts in characters.values() for mark in parts if unicodedata.combining(mark)}
    if len({unicodedata.combining(mark) for mark in marks}) < 2:  # nothing to sort
        return text
    run = re.compile(f"[{re.escape(''.join(sorted(marks)))}]{{2,}}")
    decomposed = text.translate({ord(character): parts for character, parts in characters.items()})
    return run.sub(lambda found: "".join(sorted(found[0], key=unicodedata.combining)), decomposed)
