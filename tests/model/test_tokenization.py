"""The tokenizer against the reference implementation's, and what surrounds it: padding, errors, files."""

import copy
import gzip
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conversion.reference import load_reference_module
from demo.digits import COMBINATIONS, PHRASES
from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipProcessor, HfClipTokenizer
from hf_clip.model.bpe import byte_alphabet, read_merges
from hf_clip.model.repair_text import TextError

from ..warm_python import run_warm

CAPTIONS = [
    "a photo of a cat",
    "A photo of a CAT.",
    "two dogs playing in the snow, one of them jumping over the other",
    "a diagram",
    "it's the photographer's dog; they're happy, we've seen it, I'm sure you'll agree he'd bark",
    "  leading,   inner\tand\ntrailing white space  ",
    "a 1950's black-and-white photo of 42 people",
    "price: $19.99 (50% off!!!)",
    "an image of a pokémon",
    "café in Zürich, naïve façade",
    "東京タワーの写真",
    "фотография кошки",
    "a photo of 🐱🐶 and 👩‍👩‍👧",
    "it’s a “curly” quote – and a dash — and an ellipsis…",
    "AT&amp;T &lt;b&gt; &amp;amp; Marks &amp; Spencer",
    "x^2 + y_1 = z~ `code` {a} [b] \\ / | @#",
    "",
    " ",
    "<|startoftext|> quoted <|endoftext|>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "ﬁne ligatures, ｆｕｌｌ　ｗｉｄｔｈ, soft­hyphen, zero​width",
    "mojibake: schÃ¶n âœ”",
    "İstanbul ſtraße ẞ",
]


@pytest.fixture(scope="module")
def reference_encode():
    return load_reference_module("simple_tokenizer").SimpleTokenizer().encode


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ids_equal_the_reference_tokenizers(tokenizer: HfClipTokenizer, reference_encode, caption: str):
    assert tokenizer(caption, truncation=True).input_ids == [49406, *reference_encode(caption)[:75], 49407]


def test_ids_equal_on_every_caption_of_the_demo(tokenizer: HfClipTokenizer, reference_encode):
    captions = [combination.caption(phrase) for combination in COMBINATIONS for phrase in PHRASES]
    found = tokenizer(captions, padding=False).input_ids
    assert found == [[49406, *reference_encode(caption), 49407] for caption in captions]


def test_ids_equal_on_the_documentation_of_a_large_package(tokenizer: HfClipTokenizer, reference_encode):
    """Real English prose in quantity: every docstring line of torch.nn.functional."""
    lines = {
        line.strip()
        for name in dir(torch.nn.functional)
        for line in (getattr(torch.nn.functional, name).__doc__ or "").splitlines()
    }
    lines = sorted(line for line in lines if line)
    assert len(lines) > 500
    found = tokenizer(lines, padding=False, truncation=True).input_ids
    assert found == [[49406, *reference_encode(line)[:75], 49407] for line in lines]


def test_batch_is_padded_to_its_longest_text_with_the_end_of_text(tokenizer: HfClipTokenizer):
    batch = tokenizer(["a cat", "a photo of a cat"], return_tensors="pt")
    assert batch.input_ids.tolist() == [
        [49406, 320, 2368, 49407, 49407, 49407, 49407],
        [49406, 320, 1125, 539, 320, 2368, 49407],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]


def test_padding_can_be_chosen(tokenizer: HfClipTokenizer):
    assert tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids.shape == (1, 77)
    assert [len(ids) for ids in tokenizer(["a", "a cat"], padding=False).input_ids] == [3, 4]


def test_text_that_is_too_long_is_kept_with_a_warning_unless_truncated(
    vocabulary: Path, monkeypatch: pytest.MonkeyPatch
):
    from hf_clip.model.tokenization_hf_clip import logger

    tokenizer, warnings = HfClipTokenizer.from_vocabulary_file(vocabulary), []
    monkeypatch.setattr(logger, "warning", warnings.append)
    texts = ["short", "word " * 76]
    assert tokenizer(texts, return_tensors="pt").input_ids.shape == (2, 78)
    assert tokenizer(texts, return_offsets_mapping=True).input_ids[1][-1] == 49407
    assert warnings == [
        "Text 1 has 78 tokens, start and end included, but the model takes 77 and refuses more. Shorten it, or pass "
        "truncation=True, which keeps the end of the text marked."
    ]  # once, as stock tokenizers do
    batch = tokenizer(texts, truncation=True, return_tensors="pt")
    assert batch.input_ids.shape == (2, 77)
    assert batch.input_ids[1, -1] == 49407
    assert tokenizer("word " * 75, return_tensors="pt").input_ids.shape == (1, 77)


