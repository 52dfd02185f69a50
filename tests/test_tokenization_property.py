"""For every string the ids are OpenAI's: arbitrary Unicode, and captions with everything that spoils them."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion.reference import load_reference_module
from hf_clip import HfClipTokenizer
from hf_clip.repairing_hf_clip import is_plain, repair_text, repair_where_needed

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

WORDS = "a photo of the cat dog IT'S we'Ll they'RE i'm I'd You've 1950's x2 naive cafe don't rock'n'roll".split()  # noqa: SIM905
SPOILERS = [
    "’s", "‘quoted’", "“quoted”", "ʼs", "`s", "´s", "'S", "'ſ", "'T", "''s",  # apostrophes
    "&amp;", "&lt;b&gt;", "&rsquo;", "&amp;amp;", "&#39;", "&#x2019;s", "&nbsp;", "&copy", "&AMP;", "&;", "<b>", "<",
    "&ldquo;", "schÃ¶n", "âœ”", "â€™s", "Ã©tÃ©", "l’Ã©tÃ©", "Â£5", "ÐšÐ¾ÑˆÐºÐ°", "æ—¥æœ¬", "cafÃ\xa0",  # mojibake
    "e\u0301", "o\u0308\u0304", "\u0301", "a\u20dd", "ñ", "n\u0303", "\u1e9b\u0323",  # combining marks
    "👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇨🇭", "☕️", "😀😀", "\ud83d\ude00", "\ud83d", "\udc00x",  # emoji, surrogates
    "שלום", "مرحبا", "\u202eabc\u202c", "\u200f", "\u200b", "\u200d", "\u2060", "\ufeff", "\xad",  # direction, no width
    "\x00", "\x07", "\x0b", "\x0c", "\x1b[31mred\x1b[0m", "\x1c", "\x1f", "\x7f", "\x80", "\x85", "\x9f",  # control
    "\t", "\n", "\r\n", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000", "  ",  # white space
    "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<<|endoftext|>>", "<|endof", "text|>", "</w>", "<|", "|>",
    "ſtraße", "İstanbul", "ı", "ẞ", "ΑΣ", "ΑΣ.", "ς", "ǅ", "ŉ", "ŀ", "K", "Å",  # case
    "Ⅷ", "ⅷ", "½", "²", "①", "٣", "४", "𝟘", "〇", "1²3",  # numerals
    "ﬁ", "ﬄ", "ĳ", "ｆｕｌｌ", "！", "ﾊﾝｶｸ", "㍿", "ℌ", "𝔘", "漢字", "한국어", "ไทย", "हिन्दी",  # forms, scripts
    "…", "–", "—", "•", "™", "_", "-", "--", "'", '"', "\\", "^", "~", "$19.99", "50%", "#1", "@x", "http://a.b/c?d=e&f=g",
    "\u0378", "\U000e0041", "\ue000", "\U0001fae8", "\uffff", "\U0010ffff",  # not assigned, private, not a character
]  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    return load_reference_module("simple_tokenizer").SimpleTokenizer()


@st.composite
def spoilt_captions(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.sampled_from(WORDS + SPOILERS) | st.text(max_size=3), min_size=1, max_size=12))
    return "".join(part + draw(st.sampled_from(["", " ", " "])) for part in parts)


def mutate(generator: random.Random) -> str:
    """A caption with something done to it."""
    parts = [generator.choice(WORDS if generator.random() < 0.6 else SPOILERS) for _ in range(generator.randint(1, 14))]
    text = "".join(part + generator.choice(["", " ", " "]) for part in parts)
    kind = generator.randrange(6)
    if kind == 0:  # read in the wrong encoding
        encoding = generator.choice(["latin-1", "cp1252", "cp1251", "mac_roman", "cp437"])
        return text.encode("utf-8", "replace").decode(encoding, "replace")
    if kind == 1:
        return generator.choice([str.upper, str.title, str.swapcase, str.capitalize])(text)
    if kind == 2:  # any character at all
        place = generator.randrange(len(text) + 1)
        return text[:place] + chr(generator.randrange(0x110000)) + text[place:]
    if kind == 3:
        return "".join(f"&#{ord(character)};" if generator.random() < 0.3 else character for character in text)
    return text


def assert_same_ids(tokenizer: HfClipTokenizer, reference, text: str) -> None:
    expected = [49406, *reference.encode(text)[:75], 49407]
    assert tokenizer([text, "a"], truncation=True, padding=False).input_ids[0] == expected, ascii(text)


@settings(max_examples=1500, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(text=st.text())
def test_arbitrary_unicode(tokenizer: HfClipTokenizer, reference, text: str):
    assert_same_ids(tokenizer, reference, text)


@settings(max_examples=2000, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(text=spoilt_captions())
def test_spoilt_captions(tokenizer: HfClipTokenizer, reference, text: str):
    assert_same_ids(tokenizer, reference, text)


def test_mutated_captions(tokenizer: HfClipTokenizer, reference):
    generator = random.Random(0)
    for _ in range(4000):
        assert_same_ids(tokenizer, reference, mutate(generator))


@pytest.mark.slow
def test_a_hundred_thousand_mutated_captions(tokenizer: HfClipTokenizer, reference):
    generator = random.Random(1)
    for _ in range(100_000):
        assert_same_ids(tokenizer, reference, mutate(generator))


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=QUIET)
@given(text=st.text() | spoilt_captions())
def test_twenty_thousand_arbitrary_texts(tokenizer: HfClipTokenizer, reference, text: str):
    assert_same_ids(tokenizer, reference, text)


@pytest.mark.parametrize("word", ["a" * 10_000, "1" * 10_000, "!" * 10_000, "é" * 5_000, "it’s " * 3_000])
def test_very_long_words(tokenizer: HfClipTokenizer, reference, word: str):
    assert_same_ids(tokenizer, reference, word)


def test_every_character_alone(tokenizer: HfClipTokenizer, reference):
    """Each of the first 65,536 code points within a word, in batches as users send them."""
    texts = [f"a{chr(code)}B" for code in range(0, 0x10000, 7)]
    found = tokenizer(texts, padding=False, truncation=True).input_ids
    for text, ids in zip(texts, found, strict=True):
        assert ids == [49406, *reference.encode(text)[:75], 49407], ascii(text)


@settings(max_examples=1500, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(text=st.text(st.characters(max_codepoint=127)) | spoilt_captions())
def test_plain_text_needs_no_repair(text: str):
    """`is_plain` may err on one side only: it never lets pass what repair would change."""
    if is_plain(text):
        assert repair_text(text) == " ".join(text.split()).lower()


@settings(max_examples=3000, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(text=st.text(st.sampled_from("‘’“”–—…\"'s tLÀà\t\u00c3Ãâ€&;<")) | st.text(st.characters(max_codepoint=127)))
def test_quick_repair_gives_what_repair_gives(text: str):
    """Quotes, dashes and ellipses among letters of which mojibake is made: the short way never differs."""
    assert " ".join(repair_where_needed(text).lower().split()) == repair_text(text)


def test_quick_repair_is_taken_and_right_for_every_pair_of_its_characters():
    special = "‘’“”–—…"
    for first in special:
        for second in special:
            for text in (f"{first}{second}", f"a{first} {second}b", f"x{first}{second}{first}y", f"{first}\t{second}"):
                straight = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
                assert repair_where_needed(text) == straight
                assert repair_text(text) == " ".join(straight.split())


@settings(max_examples=500, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(texts=st.lists(spoilt_captions(), min_size=2, max_size=6))
def test_ids_do_not_depend_on_company(tokenizer: HfClipTokenizer, texts: list[str]):
    together = tokenizer(texts, truncation=True, padding=False).input_ids
    assert together == [tokenizer(text, truncation=True).input_ids for text in texts]


@settings(max_examples=800, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(text=spoilt_captions())
def test_decoding_gives_what_the_references_decoding_gives(tokenizer: HfClipTokenizer, reference, text: str):
    ids = reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids).removesuffix(" ")
