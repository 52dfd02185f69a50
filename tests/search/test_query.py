"""How queries are read and added up."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from hf_clip.search.query import (
    QueryError,
    QueryPart,
    combine_parts,
    encode_text_query,
    is_short_noun,
    parse_queries,
    parse_query,
)


def part(kind: str, value: str, weight: float = 1.0) -> QueryPart:
    return QueryPart(kind, value, weight)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a dog on a beach"], [part("text", "a dog on a beach")]),
        (["a red car", "./like.jpg"], [part("text", "a red car"), part("image", "./like.jpg")]),
        (["https://example.org/x"], [part("image", "https://example.org/x")]),
        (['"a beach"'], [part("text", "a beach")]),
        (
            ['2:"a beach" + ./b.jpg - "people"'],
            [part("text", "a beach", 2.0), part("image", "./b.jpg"), part("text", "people", -1.0)],
        ),
        (['"a" - ./my\\ photo\\ 2.jpg'], [part("text", "a"), part("image", "./my photo 2.jpg", -1.0)]),
        (['"x.jpg" -0.5:"b"'], [part("text", "x.jpg"), part("text", "b", -0.5)]),
        (["what is a .jpg file?"], [part("text", "what is a .jpg file?")]),
        (["10:30 on a clock"], [part("text", "10:30 on a clock")]),
    ],
)
def test_words_are_read(words: list[str], expected: list[QueryPart]):
    assert parse_queries(words) == expected


def test_file_without_an_ending_is_an_image(tmp_path: Path):
    path = tmp_path / "photo"
    path.write_bytes(b"")
    assert parse_queries([str(path)]) == [part("image", str(path))]


def test_name_of_a_file_may_hold_quotation_marks_and_signs(tmp_path: Path):
    path = tmp_path / '2:"best" - it\'s.jpg'
    path.write_bytes(b"")
    assert parse_queries([str(path)]) == [part("image", str(path))]
    assert parse_queries(['2:"best" - "it"']) == [part("text", "best", 2.0), part("text", "it", -1.0)]


def test_minus_and_more_like():
    found = parse_queries(["a car"], ["snow", "./x.png"], [17])
    assert found == [
        part("text", "a car"),
        part("id", "17"),
        part("text", "snow", -0.5),
        part("image", "./x.png", -0.5),
    ]


@pytest.mark.parametrize(
    ("words", "minus", "message"),
    [
        ([], [], "There is nothing to look for"),
        ([" "], [], "A query is empty"),
        ([], ["snow"], "only subtracts"),
        (['- "snow"'], [], "only subtracts"),
        (['"a" "b"'], [], r"cannot be read from '\"b\"' on: write parts with \+ or -"),
        (['"a" + '], [], r"cannot be read from '\+' on"),
        (['"a" + ""'], [], "cannot be read from"),
        (['"a'], [], "cannot be read from"),
        (['"a" + ./my photo.jpg'], [], r"from 'photo\.jpg' on: write .* and \"\\ \" for a space of a path"),
    ],
)
def test_what_cannot_be_read(words: list[str], minus: list[str], message: str):
    with pytest.raises(QueryError, match=message):
        parse_queries(words, minus)


@pytest.mark.parametrize("text", ["{}", '"a" + {}', '"a" - 2:{}'])
def test_texts_alone_tell_nothing_of_files(text: str, tmp_path: Path):
    """What is there is read as what is not."""
    (tmp_path / "x.jpg").write_bytes(b"")
    for place in (tmp_path, tmp_path / "x.jpg", tmp_path / "missing"):
        parts = parse_query(text.format(place), only_texts=True)
        assert (parts[-1].kind, parts[-1].value) == ("text", str(place))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("red car", True), ("dog", True), ("A dog runs.", False), ("a photo of a dog on a beach", False), ("dog?", False)],
)
def test_short_nouns(text: str, expected: bool):
    assert is_short_noun(text) is expected


def test_short_noun_is_put_into_templates(small_model):
    model, processor, _ = small_model
    noun = encode_text_query(model, processor, "three")
    assert noun.norm() == pytest.approx(1.0)
    assert not torch.allclose(noun, encode_text_query(model, processor, "three", "{}"), atol=1e-4)
    sentence = "the digit three in red on blue paper"
    assert torch.equal(
        encode_text_query(model, processor, sentence), encode_text_query(model, processor, sentence, "{}")
    )


def test_sum_ranks_as_similarities_in_units_of_their_spread():
    generator = torch.Generator().manual_seed(0)
    sample = normalize(torch.randn(200, 16, generator=generator) + 2, dim=1)
    vectors = normalize(torch.randn(3, 16, generator=generator), dim=1)
    weights = [2.0, 1.0, -0.5]
    direction = combine_parts(vectors, weights, sample)
    similarities = sample @ vectors.T
    expected = (similarities / similarities.std(dim=0)) @ torch.tensor(weights)
    assert torch.equal((sample @ direction).argsort(), expected.argsort())
    assert direction.norm() == pytest.approx(1.0)


def test_parts_that_cancel():
    vector = normalize(torch.ones(4), dim=0)
    sample = normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    with pytest.raises(QueryError, match="cancel one another"):
        combine_parts(torch.stack([vector, vector]), [1.0, -1.0], sample)