EXTRAS = ["return_offsets_mapping", "return_special_tokens_mask", "return_token_type_ids", "return_length"]


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_no_texts_give_arrays_of_no_row(tokenizer: HfClipTokenizer, kind: str):
    """As long as the shortest text's rows, so that a model can take them."""
    for settings, length in (({}, 2), ({"padding": "max_length"}, 77), ({"pad_to_multiple_of": 8}, 8)):
        batch = tokenizer([], return_tensors=kind, **settings)
        assert batch.input_ids.shape == batch.attention_mask.shape == (0, length)
        assert batch.input_ids.dtype == tokenizer(["a"], return_tensors=kind).input_ids.dtype
    some = tokenizer(["a"], return_tensors=kind, **dict.fromkeys(EXTRAS, True))
    none = tokenizer([], return_tensors=kind, **dict.fromkeys(EXTRAS, True))
    assert some.keys() == none.keys()
    for name in some:
        assert (none[name].ndim, len(none[name])) == (some[name].ndim, 0), name


def test_no_texts_give_empty_lists(tokenizer: HfClipTokenizer):
    assert dict(tokenizer([])) == {"input_ids": [], "attention_mask": []}
    assert dict(tokenizer([], padding=False, return_length=True)) == {
        "input_ids": [],
        "attention_mask": [],
        "length": [],
    }
    assert tokenizer([]).encodings == []


def test_decoding_gives_the_words_back(tokenizer: HfClipTokenizer):
    assert tokenizer.decode([]) == ""
    assert tokenizer.batch_decode([[49406, 320, 49407], [49407]], skip_special_tokens=True) == ["a", ""]
    ids = tokenizer("A photo of a naïve café, 東京!").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a photo of a naïve café , 東京 !"


@pytest.mark.parametrize("way", ["saved", "pickled", "auto"])
def test_tokenizer_survives_being_stored(tokenizer: HfClipTokenizer, way: str, tmp_path: Path):
    if way == "pickled":
        other = pickle.loads(pickle.dumps(tokenizer))
    else:
        tokenizer.save_pretrained(tmp_path)
        HfClipConfig().save_pretrained(tmp_path)
        other = (HfClipTokenizer if way == "saved" else AutoTokenizer).from_pretrained(tmp_path)
    assert type(other) is HfClipTokenizer
    assert len(other) == 49408
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (49406, 49407, 49407)
    assert other.model_max_length == 77
    assert other(CAPTIONS, truncation=True).input_ids == tokenizer(CAPTIONS, truncation=True).input_ids
    ids = tokenizer("A photo of a cat.").input_ids
    assert other.decode(ids) == tokenizer.decode(ids)


def test_byte_alphabet_is_the_references():
    assert byte_alphabet() == list(load_reference_module("simple_tokenizer").bytes_to_unicode().values())


# --- vocabularies of one's own -------------------------------------------------------------------------------------


