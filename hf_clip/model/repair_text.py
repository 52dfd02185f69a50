"""How OpenAI's tokenizer repairs a text before it cuts words, in time that grows with the text's length only.

The repair is ftfy's, then html entities unescaped twice, white space folded, lower case. Three things in it cost
more than linear time, or fail; here each gives the same text in another way, or one clear error:

- ftfy repeats its steps as long as the text changes: 16,000 nested entities are 16,000 rounds. A long text goes through
  the same rounds here, but many rounds that only shorten `&amp;amp;amp;` are made at once, and there is a limit.
- Python's NFC sorts combining marks by insertion. Here they are sorted before, which is what NFC does to them.
- `html.unescape` fails on a number of more than 4,300 digits. Here a long number is shortened before.
"""

import html
import re
import unicodedata

import regex

try:
    import ftfy
    import ftfy.chardata
    from ftfy import TextFixerConfig
    from ftfy.badness import is_bad
except ImportError:  # texts in plain ASCII need no repair
    ftfy = None

LONG_TEXT = 1000
"""Characters that ftfy alone repairs within a tenth of a second, whatever they are."""

ROUNDS = 64
"""How often every character of a long text may be worked on. What people write needs five rounds."""

_UNUSUAL_ASCII = bytes([*range(9), 11, 12, *range(14, 32), 127]) + b"&"
"""What repair may change in ASCII: control characters, but for tab and line ends, and entities."""

STRAIGHT_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})
WITHOUT_DASHES = str.maketrans({"–": None, "—": None, "…": None})

_NESTED = re.compile(r"&(?:amp;)+")
_LEADING_ZEROS = re.compile(r"(?<=&#)0+(?=[0-9])")
_TOO_LARGE = re.compile(r"(?<=&#)[1-9][0-9]{7,}")


class TextError(ValueError):
    """A text that cannot be tokenized.

    Attributes:
        problem: what is wrong with it, which follows its name in the message.
        index: its place among the texts, None where it is not known; of a prompt, its label's place.
    """

    def __init__(self, problem: str, index: int | None = None, name: str | None = None):
        name = f"Text {index}" if name is None and index is not None else name
        super().__init__(problem if name is None else f"{name} {problem}")
        self.problem, self.index = problem, index


def is_plain(text: str) -> bool:
    """Whether repair_text would do nothing to a text but fold white space and lower its case."""
    return text.isascii() and len(text.encode().translate(None, _UNUSUAL_ASCII)) == len(text)


def repair_text(text: str) -> str:
    """What OpenAI's tokenizer does to a text before it cuts words: ftfy, html entities twice, spaces, lower case.

    Raises TextError for a long text whose repair takes too many rounds, as hostile texts do.
    """
    if ftfy is None:
        raise ImportError(f"Tokenizing {text[:40]!r} needs ftfy, which repairs Unicode text: pip install ftfy")
    fixed = ftfy.fix_text(text) if len(text) <= LONG_TEXT else fix_long_text(text)
    repaired = unescape(unescape(fixed)).strip()
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


def unescape(text: str) -> str:
    """html.unescape, whose `int` refuses more than 4,300 digits: those of a number beyond Unicode do not matter."""
    if "&#" in text:
        text = _TOO_LARGE.sub("99999999", _LEADING_ZEROS.sub("", text))
    return html.unescape(text)


class Work:
    """What the repair of a text may cost, in characters that are worked on."""

    def __init__(self, text: str):
        self.text, self.left = text, ROUNDS * len(text) + 10_000

    def spend(self, characters: int) -> None:
        self.left -= characters
        if self.left < 0:
            raise TextError(
                f"its {len(self.text):,} characters, {self.text[:40]!r}…, still change after {ROUNDS} rounds of "
                f"repair, as html entities or mojibake in many layers do"
            )


def fix_long_text(text: str) -> str:
    """ftfy.fix_text(text), line by line as there."""
    config, work = TextFixerConfig(explain=False), Work(text)
    fixed, place = [], 0
    while place < len(text):
        end = text.find("\n", place) + 1 or len(text)
        line = text[place : min(end, place + config.max_decode_length)]
        if "<" in line:  # from here on the text is taken for HTML, whose entities stay
            config = config._replace(unescape_html=False)
        fixed.append(fix_line(line, config, work))
        place += len(line)
    return "".join(fixed)


def fix_line(line: str, config: "TextFixerConfig", work: Work) -> str:
    """ftfy.fix_text_segment(line, config): its steps are repeated until they change nothing."""
    rest = config._replace(unescape_html=False, fix_encoding=False, normalization=None)
    fixed = line
    while True:
        work.spend(len(fixed))
        before = fixed
        if config.unescape_html:
            fixed = ftfy.fixes.unescape_html(fixed)
        fixed = _fix_encoding(fixed, work)
        fixed = ftfy.fix_text_segment(fixed, rest)  # one round of these: a second would change nothing
        fixed = unicodedata.normalize("NFC", sort_marks(fixed))
        if fixed == before:
            return fixed
        if config.unescape_html and fixed == _unnest(before, 1):
            # Only these became shorter, and only these will before one of them ends: no step looks beyond its ends.
            fixed = _unnest(fixed, max(0, min(map(_layers, _NESTED.findall(fixed)), default=0) - 2))


def _layers(nested: str) -> int:
    return nested.count("amp;")


def _unnest(text: str, layers: int) -> str:
    """Take layers off every `&amp;amp;amp;…`."""
    return _NESTED.sub(lambda nested: nested[0][: len(nested[0]) - len("amp;") * layers], text) if layers else text


def _fix_encoding(text: str, work: Work) -> str:
    """ftfy.fix_encoding(text), where every step counts as work."""
    while True:
        work.spend(len(text))
        before, text = text, _fix_encoding_once(text, work)
        if text == before:
            return text


def _fix_encoding_once(text: str, work: Work) -> str:
    """One step of ftfy.fix_encoding. Mojibake within other text is undone here, by steps that count as work too."""
    config = TextFixerConfig(explain=False, decode_inconsistent_utf8=False)
    fixed, plan = ftfy._fix_encoding_one_step_and_explain(text, config)
    if not is_bad(text) or any(step[0] == "decode" and step[1].startswith("utf-8") for step in plan or ()):
        return fixed

    def undo(match: re.Match[str]) -> str:
        part = match[0]
        return _fix_encoding(part, work) if len(part) < len(text) and is_bad(part) else part

    undone = ftfy.chardata.UTF8_DETECTOR_RE.sub(undo, text)
    return fixed if undone == text else undone


def sort_marks(text: str) -> str:
    """A text with the same NFC, whose combining marks are decomposed and in the order that NFC wants."""
    if text.isascii():
        return text
    characters = {character: unicodedata.normalize("NFD", character) for character in set(text)}
    marks = {mark for parts in characters.values() for mark in parts if unicodedata.combining(mark)}
    if len({unicodedata.combining(mark) for mark in marks}) < 2:  # nothing to sort
        return text
    run = re.compile(f"[{re.escape(''.join(sorted(marks)))}]{{2,}}")
    decomposed = text.translate({ord(character): parts for character, parts in characters.items()})
    return run.sub(lambda found: "".join(sorted(found[0], key=unicodedata.combining)), decomposed)
