"""Added tokens: found where stock CLIPTokenizer finds them, whatever their flags, and everywhere else OpenAI's ids."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import CLIPTokenizer

from conversion.reference import load_reference_module
from hf_clip import HfClipTokenizer
from hf_clip.model.bpe import read_merges
from hf_clip.model.repair_text import TextError

CONTENTS = [
    "sks", "Cat", "<Cat-Toy>", "<cat", "two words", "two  spaces", "a", "-", "--", "'s", "42", "4", "<|end", "_",
    "b\tc", "dog</w>", "!!", "toy>",
]  # fmt: skip
PARTS = [
    "sks", "SKS", "asks", "sksx", "sks2", "sks-", "Cat", "cat", "CATS", "concat", "<cat-toy>", "<Cat-Toy>", "<CAT-TOY>",
    "two words", "Two  Words", "two\twords", "two spaces", "two  spaces", "a", "A", "-", "---", "it's", "42", "4", "2",
    "É", "e\u0301", "<|end", "_", "b c", "b\tc", "dog</w>", "!!", "!", "toy>", " ", "\n", "\xa0", "\u6771\u4eac",
    " <|endoftext|> ", " <|startoftext|> ",
]  # fmt: skip
"""What both tokenizers repair alike; special tokens within other symbols are OpenAI's to cut."""


def own(tokenizer: HfClipTokenizer) -> HfClipTokenizer:
    return type(tokenizer)(
        tokenizer_object=type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str()),
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=77,
    )


@pytest.fixture(scope="module")
def backend(vocabulary: Path) -> HfClipTokenizer:
    return HfClipTokenizer.from_vocabulary_file(vocabulary)


@pytest.mark.parametrize("seed", range(4))
def test_added_tokens_are_found_where_stock_finds_them(backend: HfClipTokenizer, vocabulary: Path, seed: int):
    generator = random.Random(seed)
    stock = CLIPTokenizer(vocab=backend.get_vocab(), merges=read_merges(vocabulary), model_max_length=77)
    ours = own(backend)
    for content in generator.sample(CONTENTS, 5):
        flags = {name: generator.random() < 0.35 for name in ("single_word", "lstrip", "rstrip")}
        flags |= {"normalized": generator.random() < 0.5} if generator.random() < 0.5 else {}
        special = generator.random() < 0.2
        for tokenizer in (stock, ours):
            tokenizer.add_tokens([AddedToken(content, **flags)], special_tokens=special)
    for _ in range(150):
        parts = [generator.choice(PARTS) + generator.choice(["", " ", " "]) for _ in range(generator.randint(1, 7))]
        text = "x " + "".join(parts) + " x"
        split = generator.random() < 0.2
        expected = stock(text, split_special_tokens=split).input_ids
        assert ours(text, split_special_tokens=split).input_ids == expected, ascii(text)
        if not split:
            assert ours(["", text], return_tensors="np").input_ids[1, : len(expected)].tolist() == expected, ascii(text)


def test_text_without_added_tokens_keeps_openais_ids(backend: HfClipTokenizer):
    """Special tokens in capitals, within other symbols, entities, mojibake: what stock would read otherwise."""
    encode = load_reference_module("simple_tokenizer").SimpleTokenizer().encode
    tokenizer = own(backend)
    tokenizer.add_tokens([AddedToken("<toy>", normalized=False), "<Cat-Toy>", "<|e"])
    for text in ("<<|endoftext|>>", "a <|ENDOFTEXT|> b", "AT&amp;T", "schÃ¶n", "it’s  a\tcat", "ΑΣ <|startoftext|>"):
        assert tokenizer(text).input_ids == [49406, *encode(text), 49407], text


def test_added_tokens_have_their_names_places_and_padding(backend: HfClipTokenizer):
    tokenizer = own(backend)
    tokenizer.add_tokens([AddedToken("<toy>", rstrip=True, normalized=False), "Two  Words", "cat"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    text = "A <toy>  and two \t WORDS concat"
    found = tokenizer([text, "a"], return_offsets_mapping=True)
    names = ["<|startoftext|>", "a</w>", "<toy>", "and</w>", "Two  Words", "con</w>", "cat", "<|endoftext|>"]
    assert found.tokens(0) == names
    assert found.input_ids[0] == found.encodings[0].ids == tokenizer.convert_tokens_to_ids(names)
    pieces = [text[start:end] for start, end in found.offset_mapping[0]]
    assert pieces == ["", "A", "<toy>  ", "and", "two \t WORDS", "con", "cat", ""]
    assert [text[slice(*found.word_to_chars(0, word))] for word in range(6)] == pieces[1:-1]
    assert found.input_ids[1][3:] == [tokenizer.pad_token_id] * 5
    assert tokenizer.pad_token_id == 49410 != tokenizer.convert_tokens_to_ids("Two  Words")


def test_token_that_is_added_counts_from_then_on(backend: HfClipTokenizer):
    """Also one that the vocabulary has, which makes it no larger."""
    tokenizer = own(backend)
    before = tokenizer("concat", return_offsets_mapping=True)
    lazy = tokenizer(["concat"])
    tokenizer.add_tokens([AddedToken("cat", single_word=True)])
    assert len(tokenizer) == 49408
    assert tokenizer("concat").input_ids == before.input_ids
    assert tokenizer("con cat").input_ids[2] == tokenizer.get_vocab()["cat"]
    tokenizer.add_tokens([AddedToken("cat")])
    assert tokenizer("concat").tokens()[-2] == "cat"
    assert lazy.tokens(0) == before.tokens()  # made now, of what the tokenizer was then


def test_tokens_that_take_one_anothers_white_space_are_an_error_with_an_index(backend: HfClipTokenizer):
    """Rust gives up on them, in stock tokenizers too."""
    tokenizer = own(backend)
    tokenizer.add_tokens(
        [AddedToken("toy", rstrip=True, normalized=False), AddedToken(" ", lstrip=True, normalized=False)]
    )
    with pytest.raises(
        TextError, match="Text 1 cannot be tokenized: its added tokens overlap in white space"
    ) as caught:
        tokenizer(["a lamp", "a toy   x"])
    assert caught.value.index == 1