def test_trained_vocabulary_covers_what_it_never_saw():
    tokenizer = HfClipTokenizer.train_from_iterator(["a red seven", "a green seven on red paper"] * 5, 560)
    assert len(tokenizer) <= 560
    assert len(tokenizer("a red seven").input_ids) == 5  # whole words became tokens
    for text in ("blue Äpfel", "七"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.lower()


def test_trained_vocabulary_has_no_more_ids_than_asked_for():
    tokenizer = HfClipTokenizer.train_from_iterator(["some words to learn from, many of them"] * 3, 520)
    assert len(tokenizer) == 520
    assert tokenizer.eos_token_id == 519


def test_vocabulary_learned_from_the_mark_of_word_ends_itself():
    """Tokens that look like ends of words and are none must not confuse which ids belong to which chunk."""
    texts = ["</w> a</w>b x</w>y </w></w>"] * 20 + ["</ w> /w> a b"] * 5
    tokenizer = HfClipTokenizer.train_from_iterator(texts, 540)
    for text in [*texts[-1:], texts[0], "a </w> b </w>x a</w> y", "</w></w></w> z"]:
        quick = tokenizer(text, return_tensors="np").input_ids[0].tolist()
        assert quick == tokenizer(text, return_tensors="np", return_special_tokens_mask=True).input_ids[0].tolist()


def test_vocabulary_too_small_for_bytes_is_an_error():
    with pytest.raises(ValueError, match="vocab_size is 500, but bytes and special tokens alone take 514 ids"):
        HfClipTokenizer.train_from_iterator(["a"], 500)


def test_missing_vocabulary_file_says_what_brings_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary file .*nowhere\.gz.*pip install openai-clip"):
        HfClipTokenizer.from_vocabulary_file(tmp_path / "nowhere.gz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 1 lines"),
        (b"#version\na b\n", "at least 48894 lines with two symbols each"),
        (gzip.compress(b"#version\n" + b"a b c\n" * 50000, mtime=0), "doesn't fit 49408 ids"),
        (gzip.compress(b"#version\n" + b"a b\n" * 50000, mtime=0)[:-200], "no readable vocabulary file"),
        (b"\xff\xfe\x00", "no readable vocabulary file"),
        (b"#version\n" + b"a b\n" * 50000, "line 3: 'a' and 'b' don't make a new token"),
        (b"#version\nzzqq a\n" + b"a b\n" * 50000, "line 2: 'zzqq' and 'a' don't make a new token"),
    ],
    ids=["empty", "short", "three symbols", "truncated", "not text", "known token", "unknown symbol"],
)
def test_file_that_is_no_vocabulary_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "vocabulary.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        HfClipTokenizer.from_vocabulary_file(path)


def test_vocabulary_without_word_ends_is_another_models(tmp_path: Path):
    (tmp_path / "merges.txt").write_text("#version\nt h\ni n\nth e\n")
    with pytest.raises(ValueError, match="marks no end of a word with </w>.*another model's"):
        HfClipTokenizer.from_vocabulary_file(tmp_path / "merges.txt", vocab_size=517)


def test_merges_are_read_compressed_or_plain(vocabulary: Path, tmp_path: Path):
    plain = tmp_path / "merges.txt"
    plain.write_bytes(gzip.decompress(vocabulary.read_bytes()))
    merges = read_merges(plain)
    assert merges == read_merges(vocabulary)
    assert len(merges) == 49408 - 514
    assert merges[0] == ("i", "n")


# --- the surface of a stock tokenizer ------------------------------------------------------------------------------

MIXED = ["a cat", "It’s a café!", "", "two DOGS\tand a cat", "<b>&rsquo;s</b>", "<|ENDOFTEXT|> in <|startoftext|> text"]


@pytest.mark.parametrize("padding", [True, "max_length"])
@pytest.mark.parametrize(("truncation", "multiple"), [(None, None), (6, None), (3, None), (None, 8), (8, 4)])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("special", [True, False])
def test_remembered_chunks_give_what_the_stock_machinery_gives(
    tokenizer: HfClipTokenizer, padding: object, truncation: int | None, side: str, special: bool, multiple: int | None
):
    """The quick way, by chunks, against the thorough one, by `tokenizers`' encodings."""
    settings = {"padding": padding, "add_special_tokens": special, "padding_side": side, "pad_to_multiple_of": multiple}
    settings |= {"truncation": True, "max_length": truncation} if truncation else {}
    tokenizer.truncation_side = side
    try:
        quick = tokenizer(MIXED, return_tensors="np", **settings)
        thorough = tokenizer(MIXED, return_tensors="np", return_special_tokens_mask=True, **settings)
    finally:
        tokenizer.truncation_side = "right"
    assert quick.input_ids.tolist() == thorough.input_ids.tolist()
    assert quick.attention_mask.tolist() == thorough.attention_mask.tolist()


