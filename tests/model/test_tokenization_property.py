"""For every string the ids are OpenAI's: arbitrary Unicode, and captions with everything that spoils them."""

import html
import random
import sys
import unicodedata

import ftfy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion.reference import load_reference_module
from hf_clip import HfClipTokenizer
from hf_clip.model.repair_text import (
    LONG_TEXT,
    TextError,
    fix_long_text,
    is_plain,
    repair_text,
    repair_where_needed,
    sort_marks,
    unescape,
)

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


@settings(max_examples=250, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(texts=st.lists(spoilt_captions(), min_size=2, max_size=6))
def test_ids_do_not_depend_on_company(tokenizer: HfClipTokenizer, texts: list[str]):
    together = tokenizer(texts, truncation=True, padding=False).input_ids
    assert together == [tokenizer(text, truncation=True).input_ids for text in texts]


@settings(max_examples=400, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(text=spoilt_captions())
def test_decoding_gives_what_the_references_decoding_gives(tokenizer: HfClipTokenizer, reference, text: str):
    ids = reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids).removesuffix(" ")


# --- long texts, whose repair would take quadratic time -----------------------------------------------------------

LAYERED = [
    "&amp;amp;amp;", "&" + "amp;" * 9, "&" + "amp;" * 40 + "lt;", "&" + "amp;" * 5 + "eacute;", "&#38;#38;#38;amp;",
    "&#x3" * 5 + "5" + ";" * 5, "&amp;Atilde;", "&Atilde;&amp;#x83;", "&am&#112;;", "＆ａｍｐ；",
    "&amp;amp;cent;&copy;",
    "Ã" + "\x83" * 7, "Ãƒƒƒ", "ÃÂ\x83Â\x83Â\x83", "ÃƒÂƒÃ‚Â©", "Ã\u0192Â©", "â€œ", "â€�", "í\xa0½í¸\x8d", "À\x80", "�",
    "\u0301\u0316\u0301\u0316", "a\u0316\u0f73\u0f73\u0301", "\u01d6\u0316\u0301", "\ud55c\u0301\u1161", "\u0344",
    "\n", "\r\n", "\r", "<", "Ã ", "à ", "œ", "”", "“", "é", "€", "\ud83d", "\ude00", "\x1b[", "m", "1;",
]  # fmt: skip
MOJIBAKE = "ÃÂâà€ƒ™œ¢©\x82\x83\xa0 a&;é”“’íÀ½¸\u0301\u0316"


def layered(generator: random.Random) -> str:
    if generator.random() < 0.3:
        return "".join(generator.choices(MOJIBAKE, k=generator.randint(1, 20)))
    pools = generator.choices([LAYERED, SPOILERS, WORDS], weights=[7, 2, 1], k=generator.randint(1, 12))
    return "".join(generator.choice(pool) for pool in pools)


def test_rounds_of_long_texts_give_what_ftfy_gives():
    generator = random.Random(2)
    for make in [layered] * 4000 + [mutate] * 1000:
        text = make(generator)
        assert fix_long_text(text) == ftfy.fix_text(text), ascii(text)


def test_ids_of_long_texts_on_either_side_of_the_limit(tokenizer: HfClipTokenizer, reference):
    """Texts as long as `LONG_TEXT`, a little less, a little more; also what stands behind the 75th token matters."""
    generator = random.Random(3)
    for number in range(60):
        text = ""
        while len(text) < LONG_TEXT - 40:
            text += generator.choice([mutate, layered])(generator) + generator.choice(["", " ", "\n"])
        text = text[: LONG_TEXT - 2] + "x" * (number % 5)
        assert len(text) >= LONG_TEXT - 40
        expected = [49406, *reference.encode(text), 49407]
        assert tokenizer([text], padding=False, verbose=False).input_ids[0] == expected, ascii(text)
        assert_same_ids(tokenizer, reference, text)


@settings(max_examples=1000, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(text=st.text(st.characters(min_codepoint=0x2F0, max_codepoint=0x1FFF) | st.sampled_from("a\u0301\u0316\u0f73ǖ")))
def test_sorted_marks_have_the_same_composition(text: str):
    assert unicodedata.normalize("NFC", sort_marks(text)) == unicodedata.normalize("NFC", text)


@settings(max_examples=1000, deadline=None, suppress_health_check=QUIET, derandomize=True)
@given(
    text=st.lists(st.sampled_from(["&#", "&#x", "&#X", "&amp;#", "0", "00000000", "9", "38", "65", ";", "x"])).map(
        "".join
    )
)
def test_numbers_are_unescaped_as_python_does_where_it_can(text: str):
    assert unescape(text) == html.unescape(text)


@pytest.mark.parametrize("number", ["9" * 5000, "0" * 5000 + "65", "x" + "0" * 5000 + "41", "0" * 5000 + "9" * 5000])
@pytest.mark.parametrize("before", ["&", "&amp;", "&amp;amp;", "&lt;&amp;", "<&amp;"])
def test_ids_of_numbers_with_more_digits_than_python_converts(
    tokenizer: HfClipTokenizer, reference, before: str, number: str
):
    """What OpenAI's code gives where Python's limit is lifted."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        expected = reference.encode(f"a {before}#{number}; cat")
    finally:
        sys.set_int_max_str_digits(limit)
    assert tokenizer(f"a {before}#{number}; cat").input_ids == [49406, *expected, 49407]


def test_texts_that_would_take_quadratic_time(tokenizer: HfClipTokenizer, reference):
    """Their ids follow from those of short texts: entities end as one, marks in their order."""
    nested = "&" + "amp;" * 50_000
    for end in (" cat", "eacute; cat", "lt;b&" + "amp;" * 70_000 + "gt;"):
        short = "“a” &amp;" + end.replace("amp;" * 70_000, "amp;")
        assert tokenizer(f"“a” {nested}{end}").input_ids == [49406, *reference.encode(short), 49407]
    marks = "a" + "\u0301\u0316" * 50_000
    assert repair_text(marks) == "\xe1" + "\u0316" * 50_000 + "\u0301" * 49_999
    word = tokenizer(marks, truncation=True).input_ids
    assert word == [49406, *reference.encode("\xe1" + "\u0316" * 500)[:75], 49407]


HOSTILE = {
    "numbers within numbers": "&#x3" * 4_000 + "5" + ";" * 4_000,
    "chain of mojibake": "Ã" + "ƒ" * 16_000,
    "chain within other text": "漢é" + "Ã" + "Â\x83" * 16_000,
    "chains in many lines": ("Ã" + "ƒ" * 990 + "\n") * 15,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_text_whose_repair_would_not_end_is_an_error_with_its_index(tokenizer: HfClipTokenizer, name: str):
    for arguments in ({}, {"return_offsets_mapping": True}):
        message = "Text 1 cannot be tokenized: its .* characters, .*still change after 64 rounds of repair"
        with pytest.raises(TextError, match=message) as caught:
            tokenizer(["a cat", HOSTILE[name], "a dog"], truncation=True, **arguments)
        assert caught.value.index == 1
    assert len(str(caught.value)) < 1000


def test_whatever_fails_within_repair_carries_the_index(tokenizer: HfClipTokenizer, monkeypatch: pytest.MonkeyPatch):
    def fail(text: str) -> str:
        raise AssertionError

    monkeypatch.setattr(ftfy, "fix_text", fail)
    with pytest.raises(ValueError, match="Text 2 cannot be tokenized: AssertionError. Leave it out") as caught:
        tokenizer(["a", "b", "schÃ¶n"])
    assert caught.value.index == 2