def test_lists_tensors_and_encodings_agree(tokenizer: HfClipTokenizer):
    lists = tokenizer(MIXED, padding=False)
    tensors = tokenizer(MIXED, return_tensors="pt")
    for row, ids in enumerate(lists.input_ids):
        assert tensors.input_ids[row, : len(ids)].tolist() == ids
        assert lists.attention_mask[row] == [1] * len(ids)
        assert lists.encodings[row].ids == ids
        assert lists.tokens(row)[0] == "<|startoftext|>"
        assert lists.word_ids(row)[-1] is None
    assert tensors.encodings[1].ids == tensors.input_ids[1].tolist()
    assert pickle.loads(pickle.dumps(lists)).input_ids == lists.input_ids
    # Padding that one call asks for must not reach what another one remembers.
    fresh = pickle.loads(pickle.dumps(tokenizer))
    assert len(fresh(["unheard words", "of"], padding=True).encodings) == 2
    assert fresh(["of", "unheard"], padding=False).input_ids == tokenizer(["of", "unheard"], padding=False).input_ids


def test_one_text_gives_one_row(tokenizer: HfClipTokenizer):
    assert tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
    assert tokenizer("a cat").tokens() == ["<|startoftext|>", "a</w>", "cat</w>", "<|endoftext|>"]
    assert tokenizer("a cat", return_tensors="pt").input_ids.shape == (1, 4)
    assert tokenizer.encode("a cat") == [49406, 320, 2368, 49407]
    assert tokenizer.tokenize("a cat") == ["a</w>", "cat</w>"]


def test_offsets_point_into_the_text_as_it_is_cut(tokenizer: HfClipTokenizer):
    text = "Two  DOGS,\nit's"
    found = tokenizer(text, return_offsets_mapping=True)
    words = [text[start:end] for start, end in found.offset_mapping]
    assert words == ["", "Two", "DOGS", ",", "it", "'s", ""]
    repaired = tokenizer("ｆｕｌｌ  ｗｉｄｔｈ", return_offsets_mapping=True, return_special_tokens_mask=True)
    assert repaired.offset_mapping == [(0, 0), (0, 4), (5, 10), (0, 0)]
    assert repaired.special_tokens_mask == [1, 0, 0, 1]


def test_characters_tokens_and_words_are_found_from_each_other(tokenizer: HfClipTokenizer):
    text = "Two  DOGS, supercalifragilistic"
    found = tokenizer([text, "one"])
    for encoded in (found, pickle.loads(pickle.dumps(found))):
        spans = [encoded.token_to_chars(0, token) for token in range(len(encoded.tokens(0)))]
        assert [text[span.start : span.end] for span in spans[1:4]] == ["Two", "DOGS", ","]
        assert spans[0] is spans[-1] is None
        assert "".join(text[span.start : span.end] for span in spans[4:-1]) == "supercalifragilistic"
        assert [encoded.char_to_token(0, text.index(part)) for part in ("Two", "DOGS", ",", "super")] == [1, 2, 3, 4]
        assert encoded.char_to_token(0, 3) is None  # a space
        assert encoded.char_to_word(0, len(text) - 1) == 3
        assert encoded.word_to_chars(0, 3) == (text.index("super"), len(text))
        assert encoded.token_to_chars(1, 1) == (0, 3)


def test_tokenizer_without_a_special_token_says_so(vocabulary: Path):
    tokenizer = HfClipTokenizer.from_vocabulary_file(vocabulary)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"has bos_token None, eos_token '<\|endoftext\|>' and .* needs all three"):
        tokenizer("a cat")


def test_long_texts_can_be_measured(tokenizer: HfClipTokenizer):
    assert len(tokenizer.tokenize("word " * 100)) == 100
    assert len(tokenizer("word " * 100, add_special_tokens=False).input_ids) == 100


def test_added_tokens_are_kept_whole(vocabulary: Path):
    tokenizer = HfClipTokenizer.from_vocabulary_file(vocabulary)
    before = tokenizer("a photo of <my-Toy>", return_tensors="pt").input_ids
    assert tokenizer.add_tokens(["<my-Toy>", "two words"]) == 2
    for settings in ({}, {"return_tensors": "pt"}):
        ids = (
            torch.as_tensor(tokenizer("A photo of <my-Toy> – with two words", **settings).input_ids).flatten().tolist()
        )
        assert ids.count(49408) == ids.count(49409) == 1
        assert ids[1:4] == [320, 1125, 539]
    assert before.max() < 49408
    # `tokenizers` shows an added token as its normalizer would, in lower case.
    assert tokenizer.decode(tokenizer("<my-Toy>").input_ids, skip_special_tokens=True).strip() == "<my-toy>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("a cat", "a dog"), "a pair of texts, but CLIP reads single ones"),
        (([["a cat", "a dog"]],), "Text 0 is a list, but a list of texts is needed"),
        ((["a cat", None],), "Text 1 is a NoneType"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer: HfClipTokenizer, call: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        tokenizer(*call)


def test_words_cut_elsewhere_are_refused(tokenizer: HfClipTokenizer):
    with pytest.raises(ValueError, match="cuts words itself"):
        tokenizer([["a", "cat"]], is_split_into_words=True)


def test_texts_that_need_repair_among_plain_ones(tokenizer: HfClipTokenizer):
    """Plain texts are looked at in groups; a text is repaired wherever it stands in its group."""
    texts = [f"plain text {number}" for number in range(100)]
    for place in (0, 31, 32, 50, 99):
        texts[place] = f"AT&amp;T it’s {place}"
    assert tokenizer(texts, padding=False).input_ids == [tokenizer(text).input_ids for text in texts]


def test_memory_of_chunks_is_bounded(vocabulary: Path, monkeypatch: pytest.MonkeyPatch):
    from hf_clip.model import chunk_memory as module

    monkeypatch.setattr(module, "MOST_CHUNKS", 50)
    tokenizer = HfClipTokenizer.from_vocabulary_file(vocabulary)
    for start in range(0, 400, 40):
        texts = [f"number {number}" for number in range(start, start + 40)]
        found = tokenizer(texts, padding=False).input_ids
        assert len(tokenizer._memory.known.ids) <= 91
        assert found == [tokenizer(text).input_ids for text in texts]


# --- tokenizer.json without this class -----------------------------------------------------------------------------

REPAIRED_IN_RUST = [
    "it’s a “quoted” ‘word’ ʼtis",
    "ﬁne ﬄuﬀy ĳs Ǆ ŉ",
    "ｆｕｌｌ　ｗｉｄｔｈ！ ￥５",
    "zero\x00 bell\x07 del\x7f bom\ufeff deprecated\u206a",
    "\x1b[31mred\x1b[0m",
    "tabs\tand\nlines\r\n and\u2003wide\xa0space\u3000",
    "e\u0301 composed, ñ too",
    "A Photo Of A CAT, İstanbul, ſtraße",
    "👩‍👩‍👧 東京 кошка قطة",
]
LEFT_TO_THE_CLASS = ["AT&amp;T", "schÃ¶n", "ΑΣ", "a <|ENDOFTEXT|> b", "ﾊﾝｶｸ"]


def test_file_alone_gives_the_same_ids_for_typographic_text(tokenizer: HfClipTokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in REPAIRED_IN_RUST:
        assert alone.encode(text).ids == tokenizer(text).input_ids, ascii(text)
    # What the documentation lists as different is different; a text that has become equal leaves that list.
    for text in LEFT_TO_THE_CLASS:
        assert alone.encode(text).ids != tokenizer(text).input_ids, ascii(text)
    ids = tokenizer("a photo of a naïve café!").input_ids
    assert alone.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_stock_class_reads_the_file(tokenizer: HfClipTokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert not isinstance(stock, HfClipTokenizer)
    batch = stock(["it’s a cat", "a"], padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, tokenizer(["it’s a cat", "a"], return_tensors="pt").input_ids)
    assert stock.model_max_length == 77


FORKING = """
import os, sys
from hf_clip import HfClipTokenizer
tokenizer = HfClipTokenizer.from_vocabulary_file(sys.argv[1])
texts = [f"text {number} it’s" for number in range(3000)]
expected = tokenizer(texts, return_tensors="pt").input_ids
child = os.fork()
if child == 0:
    again = tokenizer([*texts, "a new word"], return_tensors="pt").input_ids[:-1]
    os._exit(0 if (again == expected).all() and tokenizer(["lists"]).encodings else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_process_tokenizes_without_a_warning(vocabulary: Path):
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-c", FORKING, str(vocabulary)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "fork" not in done.stderr


def test_threads_share_one_tokenizer(vocabulary: Path, monkeypatch: pytest.MonkeyPatch):
    from hf_clip.model import chunk_memory as module

    monkeypatch.setattr(module, "MOST_CHUNKS", 300)
    tokenizer = HfClipTokenizer.from_vocabulary_file(vocabulary)
    batches = [[f"word {a} and thing {b}" for b in range(40)] for a in range(60)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda texts: tokenizer(texts, padding=False).input_ids, batches))
    fresh = HfClipTokenizer.from_vocabulary_file(vocabulary)
    assert found == [fresh(texts, padding=False).input_ids for texts in batches]


def test_threads_with_different_settings_disturb_nobody(vocabulary: Path):
    """Truncation, padding, offsets, overflow and added tokens of one call never reach another's."""
    tokenizer = HfClipTokenizer.from_vocabulary_file(vocabulary)
    tokenizer.add_tokens(["<toy>"])
    text = "a photo of a large red cat with a <toy> on a small green house near the sea"
    calls = [
        {
            "truncation": True,
            "max_length": length,
            "return_offsets_mapping": True,
            "padding": padding,
            "padding_side": side,
        }
        for length, padding, side in [
            (5, True, "left"),
            (9, "max_length", "right"),
            (12, False, "left"),
            (70, True, "right"),
        ]
    ]
    calls += [{"truncation": True, "max_length": 6, "return_overflowing_tokens": True, "stride": 2}]
    wanted = [dict(tokenizer([text, "a cat"], **call)) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(lambda turn: dict(tokenizer([text, "a cat"], **calls[turn % 5])), range(1500)))
    assert all(found[turn] == wanted[turn % 5] for turn in range(1500))


def test_threads_may_ask_one_result_for_its_encodings(tokenizer: HfClipTokenizer):
    for _ in range(100):
        found = tokenizer(["a cat", "a dog sits"])
        with ThreadPoolExecutor(4) as pool:
            tokens = list(pool.map(lambda row: found.tokens(row), [0, 1, 0, 1]))  # noqa: B023
        assert [len(row) for row in tokens] == [5, 5, 5, 5]


FORKING_BESIDE_A_THREAD = """
import os, sys, threading, time
from hf_clip import HfClipTokenizer
tokenizer = HfClipTokenizer.from_vocabulary_file(sys.argv[1])
expected = tokenizer("a new wordling").input_ids
over = threading.Event()

def work():
    number = 0
    while not over.is_set():
        number += 1
        tokenizer([f"word{number}x{k}" for k in range(50)])
        tokenizer([f"word{number}y{k}" for k in range(5)], return_offsets_mapping=True)

threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
[thread.start() for thread in threads]
for turn in range(25):
    child = os.fork()
    if child == 0:
        same = tokenizer("a new wordling").input_ids == expected
        same = same and tokenizer(f"learnt in the child {turn}").input_ids[-1] == 49407
        os._exit(0 if same and tokenizer("a new wordling", return_offsets_mapping=True).input_ids == expected else 1)
    end = time.time() + 30
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.time() > end:
            os.kill(child, 9)
            sys.exit("a child hangs")
        time.sleep(0.002)
    if done[1]:
        sys.exit("a child failed")
over.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_while_other_threads_tokenize(vocabulary: Path):
    done = run_warm(FORKING_BESIDE_A_THREAD, vocabulary, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr


# --- what a tokenizer is, and what it only remembers ---------------------------------------------------------------


def test_use_changes_nothing_of_what_a_tokenizer_is(vocabulary: Path):
    """The fingerprint of `datasets`, by which `map` finds its results again, and what is pickled or copied."""
    from datasets.fingerprint import Hasher

    tokenizer = HfClipTokenizer.from_vocabulary_file(vocabulary)
    processor = HfClipProcessor(HfClipImageProcessor(), tokenizer)
    before = Hasher.hash(tokenizer), Hasher.hash(processor), pickle.dumps(tokenizer)
    tokenizer("cat")
    tokenizer(["a", "word " * 100], truncation=True, return_offsets_mapping=True, padding="max_length")
    tokenizer("word " * 100)  # which warns
    tokenizer("a", split_special_tokens=True)
    processor(text="a cat", images=Image.new("RGB", (9, 9)), return_tensors="pt")
    assert (Hasher.hash(tokenizer), Hasher.hash(processor), pickle.dumps(tokenizer)) == before
    for other in (copy.deepcopy(tokenizer), copy.copy(tokenizer), pickle.loads(before[2])):
        assert other("a photo of a cat").input_ids == tokenizer("a photo of a cat").input_ids
        assert Hasher.hash(other) == before[0]
    tokenizer.add_tokens(["<toy>"])
    assert Hasher.hash(tokenizer) != before[0]


def test_memory_of_long_chunks_is_bounded(vocabulary: Path, monkeypatch: pytest.MonkeyPatch):
    from hf_clip.model import chunk_memory as module

    monkeypatch.setattr(module, "MOST_CHARACTERS", 5000)
    tokenizer = HfClipTokenizer.from_vocabulary_file(vocabulary)
    texts = [f"http://a.b/{number}" + "x" * 800 for number in range(20)]
    found = [tokenizer(text, verbose=False).input_ids for text in texts]
    assert len(tokenizer._memory.known.ids) <= 8
    assert found == tokenizer(texts, padding=False, verbose=False).input_ids


# --- containers of texts -------------------------------------------------------------------------------------------


def columns() -> dict[str, Any]:
    import datasets
    import pandas
    import pyarrow

    texts = ["a cat", "it’s a dog"]
    return {
        "tuple": tuple(texts),
        "array": np.array(texts),
        "array of objects": np.array(texts, dtype=object),
        "NumPy strings": [np.str_(text) for text in texts],
        "column": datasets.Dataset.from_dict({"text": texts})["text"],
        "iterable column": datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()["text"],
        "series": pandas.Series(texts, index=[5, 6]),
        "Arrow": pyarrow.array(texts),
        "Arrow in chunks": pyarrow.chunked_array([texts[:1], texts[1:]]),
        "map": map(str, texts),
        "generator": (text for text in texts),
        "keys": dict.fromkeys(texts).keys(),
    }


def test_any_column_of_texts_is_taken(tokenizer: HfClipTokenizer):
    expected = tokenizer(["a cat", "it’s a dog"]).input_ids
    for name, column in columns().items():
        assert tokenizer(column).input_ids == expected, name
    assert tokenizer(np.array("a cat")).input_ids == tokenizer(np.str_("a cat")).input_ids == expected[0][:4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "a cat"}, "got dict, but a text or a list of texts is needed"),
        ({"a cat"}, "got set, but a text or a list of texts is needed"),
        (b"a cat", "got bytes, but a text or a list of texts is needed"),
        (7, "got int, but a text or a list of texts is needed"),
        (np.array([["a", "b"]]), "got ndarray of 2 dimensions, but one column of texts is needed"),
        (np.array(7), "got int, but a text or a list of texts is needed"),
    ],
    ids=["dict", "set", "bytes", "int", "table", "number"],
)
def test_what_holds_no_texts_in_order_is_refused(tokenizer: HfClipTokenizer, given: Any, message: str):
    with pytest.raises(ValueError, match=message):
        tokenizer(given)


def test_what_is_no_text_in_a_column_is_told_by_its_index(tokenizer: HfClipTokenizer):
    import pandas
    import pyarrow

    for column in (
        ["a", None],
        np.array(["a", 7], dtype=object),
        pandas.Series(["a", None]),
        pyarrow.array(["a", None]),
    ):
        with pytest.raises(TextError, match="Text 1 is a ") as caught:
            tokenizer(column)
        assert pickle.loads(pickle.dumps(caught.value)).index == caught.value.index == 1
